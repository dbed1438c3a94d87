"""Speed of the training loader, against its peers and against the bare decode of the same images.

    python benchmarks/loader.py                       # photographs of scikit-image, two to three minutes on 2 cores
    python benchmarks/loader.py --photos pictures/    # other pictures to cut from
    python benchmarks/loader.py --threads 2 --only JPEG

Every arm makes batches of random windows of pairs, mirrored or not, of files that lie in the page cache. Datasets hold
every image four times, so that shards have about the size of real ones.

    rddm         build_train_loader on a packed dataset
    webdataset   a webdataset pipeline on the same shards: shuffle, decode with Pillow, crop, mirror, batch
    streaming    the same work on MosaicML Streaming's own format; only where that package can be imported
    folder       torch DataLoader over the source files: open, decode with Pillow, crop, mirror, batch
    bare ...     the same bytes, held in memory, are decoded whole and dropped: by Pillow, which the others use, and for
                 JPEG by simplejpeg, which rddm uses where it is installed

With --threads N, rddm and the bare decode have N threads, the others N worker processes; with 1 they work in the
consumer itself. rddm's one thread runs beside the consumer, so look at its CPU time too. The images of the last set are
packed as tiles, which the folder loader cannot have: it decodes the whole images.

A round times every arm once, in an order that turns from round to round, so that a disturbance does not always hit the
same one. Tables have medians over the rounds (least-most). Ratios are taken within a round. CPU time counts all threads
and worker processes. No run of this script proves a difference smaller than the spread it prints.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.compare import Timing, make_ratios, make_rows, measure_rounds, print_comparison
from support.images import Photos, find_photos, repeat_pairs, write_pairs
from support.process import cpu_s
from support.report import Report, make_parser, print_noise, require_positive, run_main

from data_pipeline.errors import ConfigError
from data_pipeline.loader import Pace, Share, build_train_loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import choose_lanes
from data_pipeline.pack import pack
from data_pipeline.reader import Dataset
from data_pipeline.rows import RowSettings
from data_pipeline.sources import Pair
from data_pipeline.threads import map_ordered

SEED = 0
SHARD_MB = 8.0
REPEATS = 4  # of every image in a dataset
SHUFFLE_BUFFER = 1000  # webdataset's
OURS, PILLOW, SIMPLEJPEG = "rddm", "bare, Pillow", "bare, simplejpeg"
PACKAGES = ("torch", "numpy", "pillow", "simplejpeg", "webdataset", "mosaicml-streaming")

# Two images of a batch: None from an arm that only decodes, else (B, 3, crop, crop) uint8 each.
Made = tuple[torch.Tensor, torch.Tensor] | None
# Takes the number of the round and makes batches without end.
Arm = Callable[[int], Generator[Made, None, None]]


@dataclass(frozen=True)
class ImageSet:
    """Images to make.   size: (H, W); count: pairs, and pairs of a timing; tile: side and overlap when packed"""

    name: str
    extension: str
    size: tuple[int, int]
    count: int
    tile: tuple[int, int] = (0, 0)


# An arm takes a few tenths of a second for any of them.
SETS = (
    ImageSet("256 px JPEG", "jpg", (256, 256), 256),
    ImageSet("256 px PNG", "png", (256, 256), 96),
    ImageSet("512 px JPEG", "jpg", (512, 512), 96),
    ImageSet("512 px PNG", "png", (512, 512), 32),
    ImageSet("1280x720 PNG, tiles", "png", (720, 1280), 16, (512, 32)),
)
# Image set -> arm -> how many times its pairs per second rddm must reach; None: nothing was promised.
BARS: dict[str, dict[str, float | None]] = {
    images.name: {"folder": 3.00}
    if images.tile[0]
    else {
        "webdataset": 1.15,
        "streaming": None,
        "folder": None,
        PILLOW: 0.90,
        **({SIMPLEJPEG: 0.90} if images.extension == "jpg" else {}),
    }
    for images in SETS
}


@dataclass(frozen=True, eq=False)
class Work:
    """What every arm does: the images as source files and packed at `uri`, in batches of windows."""

    images: ImageSet
    pairs: Sequence[Pair]
    uri: str
    batch: int
    crop: int
    threads: int

    @property
    def num_batches(self) -> int:
        """Of a timing."""
        return max(self.images.count // self.batch, 1)

    @property
    def workers(self) -> int:
        """Processes of a loader that has no threads."""
        return self.threads if self.threads > 1 else 0


def rddm(work: Work) -> Arm:
    dataset = Dataset(work.uri)
    lanes = choose_lanes(len(dataset.manifest.shards), work.batch)

    def run(number: int) -> Generator[Made, None, None]:
        # A new loader has nothing decoded ahead and its consumer asks without a pause: no timed batch was ready before.
        with build_train_loader(
            [dataset],
            RowSettings(crop={0: work.crop}),
            seed=SEED,
            global_batch=work.batch,
            lanes=[lanes],
            share=Share(0, 1, work.batch),
            start_step=number * work.num_batches,
            pace=Pace(threads=work.threads),
        ) as loader:
            for batch in loader:
                yield batch.input, batch.target

    return run


def webdataset(work: Work) -> Arm:
    import webdataset as wds

    urls = [f"{work.uri}/{shard.name}" for shard in Manifest.load(work.uri).shards]
    draw, suffix = np.random.default_rng(SEED), work.images.extension

    def transform(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        return read_windows(io.BytesIO(row[f"input.{suffix}"]), io.BytesIO(row[f"target.{suffix}"]), work.crop, draw)

    rows = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(SHUFFLE_BUFFER).map(transform).repeat()
    return _loading(rows, work)


def streaming(work: Work) -> Arm:
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]

    folder, draw = f"{work.uri}-mds", np.random.default_rng(SEED)
    with MDSWriter(
        out=folder, columns={"input": "bytes", "target": "bytes"}, size_limit=int(SHARD_MB * 1e6), progress_bar=False
    ) as writer:
        for pair in REPEATS * list(work.pairs):
            writer.write({name: path.read_bytes() for name, path in pair.files.items()})

    class Windows(StreamingDataset):  # how its users decode
        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            row = super().__getitem__(index)
            return read_windows(io.BytesIO(row["input"]), io.BytesIO(row["target"]), work.crop, draw)

    # An epoch longer than a timing, so that no timing pays for the start of one.
    epoch = 4 * len(work.pairs) + 16 * work.batch * work.threads
    return _loading(Windows(local=folder, shuffle=True, batch_size=work.batch, epoch_size=epoch), work)


def folder(work: Work) -> Arm:
    draw = np.random.default_rng(SEED)

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(work.pairs)

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            pair = work.pairs[index]
            assert pair.input is not None, "pairs have inputs"
            return read_windows(pair.input, pair.target, work.crop, draw)

    rows = Windows()
    return _loading(rows, work, sampler=torch.utils.data.RandomSampler(rows, num_samples=1 << 20))


def _loading(rows: Any, work: Work, **options: Any) -> Arm:
    """The arm that takes pairs of windows from a torch dataset."""
    loader = torch.utils.data.DataLoader(
        rows, batch_size=work.batch, num_workers=work.workers, collate_fn=collate, **options
    )

    def run(number: int) -> Generator[Made, None, None]:
        yield from loader

    return run


def bare(decode: Callable[[bytes], object]) -> Callable[[Work], Arm]:
    """The arm that only decodes."""

    def make(work: Work) -> Arm:
        files = [path.read_bytes() for pair in work.pairs for path in pair.files.values()]
        batches = [files[start : start + 2 * work.batch] for start in range(0, len(files), 2 * work.batch)]

        def decode_batch(batch: Iterable[bytes]) -> None:
            for data in batch:
                decode(data)

        def run(number: int) -> Generator[Made, None, None]:
            endless = itertools.cycle(batches)
            if work.threads == 1:
                yield from map(decode_batch, endless)
            else:
                yield from map_ordered(decode_batch, endless, jobs=work.threads)

        return run

    return make


def _decode_with_pillow(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.load()


def _decode_with_simplejpeg(data: bytes) -> None:
    import simplejpeg

    simplejpeg.decode_jpeg(data)


def read_windows(
    input: io.BytesIO | Path, target: io.BytesIO | Path, crop: int, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One window of both images of a pair, mirrored or not, as a user of Pillow would write it: cut first.

    -> two (3, crop, crop) uint8
    """
    top, left, toss = draw.random(3)
    windows = []
    for file in (input, target):
        with Image.open(file) as image:
            picture = image if image.mode == "RGB" else image.convert("RGB")
            y, x = int(top * (picture.height - crop + 1)), int(left * (picture.width - crop + 1))
            window = np.asarray(picture.crop((x, y, x + crop, y + crop)))
        if toss < 0.5:
            window = window[:, ::-1]
        windows.append(window.transpose(2, 0, 1))
    return windows[0], windows[1]


def collate(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> two (B, 3, crop, crop) uint8"""
    inputs, targets = zip(*rows, strict=True)
    return torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))


ARMS: dict[str, Callable[[Work], Arm]] = {
    OURS: rddm,
    "webdataset": webdataset,
    "streaming": streaming,
    "folder": folder,
    PILLOW: bare(_decode_with_pillow),
    SIMPLEJPEG: bare(_decode_with_simplejpeg),
}


def find_absent() -> set[str]:
    """The arms whose packages cannot be imported; each is told."""
    absent = set()
    for name, package in {"streaming": "streaming", SIMPLEJPEG: "simplejpeg"}.items():
        try:
            importlib.import_module(package)
        except (ImportError, RuntimeError) as error:  # torchvision, a need of streaming, raises both
            print(f"{name} takes no part: {str(error).splitlines()[0]}")
            absent.add(name)
    return absent


def time_arm(arm: Arm, work: Work, number: int) -> Timing:
    run, made = arm(number), None
    for _ in range(2 * work.threads):
        next(run)
    wall, cpu = perf_counter(), cpu_s()
    for _ in range(work.num_batches):
        made = next(run)
    wall, cpu = perf_counter() - wall, cpu_s() - cpu
    run.close()
    shape = (work.batch, 3, work.crop, work.crop)
    assert made is None or made[0].shape == made[1].shape == shape, "every arm makes the same batches"
    pairs = work.num_batches * work.batch
    return Timing(pairs / wall, 1000.0 * cpu / pairs)


def make_work(images: ImageSet, photos: Photos, root: Path, options: argparse.Namespace) -> Work:
    """Make the images of a set and pack them."""
    name = images.name.replace(" ", "-").replace(",", "")
    pairs = write_pairs(root / name, photos, extension=images.extension, size=images.size, count=images.count)
    uri = str(root / f"{name}-packed")
    tile, overlap = images.tile
    samples = pairs if tile else repeat_pairs(pairs, REPEATS * len(pairs))
    pack(samples, uri, shard_mb=SHARD_MB, seed=SEED, tile=tile, overlap=overlap)
    return Work(images, pairs, uri, options.batch, options.crop, options.threads)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "loader")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="folder of pictures to cut the images from")
    parser.add_argument("--only", default="", metavar="TEXT", help="only image sets whose name holds TEXT")
    parser.add_argument("--rounds", type=int, default=10, help="measured rounds (10)")
    parser.add_argument("--threads", type=int, default=1, help="threads, or processes, of every arm (1)")
    parser.add_argument("--crop", type=int, default=128, help="side of the random crop in pixels (128)")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a batch (8)")
    options = parser.parse_args()
    require_positive(parser, options, ("rounds", "threads", "crop", "batch"))
    return options


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    report = Report("loader", PACKAGES)
    sets = [images for images in SETS if options.only in images.name]
    if not sets:
        raise ConfigError(
            f"--only={options.only!r} is in none of {[images.name for images in SETS]}; give another TEXT"
        )
    with tempfile.TemporaryDirectory(prefix="rddm-bench-") as temporary:
        photos = find_photos(options.photos, Path(temporary) / "photos")
        print(f"making and packing images: {photos.what}", flush=True)
        works = [make_work(images, photos, Path(temporary), options) for images in sets]
        packed_mb = {work.images.name: sum(Manifest.load(work.uri).shards.column("bytes")) / 1e6 for work in works}
        absent = find_absent()
        groups = {
            work.images.name: {
                name: partial(time_arm, ARMS[name](work), work)
                for name in (OURS, *BARS[work.images.name])
                if name not in absent
            }
            for work in works
        }
        timings = measure_rounds("loader", groups, rounds=options.rounds)
    rows, ratios = make_rows(timings), make_ratios(timings, OURS, BARS)
    print_comparison(rows, ratios, ours=OURS, group="images", unit="pair")
    for row in rows:
        if row["arm"] in (PILLOW, SIMPLEJPEG):
            print_noise(f"{row['arm']}, {row['group']}", row["per_s"])
    settings = {name: getattr(options, name) for name in ("crop", "batch", "rounds", "threads")}
    report.write(
        options.json,
        settings={**settings, "source": photos.what, "pairs": {s.name: s.count for s in sets}, "packed_mb": packed_mb},
        results={"loaders": rows, "ratios": ratios},
    )


if __name__ == "__main__":
    run_main(main)
