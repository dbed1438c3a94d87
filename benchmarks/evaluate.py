"""Speed, start-up and memory of an evaluation, against plain loops over the same images.

    python benchmarks/evaluate.py                     # made-up images, a quarter of an hour on 2 cores
    python benchmarks/evaluate.py --data pictures/    # other pictures to cut the images from
    python benchmarks/evaluate.py --quick             # few rounds, to see that it runs

A network of one U-Net restores PNG images of mixed sizes in 2 steps; every arm gives the PSNR, SSIM and MAE of input
and restored image under protocol rgb, in one thread for each process.

    plain loop    the folded network, the same forward batches, the same scores; no Ray, nothing stored
    in process    rddm evaluate without actors: units, digests, Parquet, pictures of the worst and the best
    1, 2 actors   rddm evaluate --actors 1 and 2: the same on Ray
    one by one    what one writes first: image by image, read, padded, sampled with the network as trained, scored

A round runs every arm once, in an order that turns from round to round, and all must come to the same PSNR, to
0.001 dB. Counted are images a second from the end of the first unit (of the second, for two actors) to that of the
last, so that starting is left out. The plain loop runs in the same process as the arm in process, one by one in its
own, so that what an evaluation sets up for its process counts in the last comparison alone. Ratios are taken within a
round. Tables have medians over the rounds (least-most).

Start-up is measured in a new process each time: until one actor gives its first result, with Ray's own start apart, and
beside it the load of the model and the same unit in the process itself. Memory is what the driver and its one actor
have resident while the results of very many small images come in.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from support.evaluation import (
    DIM_MULTS,
    Arm,
    Clock,
    Run,
    Work,
    evaluate,
    find_images,
    loop_batches,
    loop_images_apart,
    measure_rounds,
    plan_work,
    write_images,
    write_model,
)
from support.images import Photos, find_photos
from support.process import memory_mb, run_apart, tree_memory_mb
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

from cluster.ray_evaluate import run_on_ray
from cluster.ray_session import ray_session
from rddm_dist.cli.progress import ProgressBar
from rddm_dist.evaluation.evaluate import run_plan
from rddm_dist.evaluation.runner import UnitRunner, run_here

# (H, W); some need padding. Units come in this order, first and last are equally large.
SIZES = ((64, 112), (66, 80), (72, 72), (80, 64), (84, 90), (96, 64), (100, 66), (112, 64))
SMALL, NUM_SMALL, SMALL_DIM = (32, 32), 50, 8  # of the images and the network that memory is measured with
PLAIN, IN_PROCESS, ONE, TWO, ONE_BY_ONE = "plain loop", "in process", "1 actor", "2 actors", "one by one"
# What is compared with what, and how many times as fast it must be.
BARS = ((ONE, PLAIN, 0.9), (TWO, ONE, 1.8), (IN_PROCESS, ONE_BY_ONE, 1.1), (IN_PROCESS, PLAIN, None))
MOST_GROWTH = 0.05  # of resident memory, from the second tenth of the images to the last
ACTOR = "ray::MapWorker"  # what Ray calls the process of an actor
SECTIONS = ("speed", "start", "memory")
NUMBERS = ("rounds", "images", "starts", "small")
FULL = {"rounds": 10, "images": 12, "starts": 10, "small": 5000}
QUICK = {"rounds": 2, "images": 4, "starts": 2, "small": 400}
LIMIT_S = 300.0


# -- speed -------------------------------------------------------------------------------------------------------------


def measure_speed(work: Work, folder: Path, *, rounds: int) -> dict[str, list[float]]:
    """Images a second of every arm in each round."""
    settings = work.plan.job.settings
    with (
        ProgressBar("speed, rounds", rounds + 1, every_s=5.0) as bar,
        ray_session(cpus=2),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart,
    ):

        def loop_apart() -> Run:
            batch_size, steps = settings.batch_size, settings.steps
            return apart.submit(loop_images_apart, folder, batch_size=batch_size, steps=steps).result(LIMIT_S)

        arms: dict[str, Arm] = {
            PLAIN: partial(loop_batches, work),
            ONE: partial(evaluate, work, partial(run_on_ray, actors=(1, 1))),
            TWO: partial(evaluate, work, partial(run_on_ray, actors=(2, 2)), processes=2),
            IN_PROCESS: partial(evaluate, work, run_here),
            ONE_BY_ONE: loop_apart,
        }
        return measure_rounds(arms, rounds=rounds, tell=bar.update)


def make_ratios(speeds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """JSON values: the comparisons of BARS, round by round."""
    rows = []
    for ours, against, bar in BARS:
        ratio = summarize([a / b for a, b in zip(speeds[ours], speeds[against], strict=True)])
        is_met = None if bar is None else ratio["median"] >= bar
        rows.append({"arm": ours, "against": against, "ratio": ratio, "bar": bar, "is_met": is_met})
    return rows


def show_speed(speeds: Mapping[str, Sequence[float]], ratios: Sequence[Mapping[str, Any]]) -> None:
    print_table(("arm", "images/s", "n"), ((arm, cell(own, 2), str(len(own))) for arm, own in speeds.items()))
    print()
    print_table(
        ("arm", "against", "ratio", "bar"),
        ((row["arm"], row["against"], show_summary(row["ratio"], 3), verdict(row)) for row in ratios),
    )
    print_noise("the plain loop", summarize(speeds[PLAIN]))


def verdict(row: Mapping[str, Any]) -> str:
    return "" if row["bar"] is None else f">= {row['bar']:.2f} {'met' if row['is_met'] else 'NOT MET'}"


def cell(values: Sequence[float], digits: int) -> str:
    return show_summary(summarize(values), digits)


# -- start-up ----------------------------------------------------------------------------------------------------------


def probe_start(options: argparse.Namespace) -> dict[str, float]:
    """In a new process: seconds until one actor has given its first result, and until this process has."""
    seconds = {"imports": time.time() - options.begun}
    torch.set_num_threads(1)
    work, seconds["plan"] = timed(lambda: prepare(options, options.folder))
    plan = replace(work.plan, units=work.plan.units[:1])
    begun = perf_counter()
    with ray_session(cpus=2):
        seconds["ray"] = perf_counter() - begun
        begun, clock = perf_counter(), Clock()
        run_plan(plan, out=str(work.scratch / "results"), execute=partial(run_on_ray, actors=(1, 1)), progress=clock)
        seconds["actor"] = clock.first - begun
    runner, seconds["load"] = timed(lambda: UnitRunner(plan.job))
    _, seconds["unit"] = timed(lambda: runner.run(plan.units[0].to_bytes()))
    return seconds


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What an action gives, and its seconds."""
    begun = perf_counter()
    value = action()
    return value, perf_counter() - begun


def show_starts(starts: Sequence[Mapping[str, float]]) -> None:
    def row(what: str, seconds: Callable[[Mapping[str, float]], float]) -> tuple[str, str, str]:
        return what, cell([seconds(start) for start in starts], 2), str(len(starts))

    print_table(
        ("start-up", "seconds", "n"),
        (
            row("Python and imports", lambda s: s["imports"]),
            row("model read, images hashed, units planned", lambda s: s["plan"]),
            row("Ray started", lambda s: s["ray"]),
            row("one actor until its first result", lambda s: s["actor"]),
            row("of that, its process and imports", lambda s: s["actor"] - s["load"] - s["unit"]),
            row("model loaded and folded, in process", lambda s: s["load"]),
            row("first unit, in process", lambda s: s["unit"]),
            row("first result with 1 actor, all", lambda s: s["imports"] + s["plan"] + s["ray"] + s["actor"]),
            row("first result in process, all", lambda s: s["imports"] + s["plan"] + s["load"] + s["unit"]),
        ),
    )


# -- memory ------------------------------------------------------------------------------------------------------------


def probe_memory(options: argparse.Namespace) -> list[dict[str, float]]:
    """In a new process: what driver and actor have resident, about a hundred times while the results come in."""
    torch.set_num_threads(1)
    work = prepare(options, options.folder, count=options.small)
    samples: list[dict[str, float]] = []

    def look(done: int, total: int) -> None:
        if done * 100 // total > (samples[-1]["done"] * 100 // total if samples else 0):
            samples.append({"done": done, "driver": memory_mb("VmRSS"), "actor": tree_memory_mb(ACTOR)})

    run_plan(work.plan, out=str(work.scratch / "results"), execute=partial(run_on_ray, actors=(1, 1)), progress=look)
    return [sample for sample in samples if sample["actor"]]  # at the very end the actor may be gone


def judge_memory(samples: Sequence[Mapping[str, float]], total: int) -> dict[str, Any]:
    """Growth of both processes from the second tenth of the images to the last: a share of it, and MB."""

    def median(process: str, tenth: int) -> float:
        return statistics.median(sample[process] for sample in samples if 10 * sample["done"] // total == tenth)

    found: dict[str, Any] = {}
    for process in ("driver", "actor"):
        early, late = median(process, 1), median(process, 9)
        growth = late / early - 1.0
        found[process] = {"early_mb": early, "late_mb": late, "growth": growth, "is_met": growth <= MOST_GROWTH}
    return found


def show_memory(judged: Mapping[str, Mapping[str, Any]], total: int) -> None:
    print_table(
        (f"memory over {total} images", "MB at 10-20 %", "MB at 90-100 %", "growth", "bar"),
        (
            (
                process,
                f"{own['early_mb']:.0f}",
                f"{own['late_mb']:.0f}",
                f"{100 * own['growth']:.1f} %",
                f"<= {100 * MOST_GROWTH:.0f} % {'met' if own['is_met'] else 'NOT MET'}",
            )
            for process, own in judged.items()
        ),
    )


# -- all of it ---------------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, folder: Path, *, count: int = 0) -> Work:
    """Plan the evaluation of what lies in a folder; results go below it.   count: images, repeated to be so many"""
    pairs = find_images(folder, count=count)
    return plan_work(folder, pairs, batch_size=options.batch, steps=options.steps, scratch=folder)


def run_probe(what: str, options: argparse.Namespace, folder: Path) -> Any:
    """What a probe finds in a new process."""
    given = [f"--{name}={getattr(options, name)}" for name in ("batch", "steps", "small")]
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.iterdir():
            (Path(scratch) / path.name).symlink_to(path)
        own = [f"--probe={what}", f"--folder={scratch}", f"--begun={time.time()!r}", *given]
        return run_apart(__file__, *own, limit_s=LIMIT_S)


PROBES = {"start": probe_start, "memory": probe_memory}


def measure(options: argparse.Namespace, photos: Photos, folder: Path) -> dict[str, Any]:
    """Everything that was asked for, printed as it comes."""
    found: dict[str, Any] = {}
    mixed, small = folder / "mixed", folder / "small"
    for own, dim, sizes, per_size in (
        (mixed, options.dim, SIZES, options.images),
        (small, SMALL_DIM, (SMALL,), NUM_SMALL),
    ):
        own.mkdir()
        write_model(own, dim=dim)
        write_images(own, photos, sizes=sizes, per_size=per_size)
    if "speed" in options.only:
        found["images_per_s"] = measure_speed(prepare(options, mixed), mixed, rounds=options.rounds)
        found["ratios"] = make_ratios(found["images_per_s"])
        show_speed(found["images_per_s"], found["ratios"])
    if "start" in options.only:
        with ProgressBar("starts", options.starts, every_s=5.0) as bar:
            found["starts"] = []
            for number in range(options.starts):
                found["starts"].append(run_probe("start", options, mixed))
                bar.update(number + 1)
        show_starts(found["starts"])
    if "memory" in options.only:
        samples = run_probe("memory", options, small)
        found["memory"] = {**judge_memory(samples, options.small), "samples": samples}
        show_memory({name: found["memory"][name] for name in ("driver", "actor")}, options.small)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "evaluate")
    parser.add_argument("--quick", action="store_true", help="few rounds of few images")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of pictures to cut the images from")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure (all)")
    parser.add_argument("--dim", type=int, default=16, help="width of the U-Net (16)")
    parser.add_argument("--batch", type=int, default=4, help="images in a forward batch (4)")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps (2)")
    parser.add_argument("--images", type=int, help="images of each of the eight sizes (12)")
    parser.add_argument("--rounds", type=int, help="measured rounds (10)")
    parser.add_argument("--starts", type=int, help="processes that are started (10)")
    parser.add_argument("--small", type=int, help="small images that memory is measured over (5000)")
    parser.add_argument("--probe", choices=PROBES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    require_positive(parser, options, ("dim", "batch", "steps", *NUMBERS))
    if options.dim % 8:
        parser.error("--dim must be a multiple of 8")
    if options.small < 20 * options.batch:
        parser.error(f"--small must be at least 20 batches, {20 * options.batch}: its tenths are compared")
    return options


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    if options.probe:
        json.dump(PROBES[options.probe](options), sys.stdout)
        return
    report = Report("evaluate", ("torch", "ray", "pyarrow"))
    with tempfile.TemporaryDirectory(prefix="rddm-bench-") as temporary:
        scratch = Path(temporary)
        photos = find_photos(options.data, scratch, flag="--data") if options.data else Photos("synthetic images", ())
        found = measure(options, photos, scratch)
    settings = {name: getattr(options, name) for name in ("dim", "batch", "steps", *NUMBERS)}
    fixed = {"dim_mults": DIM_MULTS, "sizes": SIZES, "small_size": SMALL, "small_dim": SMALL_DIM, "source": photos.what}
    report.write(options.json, settings={**settings, **fixed}, results=found)


if __name__ == "__main__":
    run_main(main)
