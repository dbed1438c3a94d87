"""Size and decoding speed of the codecs of `rddm pack`, on real images.

    python benchmarks/codecs.py                           # the photographs of rddm demo with their rainy versions
    python benchmarks/codecs.py --list pairs.tsv          # a list of pairs, as for rddm pack
    python benchmarks/codecs.py --source noisy/ clean/    # two folders
    python benchmarks/codecs.py --clean photos/           # clean images: one image instead of a pair

Every image is encoded as the packer does it and decoded as the training loader does it, by decode_image in one thread
from memory: whole, and a random 128-pixel window of both images of a pair. A round decodes all pairs once with each
codec, in an order that turns from round to round; the table has medians over the rounds. `keep` is the source file.
The pixels of raw are used where they lie, so its time leaves out the copy that any later step makes.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.report import Report, make_parser, print_table, require_positive, run_main, show_summary, summarize

from data_pipeline.decode import Window, decode_image, read_size
from data_pipeline.errors import ConfigError
from data_pipeline.pack import pack
from data_pipeline.pack_executors import threads
from data_pipeline.pack_jobs import extension_of
from data_pipeline.reader import Dataset
from data_pipeline.records import CODECS
from data_pipeline.sources import Pair, find_clean, find_pairs, read_pair_list
from rddm_dist.cli.demo_photos import write_demo_pairs
from rddm_dist.cli.progress import ProgressBar

SEED = 0
PACKAGES = ("numpy", "pillow", "simplejpeg")

Members = Mapping[str, tuple[str, bytes]]  # field -> (extension, bytes)


@dataclass(frozen=True)
class Work:
    """The packed pairs of one codec. windows: the one of each pair that is cut out."""

    pairs: Sequence[Members]
    windows: Sequence[Window]

    @property
    def bytes_per_pair(self) -> float:
        return sum(len(data) for members in self.pairs for _, data in members.values()) / len(self.pairs)


def load(pairs: Sequence[Pair], codec: str, folder: Path, *, crop: int) -> Work:
    """Pack with a codec and read the members back into memory."""
    out = str(folder / codec)
    pack(pairs, out, codec=codec, seed=SEED, executor=threads(os.cpu_count() or 1))
    dataset = Dataset(out)
    members, windows = [], []
    for image in dataset.images():
        shard_index, offset = image.places[0]
        members.append(dataset.read(shard_index, dataset.index(shard_index)[offset], dataset.manifest.fields))
        draw = random.Random(image.key)
        top, left = draw.randint(0, image.height - crop), draw.randint(0, image.width - crop)
        windows.append(Window(top, left, crop, crop))
    return Work(members, windows)


def time_round(work: Work, *, is_whole: bool) -> float:
    """Milliseconds a pair takes."""
    started = time.perf_counter()
    for members, window in zip(work.pairs, work.windows, strict=True):
        for field, (extension, data) in members.items():
            decode_image(data, extension, channels=1 if field == "mask" else 3, window=None if is_whole else window)
    return 1000.0 * (time.perf_counter() - started) / len(work.pairs)


def measure(works: Mapping[str, Work], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Codec -> "whole" and "crop" -> milliseconds per pair, one for each round."""
    times: dict[str, dict[str, list[float]]] = {codec: {"whole": [], "crop": []} for codec in works}
    with ProgressBar("codecs", rounds + 1, every_s=5.0) as bar:
        for number in range(rounds + 1):
            names = list(works)
            turn = number % len(names)
            for codec in names[turn:] + names[:turn]:
                for kind in ("whole", "crop"):
                    milliseconds = time_round(works[codec], is_whole=kind == "whole")
                    if number:  # round 0 warms up
                        times[codec][kind].append(milliseconds)
            bar.update(number + 1, "warm-up" if not number else "")
    return times


def make_rows(works: Mapping[str, Work], times: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    return [
        {
            "codec": codec,
            "bytes_per_pair": work.bytes_per_pair,
            "whole_ms_per_pair": summarize(times[codec]["whole"]),
            "crop_ms_per_pair": summarize(times[codec]["crop"]),
        }
        for codec, work in works.items()
    ]


def print_results(rows: Sequence[dict[str, Any]], crop: int) -> None:
    print_table(
        ("codec", "kB/pair", "whole, ms/pair", f"{crop}-crop, ms/pair"),
        (
            (
                row["codec"],
                f"{row['bytes_per_pair'] / 1000:.0f}",
                show_summary(row["whole_ms_per_pair"], 2),
                show_summary(row["crop_ms_per_pair"], 2),
            )
            for row in rows
        ),
    )


def find_images(options: argparse.Namespace, folder: Path) -> list[Pair]:
    """Up to --pairs pairs of the source, spread evenly over it, all with room for the crop."""
    if options.list:
        pairs = read_pair_list(options.list)
    elif options.source:
        pairs = find_pairs(*options.source)
    elif options.clean:
        pairs = find_clean(options.clean)
    else:
        splits = write_demo_pairs(folder / "photos").values()
        pairs = [pair for split in splits for pair in find_pairs(split / "input", split / "target")]
    count = min(options.pairs, len(pairs))
    taken = [pairs[i * len(pairs) // count] for i in range(count)]
    for pair in taken:
        if min(read_size(pair.target.read_bytes(), extension_of(pair.target))) < options.crop:
            raise ConfigError(f"{pair.target} is smaller than --crop={options.crop}; lower it")
    return taken


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "codecs")
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--list", type=Path, help="tab-separated list of pairs")
    sources.add_argument("--source", nargs=2, type=Path, metavar=("INPUT", "TARGET"), help="folders of pairs")
    sources.add_argument("--clean", type=Path, help="folder of clean images")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (7)")
    parser.add_argument("--pairs", type=int, default=24, help="pairs at most (24)")
    parser.add_argument("--crop", type=int, default=128, help="side of the window in pixels (128)")
    options = parser.parse_args()
    require_positive(parser, options, ("rounds", "pairs", "crop"))
    return options


def main() -> None:
    options = parse_arguments()
    report = Report("codecs", PACKAGES)
    with tempfile.TemporaryDirectory(prefix="rddm-bench-") as temporary:
        pairs = find_images(options, Path(temporary))
        print(f"packing {len(pairs)} pairs with each codec", flush=True)
        works = {codec: load(pairs, codec, Path(temporary), crop=options.crop) for codec in CODECS}
        sizes = sorted({read_size(pair.target.read_bytes(), extension_of(pair.target)) for pair in pairs})
    rows = make_rows(works, measure(works, options.rounds))
    print_results(rows, options.crop)
    settings = {
        "crop": options.crop,
        "rounds": options.rounds,
        "threads": 1,
        "pairs": len(pairs),
        "fields": list(pairs[0].files),
        "source": sorted({extension_of(path) for pair in pairs for path in pair.files.values()}),
        "smallest_height_width": sizes[0],
        "largest_height_width": sizes[-1],
    }
    report.write(options.json, settings=settings, results=rows)


if __name__ == "__main__":
    run_main(main)
