"""Where 512 ranks would break first: central things of a run, as the number of ranks grows.

    python benchmarks/scaling.py                # two to three minutes on 2 cores, 1.5 GB of disk
    python benchmarks/scaling.py --dim 16       # a smaller network: half of the time
    python benchmarks/scaling.py --only objects # one section: data, files, objects, group, telling

It is a simulation. One process calls what a run calls, as one rank of 1, 8, 64 and 512, or as all of them one after the
other: no network, no GPU, nobody else on the disk or at the server. A process group without a network (torch's "fake"
one) says which rank it is; what a rank holds of the network follows DeepSpeed's rules, and is compared with DeepSpeed
itself for a few ranks of 512. Counts (files, bytes, requests) are what a real run would have; seconds are those of this
machine with the answers at once, so that on a cluster they are more.

data     manifest of 100,000 shards, order of 10^9 samples, global batch 4096
files    a checkpoint of the two-network model of --dim in a folder, saved by all ranks and read by one
objects  requests to an object store (moto, in this process) for a start, a save and a load
group    sockets of a worker's gloo group, up to 64 of them as threads; what worker 0 gathers for a preview
telling  journal and MLflow (SQLite), stop requests

A tilde marks what is computed from measured parts. "64 to 512": how the figure grows over that range.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import pickle
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
from order import START_BATCH, START_POSITION, START_SHARDS, uneven_counts, write_manifest
from support.process import memory_mb
from support.report import Report, make_parser, print_table, require_positive, run_main
from support.scaling import (
    Extent,
    FileReads,
    Requests,
    Shapes,
    Timeline,
    counting_s3,
    held,
    layout,
    real_layout,
    requests_of,
    save_as_all,
)
from torch import Tensor

from data_pipeline import storage
from data_pipeline.errors import EnvironmentFault
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order, choose_lanes, rank_rows
from rddm_dist.cli.progress import ProgressBar
from rddm_dist.config import Config, DataSection, RunSection, TrackingSection, TrainSection
from rddm_dist.log import quiet_frameworks
from rddm_dist.model.net import build_net
from rddm_dist.tracking.journal import Journal
from rddm_dist.tracking.mlflow_tracker import MlflowTracker, default_uri
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.folder import JOURNAL_FILE, RunFolder
from rddm_dist.training.fragments import Fragments
from rddm_dist.training.ownership import BEAT_S, take
from rddm_dist.training.plan import make_plan
from rddm_dist.training.prepare import look_again, prepare, write_identity
from rddm_dist.training.stopping import POLL_S, REMOTE_POLL_S

WORLDS = (1, 8, 64, 512)
LARGEST = WORLDS[-1]
PACKAGES = ("torch", "deepspeed", "mlflow", "moto", "s3fs")
DIM_MULTS = (1, 2, 4, 8)
CHECKED_DIM, CHECKED_RANKS = 8, (0, 300, LARGEST - 1)
READER_SHARDS, READER_SAMPLES = (START_SHARDS, 1000, 100), 100
NEXT_BATCHES = 20
PLANNED_BATCH = 600  # rows, which 512 ranks do not divide
TINY: Shapes = {"a": (2 * LARGEST,)}  # for what does not depend on the size of the network
SOCKET_WORLDS = (8, 64)
POINTS, POINTS_EACH = 2000, 8
LOOKS = 2000
BUCKET = "scaling"
MB, GB = 10**6, 10**9
FEW, MUCH = 1.5, 10.0  # times as much from 64 to 512 that is called constant, or more than linear


@dataclass
class Row:
    """A line of the table. values: for 1, 8, 64 and 512 ranks, nan where there is none; computed: which of the ranks
    have a figure that was not measured as a whole."""

    section: str
    what: str
    unit: str
    values: list[float]
    computed: list[int] = field(default_factory=list)

    @property
    def growth(self) -> str:
        before, after = self.values[-2:]
        if math.isnan(before) or math.isnan(after):
            return ""
        if max(before, after) == 0 or before == after:
            return "constant"
        ratio = after / before if before else math.inf
        if ratio < 1 / FEW:
            return "falls"
        if ratio < FEW:
            return "constant"
        return f"x {ratio:.0f}" + (", more than linear" if ratio > MUCH else "")

    def cells(self) -> list[str]:
        shown = [
            "" if math.isnan(value) else ("~" if world in self.computed else "") + show_figure(value)
            for world, value in zip(WORLDS, self.values, strict=True)
        ]
        return [self.what, self.unit, *shown, self.growth]


def show_figure(value: float) -> str:
    """Three digits, and thousands apart."""
    if value == int(value) or abs(value) >= 100:
        return f"{round(value):,}"
    return f"{value:.3g}"


def for_all(section: str, what: str, unit: str, measure: Callable[[int], float]) -> Row:
    """A line whose figure is measured at each number of ranks."""
    return Row(section, what, unit, [measure(world) for world in WORLDS])


def totals(row: Row, what: str, unit: str, factor: float = 1.0) -> Row:
    """The line of what all ranks do together, where `row` is what each does."""
    values = [value * world * factor for world, value in zip(WORLDS, row.values, strict=True)]
    return Row(row.section, what, unit, values, list(WORLDS[1:]))


def network_shapes(dim: int) -> Shapes:
    """Parameters of the published pair of networks."""
    return {name: tuple(p.shape) for name, p in build_net(dim=dim, dim_mults=DIM_MULTS).named_parameters()}


# -- data --------------------------------------------------------------------------------------------------------------


def measure_data(options: argparse.Namespace) -> Iterable[Row]:
    folder = options.folder / "data"
    folder.mkdir()
    write_manifest(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())

    def load(world: int) -> float:
        started = perf_counter()
        Manifest.load(str(folder))
        return perf_counter() - started

    yield for_all("data", "load the manifest, each rank", "s", load)
    yield totals(Row("data", "", "", [size] * len(WORLDS)), "the same, read from one file by all", "MB", 1 / MB)
    counts = Manifest.load(str(folder)).counts

    def find_rows(world: int) -> float:
        order, step = Order(counts, 0, choose_lanes(START_SHARDS, START_BATCH)), START_POSITION // START_BATCH
        times = []
        for later in range(step, step + NEXT_BATCHES):
            started = perf_counter()
            order.locate(rank_rows(later, global_batch=START_BATCH, rank=world - 1, world_size=world))
            times.append(perf_counter() - started)
        return 1000 * statistics.median(times)

    yield for_all("data", "find the own rows of a batch, each rank", "ms", find_rows)
    for num_shards in READER_SHARDS:
        most = [most_readers(num_shards, world) for world in WORLDS]
        yield Row("data", f"ranks that read one shard, of {num_shards:,}", "ranks", most)
    plans = [make_plan(global_batch=PLANNED_BATCH, world_size=world, micro_batch=0) for world in WORLDS]
    shares = [100 * plan.wasted_rows / (plan.rows_per_rank * plan.world_size) for plan in plans]
    yield Row("data", f"filler rows, global batch {PLANNED_BATCH}", "%", shares)


def most_readers(num_shards: int, world_size: int) -> int:
    """The most ranks that need samples of one shard in an epoch, in the first two shards of every lane."""
    lanes = choose_lanes(num_shards, START_BATCH)
    order = Order(uneven_counts(num_shards, READER_SAMPLES), 0, lanes)
    positions = np.arange(min(2 * READER_SAMPLES * lanes, order.num_samples))
    _, shards, _ = order.locate(positions)
    ranks = positions % START_BATCH % world_size
    needs = np.unique(shards * world_size + ranks)
    return int(np.bincount(needs // world_size).max())


# -- checkpoints in a folder -------------------------------------------------------------------------------------------


def measure_files(options: argparse.Namespace) -> Iterable[Row]:
    check_layout()
    folder = options.folder / "files"
    shapes = network_shapes(options.dim)
    weights = {name: torch.randn(torch.Size(shape).numel()) for name, shape in shapes.items()}
    small = network_shapes(CHECKED_DIM)
    yield from commit_rows(folder / "small", {name: torch.zeros(math.prod(s)) for name, s in small.items()}, small)
    for stage in (2, 3):
        yield from reading_rows(folder / f"stage-{stage}", weights, shapes, stage=stage)


def check_layout() -> None:
    """Raise EnvironmentFault where DeepSpeed cuts a network in another way than the ranks of this script."""
    for stage in (2, 3):
        for rank in CHECKED_RANKS:
            net = build_net(dim=CHECKED_DIM, dim_mults=DIM_MULTS)
            shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
            expected = layout(shapes, stage=stage, rank=rank, world_size=LARGEST)
            if real_layout(net, stage=stage, rank=rank, world_size=LARGEST) != expected:
                raise EnvironmentFault(f"DeepSpeed cuts stage {stage} in another way; mend `layout` of this benchmark")
            gc.collect()
            gc.freeze()  # DeepSpeed collects garbage at stage 3, among all that was ever imported


def commit_rows(folder: Path, weights: dict[str, Tensor], shapes: Shapes) -> Iterable[Row]:
    """What rank 0 does alone, once its own file is written."""
    receipts, commits, sizes, removals, files = [], [], [], [], []
    for world in WORLDS:
        timeline = Timeline(perf_counter)
        uri = save_as_all(str(folder), weights, shapes, stage=2, world_size=world, timeline=timeline)
        receipts.append(timeline.gathered - timeline.written)
        commits.append(timeline.committed - timeline.gathered)
        sizes.append((Path(uri) / ckpt.COMMIT).stat().st_size / 1000)
        files.append(float(len(os.listdir(uri))))
        started = perf_counter()
        ckpt.remove(uri)
        removals.append(perf_counter() - started)
    yield Row("files", "files of a checkpoint", "files", files)
    yield Row("files", "read all receipts, rank 0", "s", receipts)
    yield Row("files", "write COMMIT.json, rank 0", "s", commits)
    yield Row("files", "its size", "kB", sizes)
    yield Row("files", "remove an old checkpoint, rank 0", "s", removals)


@dataclass
class Loading:
    """What one rank does to go on from a checkpoint."""

    files: int
    index_bytes: int
    index_s: float
    index_mb: float
    tensor_bytes: int
    own_bytes: int


def load_as(checkpoint: ckpt.Checkpoint, extents: list[Extent], reads: FileReads, *, readers: int) -> Loading:
    """As one of `readers` ranks: it reads its share of the index, and is sent those of the others."""
    others = [pickle.dumps(checkpoint.read_index(share=(rank, readers))) for rank in range(1, readers)]
    gc.collect()
    before, started = memory_mb("VmRSS"), perf_counter()
    reads.start()
    share = checkpoint.read_index(share=(0, readers))
    opened, index_bytes = reads.stop()
    index = {uri: entries for each in [share, *map(pickle.loads, others)] for uri, entries in each.items()}
    fragments = Fragments(index)
    index_s = perf_counter() - started
    index_mb = memory_mb("VmRSS") - before
    wanted = requests_of(extents)
    reads.start()
    fragments.fill(wanted)
    return Loading(
        opened, index_bytes, index_s, max(index_mb, 0.0), reads.stop()[1], sum(4 * r.target.numel() for r in wanted)
    )


def reading_rows(folder: Path, weights: dict[str, Tensor], shapes: Shapes, *, stage: int) -> Iterable[Row]:
    """A middle rank goes on at the stage and size that it was saved at; and of 512 ranks, at others."""
    reads, same, resized, other, shares = FileReads(folder), [], [], [], []
    for world in WORLDS:
        uri = save_as_all(str(folder), weights, shapes, stage=stage, world_size=world, timeline=Timeline(perf_counter))
        checkpoint = ckpt.read_commit(uri)
        same.append(load_as(checkpoint, middle_layout(shapes, stage, world), reads, readers=world))
        shares.append(busiest_share(checkpoint, world))
        if world == LARGEST:
            resized, other = (
                [load_as(checkpoint, middle_layout(shapes, to, each), reads, readers=each) for each in WORLDS]
                for to in (stage, 5 - stage)
            )
        shutil.rmtree(folder)
    at = f"ZeRO {stage}"
    yield Row("files", f"{at}: files a rank opens to load", "files", [float(each.files) for each in same])
    index = Row("files", f"{at}: index a rank reads", "MB", [each.index_bytes / MB for each in same])
    yield index
    yield totals(index, f"{at}: index that all read", "GB", MB / GB)
    yield Row("files", f"{at}: time for the index, each rank", "s", [each.index_s for each in same])
    yield Row("files", f"{at}: memory for the index, each rank", "MB", [each.index_mb for each in same])
    yield Row("files", f"{at}: read / needed, same ranks", "", [each.tensor_bytes / each.own_bytes for each in same])
    ratios = [each.tensor_bytes / each.own_bytes for each in resized]
    yield Row("files", f"{at}: read / needed, saved by 512", "", ratios)
    ratios = [each.tensor_bytes / each.own_bytes for each in other]
    yield Row("files", f"{at}: read / needed, saved by 512, to ZeRO {5 - stage}", "", ratios)
    if stage == 2:
        yield Row("files", "verify: bytes of the busiest rank / mean", "", shares)


def middle_layout(shapes: Shapes, stage: int, world_size: int) -> list[Extent]:
    return layout(shapes, stage=stage, rank=world_size // 2, world_size=world_size)


def busiest_share(checkpoint: ckpt.Checkpoint, world_size: int) -> float:
    """How uneven `verify` is shared: the files of each rank as find_newest_together hands them out."""
    sizes = sorted((size for size, _ in checkpoint.files.values()), reverse=True)
    shares = [sum(sizes[rank::world_size]) for rank in range(world_size)]
    return max(shares) / (sum(shares) / world_size)


# -- object storage ----------------------------------------------------------------------------------------------------


def measure_objects(options: argparse.Namespace) -> Iterable[Row]:
    with counting_s3(BUCKET) as requests:
        yield from start_rows(requests)
        yield from object_rows(requests)
        home = f"s3://{BUCKET}/owned"
        with take(home) as owner:
            requests.take()
            owner.check()
            beat = requests.take() + 1  # the look, then one write
        yield Row("objects", f"a sign of life of the owner, every {BEAT_S:g} s", "requests", [float(beat)] * 4)
        storage.exists(f"{home}/stop-request")
        look = float(requests.take())
        yield Row("objects", f"look for a stop request, rank 0, every {REMOTE_POLL_S:g} s", "requests", [look] * 4)


def start_rows(requests: Requests) -> Iterable[Row]:
    """What each rank asks for before the network is made."""
    data, runs = f"s3://{BUCKET}/data", f"s3://{BUCKET}/runs"
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder))
        manifest = Manifest.load(folder)
    manifest.save(data)
    first, again = [], []
    for world in WORLDS:
        config = Config(
            run=RunSection(name=f"of-{world}", storage=runs),
            data=DataSection(uri=data),
            train=TrainSection(global_batch=START_BATCH),
            tracking=TrackingSection(backend="none"),
        )
        requests.take()
        prepared = look_again(prepare(config, world_size=world))
        first.append(float(requests.take()))
        prepared.run_dir.mkdir(parents=True, exist_ok=True)
        write_identity(prepared)
        requests.take()
        look_again(prepare(config, world_size=world))
        again.append(float(requests.take()))
        shutil.rmtree(prepared.run_dir)
    yield Row("objects", "start a new run, each rank", "requests", first)
    row = Row("objects", "start a continued run, each rank", "requests", again)
    yield row
    yield totals(row, "the same, all ranks", "requests")


def object_rows(requests: Requests) -> Iterable[Row]:
    """Requests for a save and a load; the tensors do not matter."""
    weights = {name: torch.zeros(math.prod(shape)) for name, shape in TINY.items()}
    commits, indexes, removals, searches = [], [], [], []
    for world in WORLDS:
        folder = f"s3://{BUCKET}/checkpoints-{world}"
        timeline = Timeline(lambda: float(requests.counts.total()))
        requests.take()
        uri = save_as_all(folder, weights, TINY, stage=2, world_size=world, timeline=timeline)
        commits.append(timeline.committed - timeline.written - 1)  # the last one before is rank 0's receipt
        requests.take()
        found = next(ckpt.iter_committed(folder, lambda problem: None))
        searches.append(float(requests.take()))
        found.read_index(share=(0, world))
        indexes.append(float(requests.take()))
        ckpt.remove(uri)
        removals.append(float(requests.take()))
    yield Row("objects", "find the newest checkpoint, rank 0", "requests", searches)
    row = Row("objects", "index of a checkpoint, each rank", "requests", indexes)
    yield row
    yield totals(row, "the same, all ranks", "requests")
    yield Row("objects", "receipts and COMMIT.json, rank 0, one by one", "requests", commits)
    yield Row("objects", "remove an old checkpoint, rank 0, one by one", "requests", removals)


# -- the group ---------------------------------------------------------------------------------------------------------


def measure_group(options: argparse.Namespace) -> Iterable[Row]:
    measured = {world: sockets_of_a_group(world) for world in SOCKET_WORLDS}
    beyond = measured[64] - 64
    values = [math.nan, *measured.values(), LARGEST + beyond]
    yield Row("group", "descriptors of a gloo group, each rank", "files", values, [LARGEST])
    hops = [2.0 * (world - 1) for world in WORLDS]
    yield Row("group", "hops of the step's collective (gloo's ring)", "hops", hops, list(WORLDS))
    shapes = network_shapes(options.dim)
    weights = {name: torch.zeros(math.prod(shape)) for name, shape in shapes.items()}
    sizes = []
    for world in WORLDS:
        pieces, _ = held(weights, layout(shapes, stage=2, rank=0, world_size=world))
        sent = pickle.dumps([(piece.name, piece.start, piece.weight.clone()) for piece in pieces])
        sizes.append(world * len(sent) / GB)
    yield Row("group", "gathered by rank 0 for a preview or export, ZeRO 2", "GB", sizes, list(WORLDS[1:]))


def sockets_of_a_group(world_size: int) -> float:
    """Open files of a member of a gloo group: its members are threads, which connect to each other as workers do."""
    before = len(os.listdir("/proc/self/fd"))
    store, groups = dist.HashStore(), []

    def join(rank: int) -> None:
        groups.append(dist.ProcessGroupGloo(store, rank, world_size, timedelta(seconds=60)))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(groups) != world_size:
        raise EnvironmentFault(f"{world_size} threads do not make a gloo group; raise the limit of `ulimit -n`")
    return (len(os.listdir("/proc/self/fd")) - before) / world_size


# -- telling -----------------------------------------------------------------------------------------------------------


def measure_telling(options: argparse.Namespace) -> Iterable[Row]:
    folder = options.folder / "telling"
    folder.mkdir()
    journal, started = Journal(folder / JOURNAL_FILE), perf_counter()
    for step in range(POINTS):
        metrics = {f"train/value-{number}": 0.1 * number for number in range(POINTS_EACH)}
        journal.append({"time": time.time(), "event": "metrics", "step": step + 1, "metrics": metrics})
    points = POINTS * POINTS_EACH / (perf_counter() - started)
    journal.close()
    yield Row("telling", "journal, rank 0", "points/s", [points] * 4)
    tracker = MlflowTracker(folder, uri=default_uri(folder), experiment="scaling", run_name="scaling")
    started = perf_counter()
    tracker.start(params={}, tags={}, journal=folder / JOURNAL_FILE)
    opened = perf_counter()
    if not tracker.close(deadline_s=60.0):
        raise EnvironmentFault(f"MLflow did not take {POINTS * POINTS_EACH} points in a minute; is the disk busy?")
    forwarded = POINTS * POINTS_EACH / (perf_counter() - opened)
    yield Row("telling", "start of MLflow's run, rank 0", "s", [opened - started] * 4)
    yield Row("telling", "forwarding to MLflow, rank 0", "points/s", [forwarded] * 4)
    yield Row("telling", "look for a stop request in a folder, each rank", "us", [time_look(folder)] * 4)
    looks = [world / POLL_S for world in WORLDS]
    yield Row("telling", "such looks in a shared folder, all ranks", "1/s", looks, list(WORLDS))


def time_look(folder: Path) -> float:
    """Microseconds of a look at a local disk."""
    run = RunFolder(str(folder), folder)
    started = perf_counter()
    for _ in range(LOOKS):
        run.exists("stop-request")
    return 1e6 * (perf_counter() - started) / LOOKS


# -- all ---------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[argparse.Namespace], Iterable[Row]]] = {
    "data": measure_data,
    "files": measure_files,
    "objects": measure_objects,
    "group": measure_group,
    "telling": measure_telling,
}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "scaling")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--dim", type=int, default=64, help="width of the two U-Nets (64)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (the folder of temporary files)")
    options = parser.parse_args()
    require_positive(parser, options, ("dim",))
    return options


def main() -> None:
    options = parse_arguments()
    quiet_frameworks()
    report, rows = Report("scaling", PACKAGES), []
    names = [options.only] if options.only else list(SECTIONS)
    with tempfile.TemporaryDirectory(prefix="rddm-bench-", dir=options.folder) as scratch:
        options.folder = Path(scratch)
        with ProgressBar("scaling", len(names), every_s=5.0) as bar:
            for number, name in enumerate(names):
                bar.update(number, name)
                rows += SECTIONS[name](options)
            bar.update(len(names))
    print_table(("what", "unit", *map(str, WORLDS), "64 to 512"), (row.cells() for row in rows))
    results = [{**asdict(row), "growth": row.growth} for row in rows]
    report.write(options.json, settings={"worlds": WORLDS, "dim": options.dim}, results=results)


if __name__ == "__main__":
    run_main(main)
