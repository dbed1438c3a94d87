"""Speed of the training loader, against its peers and against the bare decode of the same images.

    python benchmarks/loader.py                                  # synthetic images, about a minute on 2 cores
    python benchmarks/loader.py --source noisy/ clean/ --crop 128    # folders of real pairs

Four ways to the same batches of random crops, one decoding thread (num_workers=0) each, files in the page cache:

    rddm         build_train_loader on a packed dataset
    webdataset   a plain webdataset pipeline on the same shards: shuffle, decode with Pillow, crop, mirror, batch
    folder       torch DataLoader over the source files: open, decode with Pillow, crop, mirror, batch
    bare decode  Pillow decodes the same bytes, held in memory, and nothing else: the limit

A round times one epoch of each, in an order that turns from round to round, so that a disturbance does not always hit
the same one. The table has medians over the rounds (least to most). Ratios are taken within a round, then their
median. CPU time counts all threads of the process; it suffers less than pairs per second from what else runs on the
machine, but does suffer. No run of this script proves a difference smaller than the spread it prints.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.errors import ConfigError, UserError
from data_pipeline.loader import build_train_loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import choose_lanes
from data_pipeline.pack import pack
from data_pipeline.sources import Pair, find_pairs
from rddm_dist.cli.progress import ProgressBar

RESULTS = Path(__file__).parent / "results" / "loader.json"
LIMIT = "bare decode"
SHARD_MB = 4.0
SEED = 0
WARM_BATCHES = 2
FIRST_EPOCH = 2  # leaves room for warm-up batches before it, even where an epoch is a single batch
NOISY_SPREAD = 1.15  # the limit itself varied by more: said under the table

# Yields once when ready, before the clock starts, then once per batch.
Run = Generator[None, None, None]
# Takes the number of the epoch (FIRST_EPOCH, ...).
Arm = Callable[[int], Run]


@dataclass(frozen=True)
class ImageSet:
    """Pairs to load, as source files and packed in folder `uri`."""

    name: str
    pairs: Sequence[Pair]
    uri: str


@dataclass(frozen=True)
class Work:
    """What every arm does with an image set."""

    images: ImageSet
    batch: int
    crop: int

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return len(self.images.pairs) // self.batch


@dataclass(frozen=True)
class Timing:
    """One epoch of one arm."""

    pairs_per_s: float
    cpu_ms_per_pair: float


def rddm(work: Work) -> Arm:
    uri, manifest = work.images.uri, Manifest.load(work.images.uri)

    def run(epoch: int) -> Run:
        # A new loader has nothing decoded ahead and its consumer asks without a pause: no timed batch was ready before.
        with build_train_loader(
            uri,
            manifest,
            seed=SEED,
            global_batch=work.batch,
            lanes=choose_lanes(len(manifest.shards), work.batch),
            rank=0,
            world_size=1,
            rows_per_rank=work.batch,
            start_step=epoch * work.num_batches - WARM_BATCHES,
            crop=work.crop,
            flip=True,
            threads=1,
        ) as loader:
            for _ in range(WARM_BATCHES):
                next(loader)
            yield
            for batch in loader:
                _check(batch.input, batch.target, work)
                yield

    return run


def webdataset(work: Work) -> Arm:
    import webdataset as wds

    urls = [f"{work.images.uri}/{shard.name}" for shard in Manifest.load(work.images.uri).shards]

    def transform(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        fields = {name.split(".")[0]: name for name in row}
        return read_windows(io.BytesIO(row[fields["input"]]), io.BytesIO(row[fields["target"]]), work.crop, rng)

    rng = np.random.default_rng(SEED)
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls))
        .shuffle(1000)
        .map(transform)
        .batched(work.batch, collation_fn=collate)
    )

    return _epochs(dataset, work)


def _epochs(batches: Iterable[tuple[torch.Tensor, torch.Tensor]], work: Work) -> Arm:
    """An arm that walks something iterable once per epoch."""

    def run(epoch: int) -> Run:
        yield
        for x, y in batches:
            _check(x, y, work)
            yield

    return run


def folder(work: Work) -> Arm:
    pairs, rng = work.images.pairs, np.random.default_rng(SEED)

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(pairs)

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            return read_windows(pairs[index].input, pairs[index].target, work.crop, rng)

    loader = torch.utils.data.DataLoader(
        Files(), batch_size=work.batch, shuffle=True, num_workers=0, collate_fn=collate
    )

    return _epochs(loader, work)


def bare_decode(work: Work) -> Arm:
    files = [path.read_bytes() for pair in work.images.pairs for path in (pair.input, pair.target)]

    def run(epoch: int) -> Run:
        yield
        for start in range(0, len(files), 2 * work.batch):
            for data in files[start : start + 2 * work.batch]:
                with Image.open(io.BytesIO(data)) as image:
                    image.load()
            yield

    return run


# Another loader is one more entry: it takes part in every round and gets its row.
ARMS: dict[str, Callable[[Work], Arm]] = {
    "rddm": rddm,
    "webdataset": webdataset,
    "folder": folder,
    LIMIT: bare_decode,
}


def read_windows(
    input: io.BytesIO | Path, target: io.BytesIO | Path, crop: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One window of both images of a pair, mirrored or not, as a user of Pillow would write it.

    -> two (3, crop, crop) uint8. The window is copied, so that the decoded image is freed at once.
    """
    top, left, toss = rng.random(3)
    windows = []
    for file in (input, target):
        with Image.open(file) as image:
            picture = image if image.mode == "RGB" else image.convert("RGB")
            y, x = int(top * (picture.height - crop + 1)), int(left * (picture.width - crop + 1))
            window = np.asarray(picture.crop((x, y, x + crop, y + crop)))
        if toss < 0.5:
            window = window[:, ::-1]
        windows.append(np.ascontiguousarray(window.transpose(2, 0, 1)))
    return windows[0], windows[1]


def collate(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> two (B, 3, crop, crop) uint8"""
    inputs, targets = zip(*rows, strict=True)
    return torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))


def _check(x: torch.Tensor, y: torch.Tensor, work: Work) -> None:
    shape = (work.batch, 3, work.crop, work.crop)
    assert x.shape == y.shape == shape and x.dtype == y.dtype == torch.uint8, "every arm makes the same batches"


def time_epoch(arm: Arm, epoch: int, work: Work) -> Timing:
    run = arm(epoch)
    next(run)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(work.num_batches):
        next(run)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    run.close()
    pairs = work.num_batches * work.batch
    return Timing(pairs / wall, 1000.0 * cpu / pairs)


def measure(works: Sequence[Work], rounds: int) -> dict[str, dict[str, list[Timing]]]:
    """Image set -> arm -> one timing per round."""
    arms = [{name: make(work) for name, make in ARMS.items()} for work in works]
    timings: dict[str, dict[str, list[Timing]]] = {work.images.name: {name: [] for name in ARMS} for work in works}
    with ProgressBar("loader", rounds + 1, every_s=5.0) as bar:
        for number in range(rounds + 1):
            names = list(ARMS)
            turn = number % len(names)
            for work, own in zip(works, arms, strict=True):
                for name in names[turn:] + names[:turn]:
                    timing = time_epoch(own[name], number + FIRST_EPOCH, work)
                    if number:  # round 0 fills caches
                        timings[work.images.name][name].append(timing)
            bar.update(number + 1, "warm-up" if not number else "")
    return timings


def summarize(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def make_rows(timings: dict[str, dict[str, list[Timing]]]) -> list[dict[str, Any]]:
    rows = []
    for images, arms in timings.items():
        limit = arms[LIMIT]
        for name, own in arms.items():
            both = list(zip(own, limit, strict=True))
            rows.append(
                {
                    "images": images,
                    "loader": name,
                    "pairs_per_s": summarize([timing.pairs_per_s for timing in own]),
                    "speed_of_limit": summarize([timing.pairs_per_s / bare.pairs_per_s for timing, bare in both]),
                    "cpu_ms_per_pair": summarize([timing.cpu_ms_per_pair for timing in own]),
                    "cpu_of_limit": summarize([timing.cpu_ms_per_pair / bare.cpu_ms_per_pair for timing, bare in both]),
                    "rounds": [asdict(timing) for timing in own],
                }
            )
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    def cell(numbers: dict[str, float], digits: int) -> str:
        return f"{numbers['median']:.{digits}f} ({numbers['min']:.{digits}f}-{numbers['max']:.{digits}f})"

    lines = [
        [
            row["images"],
            row["loader"],
            cell(row["pairs_per_s"], 0),
            cell(row["speed_of_limit"], 2),
            cell(row["cpu_ms_per_pair"], 2),
            cell(row["cpu_of_limit"], 2),
        ]
        for row in rows
    ]
    table = [["images", "loader", "pairs/s", "speed / limit", "CPU ms/pair", "CPU / limit"], *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    table.insert(1, ["-" * width for width in widths])
    for line in table:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")


def print_noise(rows: Sequence[dict[str, Any]], load_average: Sequence[float]) -> None:
    for row in rows:
        numbers = row["pairs_per_s"]
        spread = numbers["max"] / numbers["min"]
        if row["loader"] == LIMIT and spread > NOISY_SPREAD:
            print(
                f"noisy: from round to round the limit itself varied by a factor of {spread:.2f} on {row['images']}; "
                f"something else used this machine, repeat on a quiet one before comparing"
            )
    print(f"load average {load_average[0]:.1f} before, {load_average[1]:.1f} after, {os.cpu_count()} CPU cores")


def make_synthetic(root: Path, extension: str, *, count: int, size: int) -> tuple[Path, Path]:
    """Folders of `count` pairs: smooth colours with fine noise, and the same with more of it."""
    options: dict[str, Any] = {"quality": 95} if extension == "jpg" else {}
    noise = np.random.default_rng(SEED)
    folders = root / "input", root / "target"
    for path in folders:
        path.mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        target = smooth + noise.normal(0.0, 2.0, smooth.shape)
        for path, image in zip(folders, (target + noise.normal(0.0, 10.0, smooth.shape), target), strict=True):
            pixels = np.clip(image, 0.0, 255.0).astype(np.uint8)
            Image.fromarray(pixels).save(path / f"{number:05d}.{extension}", **options)
    return folders


def pack_images(name: str, pairs: Sequence[Pair], out: Path, *, batch: int, count: int) -> ImageSet:
    """Pack up to `count` of the pairs, whole batches, spread evenly over the list."""
    count = min(count, len(pairs)) // batch * batch
    if count == 0:
        raise ConfigError(f"{len(pairs)} pairs with --pairs and --batch={batch} make no batch; lower --batch")
    taken = [pairs[i * len(pairs) // count] for i in range(count)]
    pack(taken, str(out), shard_mb=SHARD_MB, codec="keep", seed=SEED)
    return ImageSet(name, taken, str(out))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", nargs=2, type=Path, metavar=("INPUT", "TARGET"), help="folders of real pairs")
    parser.add_argument("--rounds", type=int, default=10, help="measured rounds (10)")
    parser.add_argument("--pairs", type=int, default=192, help="pairs of an epoch at most (192)")
    parser.add_argument("--size", type=int, default=256, help="side of the synthetic images in pixels (256)")
    parser.add_argument("--crop", type=int, default=128, help="side of the random crop in pixels (128)")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a batch (8)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of results (benchmarks/results/loader.json)")
    options = parser.parse_args()
    for name in ("rounds", "pairs", "size", "crop", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    started, load_before = time.perf_counter(), os.getloadavg()[0]
    print("making and packing the images", flush=True)
    with tempfile.TemporaryDirectory(prefix="rddm-bench-") as temporary:
        root = Path(temporary)
        if options.source:
            sources = {"real pairs": tuple(options.source)}
        else:
            sources = {
                f"{options.size} px {label}": make_synthetic(
                    root / extension, extension, count=options.pairs, size=options.size
                )
                for label, extension in (("PNG", "png"), ("JPEG q95", "jpg"))
            }
        works = []
        for number, (name, (inputs, targets)) in enumerate(sources.items()):
            images = pack_images(
                name,
                find_pairs(inputs, targets),
                root / f"packed-{number}",
                batch=options.batch,
                count=options.pairs,
            )
            works.append(Work(images, options.batch, options.crop))
        timings = measure(works, options.rounds)
        rows = make_rows(timings)
        num_pairs = {work.images.name: len(work.images.pairs) for work in works}
        megabytes = {
            work.images.name: sum(shard.bytes for shard in Manifest.load(work.images.uri).shards) / 1e6
            for work in works
        }
    load_average, wall_s = [load_before, os.getloadavg()[0]], time.perf_counter() - started
    print_table(rows)
    print_noise(rows, load_average)
    document = {
        "benchmark": "loader",
        "machine": {
            "cpu_cores": os.cpu_count(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "pillow", "webdataset")},
            "load_average": load_average,
        },
        "settings": {
            "crop": options.crop,
            "batch": options.batch,
            "rounds": options.rounds,
            "threads": 1,
            "pairs": num_pairs,
            "packed_mb": megabytes,
        },
        "results": rows,
        "wall_s": wall_s,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{wall_s:.0f} s; written to {options.json}")


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
