"""The order of the run: how fast it starts at scale, how well it shuffles, how often it fetches a shard.

    python benchmarks/order.py                  # everything, about a minute on one core
    python benchmarks/order.py --start          # or one section: --start, --shuffle, --fetches

start     Rank 17 of 512 finds its rows of the batch at position 10^9 of a dataset of 10^9 samples in 100,000 uneven
          shards, in a process of its own: seconds, and the peak of resident memory above what the imports took
          (VmHWM of /proc/self/status, so Linux only). Once for the order alone, once with loading the manifest.
shuffle   A dataset of 100 shards of 1000 samples that was never shuffled, in the order of the run. Distance: how far
          apart neighbours of the run lie in the source, divided by the number of samples (1/3 on average for a full
          permutation). Same shard: the chance that neighbours, or two samples of one global batch of 64, come from one
          shard. Means over 3 epochs. webdataset is its own shuffle of shards and of samples, as one process and as 8
          ranks with a share of the shards each, whose rows alternate in the global batch. (`rddm pack` shuffles, so
          that packed datasets are better off than this one whatever the order.)
fetches   How often a whole shard is fetched per epoch, by all ranks together, where a rank keeps a shard from the first
          batch that needs it until 64 batches in a row did not. "node" is the same with one cache for 8 ranks. "open"
          is the most shards that a rank keeps at once. The last two rows are a mixture whose shares are no whole rows
          per batch. Reading ranges instead of whole shards fetches each sample once in every row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from support.process import memory_mb, run_apart
from support.report import Report, make_parser, print_table, run_main, show

from data_pipeline.manifest import Manifest, ShardInfo, ShardTable
from data_pipeline.mixture import WINDOW_BATCHES, Mixture, build_mixture, choose_mixture_lanes
from data_pipeline.order import Order, choose_lanes, rank_rows
from rddm_dist.cli.progress import ProgressBar

SEED = 0
PACKAGES = ("torch", "numpy", "webdataset")

START_SHARDS, START_MEAN = 100_000, 10_000
START_POSITION, START_BATCH, START_RANK, START_WORLD = 10**9, 4096, 17, 512
START_NEXT_BATCHES = 100
START_LIMIT_S = 120.0
BAR_S, BAR_MB = 1.0, 300.0

SHUFFLE_SHARDS, SHUFFLE_COUNT = 100, 1000
SHUFFLE_BATCH, SHUFFLE_BUFFER, SHUFFLE_RANKS, SHUFFLE_EPOCHS = 64, 1000, 8, 3

FETCH_BATCH = 512
FETCH_WORLDS = (8, 64, 512, 6, 48, 384)  # the last three do not divide the lanes
FETCH_DATASETS = ((5120, 128), (2048, 256), (100, 4000))  # shards, mean samples of one
MIX_DATASETS, MIX_WEIGHTS = ((1920, 256), (640, 256)), ((0.75, 0.25), (0.7, 0.3))
MIX_WORLDS = (8, 64)
RANKS_PER_NODE = 8
HOLD_BATCHES = 64

Row = dict[str, Any]


def uneven_counts(num_shards: int, mean: int, seed: int = SEED) -> np.ndarray:
    """(num_shards,) int64 samples per shard, from 3/4 to 5/4 of the mean, which is exact.   num_shards: even"""
    draw = np.random.default_rng(seed)
    half = draw.integers(mean * 3 // 4, mean * 5 // 4 + 1, num_shards // 2)
    return draw.permutation(np.concatenate([half, 2 * mean - half]))


# ---- start ----


def write_manifest(folder: Path) -> None:
    """The manifest of the large dataset; of the dataset nothing else is there."""
    counts = uneven_counts(START_SHARDS, START_MEAN).tolist()
    names = [f"shard-{index:06d}.tar" for index in range(START_SHARDS)]
    columns: dict[str, list[Any]] = {
        "name": names,
        "count": counts,
        "bytes": [count * 100_000 for count in counts],
        "sha256": [hashlib.sha256(name.encode()).hexdigest() for name in names],
        "index_bytes": [500_000] * len(names),
        "index_sha256": [hashlib.sha256(name.encode() + b"idx").hexdigest() for name in names],
        **{f"{end}_{side}": [256] * START_SHARDS for end in ("min", "max") for side in ("width", "height")},
    }
    shards = ShardTable({name: columns[name] for name in ShardInfo._fields})
    Manifest(shards, ("input", "target"), codec="png", source_digest="0" * 64).save(str(folder))


def start_once(folder: Path | None) -> Row:
    """Start as the rank does, in this process.   folder: of the manifest; None: the counts are there already"""
    counts = uneven_counts(START_SHARDS, START_MEAN)
    lanes = choose_lanes(START_SHARDS, START_BATCH)
    before, started = memory_mb("VmRSS"), time.perf_counter()
    if folder is not None:
        counts = Manifest.load(str(folder)).counts
    order = Order(counts, SEED, lanes)
    step = START_POSITION // START_BATCH
    order.locate(rank_rows(step, global_batch=START_BATCH, rank=START_RANK, world_size=START_WORLD))
    first_s, started = time.perf_counter() - started, time.perf_counter()
    for later in range(step + 1, step + 1 + START_NEXT_BATCHES):
        order.locate(rank_rows(later, global_batch=START_BATCH, rank=START_RANK, world_size=START_WORLD))
    return {
        "samples": order.num_samples,
        "lanes": lanes,
        "first_batch_s": first_s,
        "next_batch_ms": 1000.0 * (time.perf_counter() - started) / START_NEXT_BATCHES,
        "peak_mb": memory_mb("VmHWM") - before,
    }


def measure_start() -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="rddm-bench-") as folder:
        write_manifest(Path(folder))
        for what, arguments in (("order alone", ["-"]), ("with the manifest", [folder])):
            done = run_apart(__file__, "--start-once", *arguments, limit_s=START_LIMIT_S)
            row = {"what": what, **done}
            row["within_bar"] = row["first_batch_s"] < BAR_S and row["peak_mb"] < BAR_MB
            rows.append(row)
    return rows


# ---- shuffle ----


def orders_to_compare() -> dict[str, Callable[[int], np.ndarray]]:
    """Name -> function of the epoch that gives the source positions of a run through the dataset, (n,) int64."""
    lanes = choose_lanes(SHUFFLE_SHARDS, SHUFFLE_BATCH)
    return {
        f"ours, {lanes} lanes (chosen)": lambda epoch: _our_run(epoch, lanes),
        "ours, 32 lanes": lambda epoch: _our_run(epoch, 32),
        "ours, 2 lanes": lambda epoch: _our_run(epoch, 2),
        "ours, 1 lane": lambda epoch: _our_run(epoch, 1),
        f"webdataset, buffer {SHUFFLE_BUFFER}": lambda epoch: _webdataset_run(epoch, 1, SHUFFLE_BUFFER),
        f"webdataset, buffer {SHUFFLE_BUFFER}, {SHUFFLE_RANKS} ranks": lambda epoch: _webdataset_run(
            epoch, SHUFFLE_RANKS, SHUFFLE_BUFFER
        ),
        "webdataset, no buffer": lambda epoch: _webdataset_run(epoch, 1, 0),
        "full permutation": lambda epoch: np.random.default_rng(epoch).permutation(SHUFFLE_SHARDS * SHUFFLE_COUNT),
    }


def _our_run(epoch: int, lanes: int) -> np.ndarray:
    total = SHUFFLE_SHARDS * SHUFFLE_COUNT
    order = Order(np.full(SHUFFLE_SHARDS, SHUFFLE_COUNT), SEED, lanes)
    _, shards, offsets = order.locate(np.arange(epoch * total, (epoch + 1) * total))
    return shards * SHUFFLE_COUNT + offsets


def _webdataset_run(epoch: int, ranks: int, buffer: int) -> np.ndarray:
    """Every rank has every ranks-th shard, shuffles these, then its samples; row j of a batch is rank j mod ranks's."""
    from webdataset.filters import shuffle

    def run(rank: int) -> Iterator[int]:
        own = iter(range(rank, SHUFFLE_SHARDS, ranks))
        shards = shuffle(SHUFFLE_SHARDS, seed=1000 * epoch + rank)(own)
        samples = (shard * SHUFFLE_COUNT + offset for shard in shards for offset in range(SHUFFLE_COUNT))
        return iter(shuffle(buffer, seed=1000 * epoch + rank)(samples)) if buffer else samples

    runs = [np.fromiter(run(rank), dtype=np.int64) for rank in range(ranks)]
    shortest = min(len(own) for own in runs)
    return np.stack([own[:shortest] for own in runs], axis=1).ravel()


def judge_shuffle(source: np.ndarray) -> dict[str, float]:
    """How well a run mixes.   source: (n,) int64 position in the source of each sample of the run"""
    distance = np.abs(np.diff(source)) / (SHUFFLE_SHARDS * SHUFFLE_COUNT)
    shards = source // SHUFFLE_COUNT
    num_batches = len(shards) // SHUFFLE_BATCH
    cells = (
        np.arange(num_batches * SHUFFLE_BATCH) // SHUFFLE_BATCH * SHUFFLE_SHARDS + shards[: num_batches * SHUFFLE_BATCH]
    )
    per_shard = np.bincount(cells, minlength=num_batches * SHUFFLE_SHARDS).reshape(num_batches, SHUFFLE_SHARDS)
    pairs = num_batches * SHUFFLE_BATCH * (SHUFFLE_BATCH - 1)
    return {
        "mean_distance": float(distance.mean()),
        "median_distance": float(np.median(distance)),
        "same_shard_neighbours": float((np.diff(shards) == 0).mean()),
        "same_shard_batch": float((per_shard * (per_shard - 1)).sum() / pairs),
        "shards_in_batch": float((per_shard > 0).sum(axis=1).mean()),
    }


def measure_shuffle() -> list[Row]:
    rows, arms = [], orders_to_compare()
    with ProgressBar("shuffle", len(arms), every_s=5.0) as bar:
        for number, (name, run) in enumerate(arms.items(), 1):
            judged = [judge_shuffle(run(epoch)) for epoch in range(SHUFFLE_EPOCHS)]
            rows.append({"order": name, **{key: float(np.mean([one[key] for one in judged])) for key in judged[0]}})
            bar.update(number, name)
    return rows


# ---- fetches ----


def count_fetches(shards: np.ndarray, reader: np.ndarray, batches: np.ndarray) -> tuple[int, int]:
    """Fetches of whole shards, and the most shards that one reader keeps at once.

    shards: (n,) int64 which shard (of which dataset and epoch) each row of the run needs; reader: (n,) int64
    which rank or node needs it; batches: (n,) int64 in which batch.
    """
    num_shards, num_batches = int(shards.max()) + 1, int(batches.max()) + 1
    needs = np.unique((reader * num_shards + shards) * num_batches + batches)
    who, when = np.divmod(needs, num_batches)
    is_first = np.append(True, (np.diff(who) > 0) | (np.diff(when) > HOLD_BATCHES))
    is_last = np.append(is_first[1:], True)
    changes = np.zeros((int(reader.max()) + 1, num_batches + 1), dtype=np.int64)
    np.add.at(changes, (who[is_first] // num_shards, when[is_first]), 1)
    np.add.at(changes, (who[is_last] // num_shards, when[is_last] + 1), -1)
    return int(is_first.sum()), int(np.cumsum(changes, axis=1).max())


def fetch_row(what: str, mixture: Mixture, shards: np.ndarray, world_size: int) -> Row:
    """A line of the table.   shards: (n,) int64, see count_fetches, of the first n rows of the run"""
    positions = np.arange(len(shards))
    batches, rows = np.divmod(positions, FETCH_BATCH)
    ranks, once = rows % world_size, len(np.unique(shards))
    fetches, most_open = count_fetches(shards, ranks, batches)
    return {
        "dataset": what,
        "lanes": [order.lanes for order in mixture.orders],
        "ranks": world_size,
        "divides": all(order.lanes % world_size == 0 for order in mixture.orders),
        "fetches": fetches / once,
        "open": most_open,
        "node": count_fetches(shards, ranks // RANKS_PER_NODE, batches)[0] / once,
    }


def shards_of_run(mixture: Mixture) -> np.ndarray:
    """Which shard of which epoch of which dataset the rows need, to the end of the first dataset's first epoch.

    -> (n,) int64, equal where the three are
    """
    first = mixture.orders[0].num_samples
    window = WINDOW_BATCHES * mixture.global_batch
    total = int(first * window / int(mixture.rows_per_window[0]))
    places = [mixture.locate(np.arange(at, min(at + window, total))) for at in range(0, total, window)]
    dataset, epoch, shard, _ = (np.concatenate(column) for column in zip(*places, strict=True))
    num_shards = max(len(order.counts) for order in mixture.orders)
    return (dataset * (int(epoch.max()) + 1) + epoch) * num_shards + shard


def measure_fetches() -> list[Row]:
    cases: list[tuple[str, list[tuple[int, int]], tuple[float, ...], tuple[int, ...]]] = [
        (f"{shards} shards", [(shards, mean)], (1.0,), FETCH_WORLDS) for shards, mean in FETCH_DATASETS
    ]
    for mix in MIX_WEIGHTS:
        label = " + ".join(f"{weight:g} of {shards}" for weight, (shards, _) in zip(mix, MIX_DATASETS, strict=True))
        cases.append((f"mix {label} shards", list(MIX_DATASETS), mix, MIX_WORLDS))
    rows, done = [], 0
    with ProgressBar("fetches", sum(len(worlds) for *_, worlds in cases), every_s=5.0) as bar:
        for what, datasets, weights, worlds in cases:
            counts = [uneven_counts(shards, mean, SEED + number) for number, (shards, mean) in enumerate(datasets)]
            lanes = choose_mixture_lanes([len(own) for own in counts], weights=weights, global_batch=FETCH_BATCH)
            mixture = build_mixture(counts, weights=weights, seed=SEED, lanes=lanes, global_batch=FETCH_BATCH)
            shards = shards_of_run(mixture)
            for world_size in worlds:
                rows.append(fetch_row(what, mixture, shards, world_size))
                done += 1
                bar.update(done, what)
    return rows


# ---- all ----

SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "start": measure_start,
    "shuffle": measure_shuffle,
    "fetches": measure_fetches,
}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "order")
    for name in SECTIONS:
        parser.add_argument(f"--{name}", action="store_true", help=f"only this section, or those given ({name})")
    parser.add_argument("--start-once", metavar="FOLDER", help=argparse.SUPPRESS)  # the process that --start measures
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.start_once:
        print(json.dumps(start_once(None if options.start_once == "-" else Path(options.start_once))))
        return
    report, results = Report("order", PACKAGES), {}
    for name in [name for name in SECTIONS if getattr(options, name)] or list(SECTIONS):
        results[name] = rows = SECTIONS[name]()
        print_table(list(rows[0]), ([show(value) for value in row.values()] for row in rows))
    settings = {
        "start": {"global_batch": START_BATCH, "rank": START_RANK, "world_size": START_WORLD},
        "shuffle": {"global_batch": SHUFFLE_BATCH, "epochs": SHUFFLE_EPOCHS},
        "fetches": {"global_batch": FETCH_BATCH, "hold_batches": HOLD_BATCHES, "ranks_per_node": RANKS_PER_NODE},
    }
    report.write(options.json, settings=settings, results=results)


if __name__ == "__main__":
    run_main(main)
