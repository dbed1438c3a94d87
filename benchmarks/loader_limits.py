"""Limits of the training loader: how soon the first batch comes, and whether memory stays flat.

    python benchmarks/loader_limits.py             # both, about a minute and a half
    python benchmarks/loader_limits.py --start     # or one: --start, --memory

start     Seconds from opening the dataset to its first batch, in a process of its own, after imports, files in the page
          cache. Local datasets of 100 and 10,000 samples from their beginning, and rank 17 of 64 in the middle of a run
          on 10^9 samples in 100,000 shards. Of these only the shards of the first batches exist: one tar under several
          names, whose index names its one pair 10,000 times.
memory    Resident memory (VmRSS) of a process after so many samples of a local dataset of 4096 samples in about 200
          shards, and the slope of the line through what was read every 1000 samples from the 5000th on.

Images are pairs of 256-pixel JPEGs, windows are of 128 pixels. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.images import find_photos, repeat_pairs, write_pairs
from support.process import memory_mb, run_apart
from support.report import Report, make_parser, print_table, run_main, show

from data_pipeline.index import encode_index
from data_pipeline.loader import Pace, Share, TrainLoader, build_train_loader
from data_pipeline.manifest import Manifest, ShardTable
from data_pipeline.order import Order, choose_lanes, rank_rows
from data_pipeline.pack import pack
from data_pipeline.reader import Dataset
from data_pipeline.rows import RowSettings
from data_pipeline.sources import Pair

SEED = 0
SIZE, CROP, DISTINCT = 256, 128, 64
PROCESS_LIMIT_S = 300.0
PACKAGES = ("torch", "numpy", "pillow", "simplejpeg")

START_BAR_S = 2.0
SMALL_COUNTS, SMALL_BATCH = (100, 10_000), 8
LARGE_SHARDS, LARGE_COUNT = 100_000, 10_000
LARGE_BATCH, LARGE_RANK, LARGE_WORLD = 512, 17, 64
LARGE_STEP = LARGE_SHARDS * LARGE_COUNT // 2 // LARGE_BATCH
LARGE_STEPS = 32  # batches whose shards exist: more than are read ahead

MEMORY_BAR_MB = 20.0
MEMORY_COUNT, MEMORY_SHARD_MB, MEMORY_BATCH = 4096, 1.5, 8
MEMORY_EVERY, MEMORY_SHOWN = 1000, (1000, 5000, 10_000, 25_000, 50_000)
MEMORY_FROM = 5000

Row = dict[str, Any]


def load(dataset: Dataset, *, global_batch: int, share: Share, start_step: int) -> TrainLoader:
    lanes = choose_lanes(len(dataset.manifest.shards), global_batch)
    return build_train_loader(
        [dataset],
        RowSettings(crop={0: CROP}),
        seed=SEED,
        global_batch=global_batch,
        lanes=[lanes],
        share=share,
        start_step=start_step,
        pace=Pace(threads=os.cpu_count() or 1),
    )


# ---- start ----


def write_large(folder: Path, pairs: Sequence[Pair]) -> None:
    """A dataset of LARGE_SHARDS shards of which only those of the measured rank's first batches exist."""
    small = pack(pairs[:1], str(folder / "one"), seed=SEED).manifest
    (shard,) = small.shards
    (entry,) = Dataset(str(folder / "one")).index(0)
    index = encode_index([entry._replace(key=f"{number:08d}") for number in range(LARGE_COUNT)])
    digest = hashlib.sha256(index).hexdigest()
    repeated = shard._replace(count=LARGE_COUNT, index_bytes=len(index), index_sha256=digest)
    columns = {name: [value] * LARGE_SHARDS for name, value in repeated._asdict().items()}
    columns["name"] = [f"shard-{number:06d}.tar" for number in range(LARGE_SHARDS)]
    manifest = Manifest(ShardTable(columns), small.fields, codec=small.codec, source_digest=small.source_digest)
    large = folder / "large"
    large.mkdir()
    manifest.save(str(large))
    order = Order(manifest.counts, SEED, choose_lanes(LARGE_SHARDS, LARGE_BATCH))
    steps = range(LARGE_STEP, LARGE_STEP + LARGE_STEPS)
    own = [rank_rows(step, global_batch=LARGE_BATCH, rank=LARGE_RANK, world_size=LARGE_WORLD) for step in steps]
    for shard_index in np.unique(order.locate(np.concatenate(own))[1]).tolist():
        needed = manifest.shards[shard_index]
        (large / needed.name).hardlink_to(folder / "one" / shard.name)
        (large / needed.index_name).write_bytes(index)


def start_once(folder: str) -> Row:
    """Open the dataset and wait for its first batch, in this process."""
    started = time.perf_counter()
    dataset = Dataset(folder)
    opened = time.perf_counter()
    if dataset.manifest.num_samples < LARGE_SHARDS:
        batch, share, step = SMALL_BATCH, Share(0, 1, SMALL_BATCH), 0
    else:
        batch, share, step = LARGE_BATCH, Share(LARGE_RANK, LARGE_WORLD, LARGE_BATCH // LARGE_WORLD), LARGE_STEP
    with load(dataset, global_batch=batch, share=share, start_step=step) as loader:
        next(loader)
        first = time.perf_counter()
    return {
        "samples": dataset.manifest.num_samples,
        "shards": len(dataset.manifest.shards),
        "open_s": opened - started,
        "first_batch_s": first - opened,
        "both_s": first - started,
        "within_bar": first - started < START_BAR_S,
    }


def measure_start(folder: Path, pairs: Sequence[Pair]) -> list[Row]:
    folders = []
    for count in SMALL_COUNTS:
        folders.append(str(folder / f"small-{count}"))
        pack(repeat_pairs(pairs, count), folders[-1], seed=SEED)
    write_large(folder, pairs)
    folders.append(str(folder / "large"))
    return [run_apart(__file__, "--start-once", path, limit_s=PROCESS_LIMIT_S) for path in folders]


# ---- memory ----


def memory_once(folder: str) -> list[list[float]]:
    """[samples so far, resident 10^6 bytes] every MEMORY_EVERY samples of a run, in this process."""
    points = []
    share = Share(0, 1, MEMORY_BATCH)
    with load(Dataset(folder), global_batch=MEMORY_BATCH, share=share, start_step=0) as loader:
        for number, _ in enumerate(loader, 1):
            samples = number * MEMORY_BATCH
            if samples % MEMORY_EVERY == 0:
                points.append([samples, memory_mb("VmRSS")])
            if samples >= MEMORY_SHOWN[-1]:
                return points
    raise AssertionError("the loader has no end")


def measure_memory(folder: Path, pairs: Sequence[Pair]) -> list[Row]:
    data = str(folder / "memory")
    manifest = pack(repeat_pairs(pairs, MEMORY_COUNT), data, shard_mb=MEMORY_SHARD_MB, seed=SEED).manifest
    points = np.array(run_apart(__file__, "--memory-once", data, limit_s=PROCESS_LIMIT_S))
    samples, resident = points.T
    late = samples >= MEMORY_FROM
    slope = float(np.polyfit(samples[late], resident[late], 1)[0])
    growth = float(resident[-1] - resident[samples == MEMORY_FROM][0])
    shown = {f"MB at {count}": float(resident[samples == count][0]) for count in MEMORY_SHOWN}
    return [
        {
            "shards": len(manifest.shards),
            **shown,
            "MB per 10000": 10_000 * slope,
            f"growth from {MEMORY_FROM}": growth,
            "within_bar": growth < MEMORY_BAR_MB,
        }
    ]


# ---- all ----

SECTIONS = {"start": measure_start, "memory": measure_memory}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "loader_limits")
    for name in SECTIONS:
        parser.add_argument(f"--{name}", action="store_true", help=f"only this section ({name})")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="folder of pictures to cut the images from")
    for name in SECTIONS:  # the processes that are measured
        parser.add_argument(f"--{name}-once", metavar="FOLDER", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    if options.start_once or options.memory_once:
        print(json.dumps(start_once(options.start_once) if options.start_once else memory_once(options.memory_once)))
        return
    report = Report("loader_limits", PACKAGES)
    results = {}
    with tempfile.TemporaryDirectory(prefix="rddm-bench-") as temporary:
        root = Path(temporary)
        photos = find_photos(options.photos, root / "photos")
        print(f"making images: {photos.what}", flush=True)
        pairs = write_pairs(root / "images", photos, extension="jpg", size=(SIZE, SIZE), count=DISTINCT)
        for name in [name for name in SECTIONS if getattr(options, name)] or list(SECTIONS):
            results[name] = rows = SECTIONS[name](root, pairs)
            print_table(list(rows[0]), ([show(value) for value in row.values()] for row in rows))
    settings = {"image_px": SIZE, "crop": CROP, "threads": os.cpu_count(), "source": photos.what, "distinct": DISTINCT}
    bars = {"first_batch_s": START_BAR_S, "growth_mb": MEMORY_BAR_MB}
    report.write(options.json, settings={**settings, "bars": bars}, results=results)


if __name__ == "__main__":
    run_main(main)
