"""Checkpoints of the dim 64 two-network model: what a save costs the run, and how fast it is read back.

    python benchmarks/checkpoint.py             # six minutes on 2 cores, 5 GB of disk
    python benchmarks/checkpoint.py --quick --json quick.json     # a look whether it works; few repeats
    python benchmarks/checkpoint.py --folder /mnt/disk            # on another disk than that of temporary files

Two CPU workers at ZeRO stage 2 in fp32 save in three ways, interleaved, in an order that turns from round to round:

    rddm        `Snapshot.take`, then files, sha256, fsync and COMMIT.json by the writing thread
    torch.save  the same tensors, one file a rank
    deepspeed   its `save_checkpoint`: no EMA, but the weights twice, which makes as many bytes

`stall` is what a training loop waits for: our copy to host memory, the others' whole call. `durable` is until the bytes
are on the disk; the others are followed by an fsync of their files, which is not counted as stall. Seconds are those of
the slower worker.

Then the same workers train (counted noise, one row each) and save now and then as a run does, the writing thread on the
same cores. The extra of a save is the sum over the steps with a save in flight of step minus the median of all steps
without; `by chance` is the same sum over as many neighbouring steps without a save. Processor time is that of worker 0
with all its threads: about what a step lasts where nothing else runs, and hardly disturbed by what does.
Files are read back from the page cache. Tables have medians (least-most); ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import torch
from support.report import (
    Report,
    make_parser,
    print_noise,
    print_table,
    require_positive,
    run_main,
    show_summary,
    summarize,
)
from support.trainee import BATCH, STAGE, Trainee, build
from support.workers import run_group

from data_pipeline.errors import EnvironmentFault
from rddm_dist import comm
from rddm_dist.cli.progress import ProgressBar
from rddm_dist.comm import topology_from_env
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.saving import Series
from rddm_dist.training.step import Word

WORLD, OTHER_WORLD = 2, 1
WARMUP = 3  # steps before anything is measured
OURS, TORCH, DEEPSPEED = "rddm", "torch.save", "deepspeed"
ARMS = (OURS, TORCH, DEEPSPEED)
QUICK = {"rounds": 2, "loads": 1, "interval": 15, "saves": 2}
FULL = {"rounds": 10, "loads": 3, "interval": 60, "saves": 3}
LIMIT_S = 900.0


def slowest(seconds: float) -> float:
    """The most of all workers, on each of them."""
    return comm.broadcast_object(max(comm.gather_object(seconds) or [0.0]))


def timed(action: Callable[[], Any]) -> float:
    """Seconds of the slowest worker; all begin together."""
    comm.meet()
    started = perf_counter()
    action()
    return slowest(perf_counter() - started)


# -- three ways to save ------------------------------------------------------------------------------------------------


def save_ours(trainee: Trainee, number: int) -> dict[str, float]:
    """The first copy allocates, so it is timed apart; `start` copies again into the same memory."""
    snapshot = trainee.snapshot()
    first_take = timed(snapshot.take)
    saver = trainee.make_saver()
    comm.meet()
    started = perf_counter()
    saver.start(trainee.progress(number), [Series(trainee.checkpoints, snapshot)])
    stalled = perf_counter()
    saver.finish()
    ended = perf_counter()
    uri = ckpt.step_folder(trainee.checkpoints, number)
    verify = timed(lambda: ckpt.verify(ckpt.read_commit(uri)) if trainee.topology.rank == 0 else None)
    if trainee.topology.rank == 0:
        trainee.prune(number)
    comm.meet()
    return {
        "first_take": first_take,
        "stall": slowest(stalled - started),
        "durable": slowest(ended - started),
        "verify": verify,
        "bytes": size_of(Path(uri)),
    }


def save_torch(trainee: Trainee, number: int) -> dict[str, float]:
    folder = trainee.folder / f"torch-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    state = {str(key): tensor for key, tensor in ckpt.sources(trainee.engine.pieces, trainee.ema)}
    return save_peer(folder, lambda: torch.save(state, folder / f"rank-{trainee.topology.rank}.pt"))


def save_deepspeed(trainee: Trainee, number: int) -> dict[str, float]:
    folder = trainee.folder / f"deepspeed-{number}"
    return save_peer(folder, lambda: trainee.engine.net.save_checkpoint(str(folder), tag="step"))


def save_peer(folder: Path, call: Callable[[], Any]) -> dict[str, float]:
    """A call that returns when the state is written, then fsync, each worker its share of the files."""
    comm.meet()
    started = perf_counter()
    call()
    stalled = perf_counter()
    comm.meet()
    for path in files_in(folder)[comm.rank() :: comm.world_size()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    ended = perf_counter()
    num_bytes = size_of(folder)  # before rank 0 learns of this worker's seconds and removes the files
    cost = {"stall": slowest(stalled - started), "durable": slowest(ended - started), "bytes": num_bytes}
    if comm.rank() == 0:
        shutil.rmtree(folder)
    comm.meet()
    return cost


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_in(folder))


def measure_rounds(trainee: Trainee, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Arm -> one cost for each round; a round before them warms up."""
    saves = {OURS: save_ours, TORCH: save_torch, DEEPSPEED: save_deepspeed}
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for number in range(rounds + 1):
        turn = number % len(ARMS)
        for name in ARMS[turn:] + ARMS[:turn]:
            cost = saves[name](trainee, number)
            if number:
                costs[name].append(cost)
    return costs


# -- reading back, and the step loop -----------------------------------------------------------------------------------


def measure_loads(trainee: Trainee, repeats: int) -> list[float]:
    """Seconds to find the newest checkpoint, verify and load it, as a start of a run does."""

    def load() -> None:
        found, skipped = ckpt.find_newest_together(trainee.checkpoints)
        if found is None or skipped:
            raise EnvironmentFault(f"{trainee.folder} does not hold the checkpoint that was saved there")
        ckpt.load_checkpoint(found, trainee.engine, trainee.ema)

    return [timed(load) for _ in range(repeats)]


def measure_loop(trainee: Trainee, *, interval: int, saves: int) -> dict[str, Any]:
    """Train and save once in each interval (seconds).   -> seconds of the steps, and which save each had in flight"""
    warmup = statistics.median(timed(lambda: trainee.train_step(Word())) for _ in range(WARMUP))
    every = max(6, round(interval / warmup))
    saver, series = trainee.make_saver(), Series(trainee.checkpoints, trainee.snapshot(), after=trainee.prune)
    trainee.saved.clear()
    steps, begun, in_flight = [], 0, False
    comm.meet()
    for number in range(every * saves):
        started, cpu_started = perf_counter(), time.process_time()
        _, is_committed = saver.report()
        has_committed = trainee.train_step(Word(has_committed=is_committed))
        is_saving = in_flight
        if has_committed:
            saver.finish()
            in_flight = False
        if number % every == every // 2:
            saver.start(trainee.progress(trainee.step), [series])
            begun, in_flight = begun + 1, True
        seconds, cpu_s = perf_counter() - started, time.process_time() - cpu_started
        steps.append({"seconds": seconds, "cpu_s": cpu_s, "save": begun if is_saving or in_flight else 0})
    saver.finish()
    saved = [{"stall_s": each.stall_s, "seconds": each.seconds, "bytes": each.num_bytes} for each in trainee.saved]
    return {"steps": steps, "every": every, "saved": saved}


def judge(steps: list[dict[str, float]], key: str) -> dict[str, Any]:
    """What the saves cost in seconds of one kind.   steps: of measure_loop"""
    quiet = [step[key] for step in steps if not step["save"]]
    if not quiet:
        raise EnvironmentFault("every step had a save in flight, there is nothing to compare; raise --interval")
    median = statistics.median(quiet)
    busy: dict[float, list[float]] = {}
    for step in steps:
        if step["save"]:
            busy.setdefault(step["save"], []).append(step[key])
    extra = [sum(seconds) - median * len(seconds) for seconds in busy.values()]
    width = min(len(quiet), max(map(len, busy.values())))
    chance = [sum(quiet[i : i + width]) - median * width for i in range(len(quiet) - width + 1)]
    return {
        "quiet_step": summarize(quiet),
        "num_quiet": len(quiet),
        "busy_steps": list(busy.values()),
        "extra_s": extra,
        "extra_steps": [each / median for each in extra],
        "chance_s": summarize(chance),
        "chance_steps": width,
        "is_met": statistics.median(extra) < median,
    }


# -- workers and tables ------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> NoReturn:
    """What a worker does. The group of the other size only reads."""
    topology = topology_from_env()
    torch.set_num_threads(1)
    comm.initialize(topology)
    trainee = build(topology, dim=options.dim, size=options.size, folder=options.folder)
    found: dict[str, Any] = {}
    if topology.world_size == WORLD:
        for _ in range(WARMUP):
            trainee.train_step(Word())
        found["parameters"] = sum(torch.Size(shape).numel() for shape in trainee.engine.shapes.values())
        found["snapshot_bytes"] = trainee.snapshot().num_bytes
        found["costs"] = measure_rounds(trainee, options.rounds)
    found["loads"] = measure_loads(trainee, options.loads)
    if topology.world_size == WORLD:
        found["loop"] = measure_loop(trainee, interval=options.interval, saves=options.saves)
    if topology.rank == 0:
        options.worker.write_text(json.dumps(found))
    comm.leave(0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start both groups.   -> what they have measured, with what follows from it"""
    numbers = [f"--{name}={getattr(options, name)}" for name in ("dim", "size", *FULL)]
    groups: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch, ProgressBar("checkpoint", 2) as bar:
        for number, world in enumerate((WORLD, OTHER_WORLD)):
            bar.update(number, f"{world} worker(s)")
            result = Path(scratch) / f"{world}.json"
            own = [f"--worker={result}", f"--folder={scratch}", *numbers]
            run_group(__file__, own, world_size=world, limit_s=LIMIT_S)
            groups[world] = json.loads(result.read_text())
        bar.update(2)
    found = groups[WORLD]
    loads = {str(world): group["loads"] for world, group in groups.items()}
    steps = found["loop"]["steps"]
    judged = {"wall": judge(steps, "seconds"), "processor": judge(steps, "cpu_s")}
    return {**found, "loads": loads, "loop": {**found["loop"], **judged}}


def show_results(found: dict[str, Any]) -> None:
    """Three tables."""
    costs = found["costs"]
    ours, num_rounds = costs[OURS], len(costs[OURS])
    print(
        f"{found['parameters'] / 1e6:.2f} M parameters, a checkpoint of {ours[-1]['bytes'] / 1e6:.1f} MB, "
        f"{found['snapshot_bytes'] / 1e6:.1f} MB of host memory on each of {WORLD} workers\n"
    )
    parts = [
        ("copy to host memory, the first (allocates)", [cost["first_take"] for cost in ours]),
        ("copy to host memory, a later one", [cost["stall"] for cost in ours]),
        ("copy, write, sha256, fsync, commit", [cost["durable"] for cost in ours]),
        ("verify by one process", [cost["verify"] for cost in ours]),
        *((f"find, verify and load, {world} worker(s)", seconds) for world, seconds in found["loads"].items()),
    ]
    print_table(
        ("what", "seconds", "n"),
        ((what, show_summary(summarize(values), 3), str(len(values))) for what, values in parts),
    )
    print()
    rows = []
    for name in ARMS:
        cells = [name, f"{costs[name][-1]['bytes'] / 1e6:.1f}"]
        for key in ("stall", "durable"):
            ratios = [cost[key] / own[key] for cost, own in zip(costs[name], ours, strict=True)]
            cells.append(show_summary(summarize([cost[key] for cost in costs[name]]), 3))
            cells.append(show_summary(summarize(ratios), 2) if name != OURS else "1")
        rows.append((*cells, str(num_rounds)))
    print_table(("saved by", "MB", "stall, s", "times ours", "durable, s", "times ours", "n"), rows)
    print()
    show_loop(found["loop"])


def show_loop(loop: dict[str, Any]) -> None:
    kinds, saved = (loop["wall"], loop["processor"]), loop["saved"]
    num_saves, num_quiet = str(len(saved)), str(loop["wall"]["num_quiet"])

    def one_by_one(values: list[float]) -> str:
        return ", ".join(f"{value:.2f}" for value in values)

    def verdict(kind: dict[str, Any]) -> str:
        return f"{one_by_one(kind['extra_steps'])}: {'met' if kind['is_met'] else 'NOT met'}"

    print_table(
        ("the step loop, seconds", "wall", "processor", "n"),
        (
            ("step without a save in flight", *(show_summary(kind["quiet_step"], 2) for kind in kinds), num_quiet),
            ("steps with one", *("; ".join(map(one_by_one, kind["busy_steps"])) for kind in kinds), num_saves),
            ("extra of a save", *(one_by_one(kind["extra_s"]) for kind in kinds), num_saves),
            ("extra of a save in steps; bar: median < 1", *map(verdict, kinds), num_saves),
            (
                f"by chance, in {loop['wall']['chance_steps']} steps without",
                *(show_summary(kind["chance_s"], 2) for kind in kinds),
                num_quiet,
            ),
            ("stall (copy)", one_by_one([each["stall_s"] for each in saved]), "", num_saves),
            ("until the loop knew of the commit", one_by_one([each["seconds"] for each in saved]), "", num_saves),
        ),
    )
    print_noise("a step without a save", loop["wall"]["quiet_step"])


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "checkpoint")
    parser.add_argument("--quick", action="store_true", help="few repeats, a short loop")
    parser.add_argument("--dim", type=int, default=64, help="width of the two U-Nets (64)")
    parser.add_argument("--size", type=int, default=32, help="pixels of the images trained on (32)")
    parser.add_argument("--rounds", type=int, help="saves in each way (10)")
    parser.add_argument("--loads", type=int, help="loads at each number of workers (3)")
    parser.add_argument("--interval", type=int, help="seconds between two saves of the loop (60)")
    parser.add_argument("--saves", type=int, help="saves of the loop (3)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to save")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    require_positive(parser, options, ("dim", "size", *FULL))
    return options


def main() -> None:
    options = parse_arguments()
    if options.worker:
        work(options)
    report = Report("checkpoint", ("torch", "deepspeed"))
    found = measure(options)
    show_results(found)
    settings = {name: getattr(options, name) for name in ("dim", "size", *FULL)}
    fixed = {"workers": WORLD, "other_workers": OTHER_WORLD, "zero_stage": STAGE, "global_batch": BATCH}
    report.write(options.json, settings={**settings, **fixed}, results=found)


if __name__ == "__main__":
    run_main(main)
