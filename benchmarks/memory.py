"""Memory that training keeps on each rank, at every ZeRO stage, against a formula.

    python benchmarks/memory.py                 # a few minutes on 2 cores
    python benchmarks/memory.py --dims 16 --worlds 1 2

Each world size is a group of CPU workers, which train one step of a U-Net at every stage, number format and width.
Counted are the bytes of the storages of all live tensors that came with the engine, as torch allocated them, and the
most of all ranks is shown:

    kept         after the step: weights, fp32 weights, Adam's moments, the EMA of one profile, buffers
    at the step  between backward and the optimizer's step: the same and the gradients

Activations, which depend on the batch, and what the step itself needs for a moment are neither. The formulas are
`kept_bytes` and `gradient_bytes` below.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from support.report import Report, make_parser, print_table, run_main
from torch import Tensor

from data_pipeline.errors import EnvironmentFault
from rddm_dist import comm
from rddm_dist.cli.progress import ProgressBar
from rddm_dist.comm import Topology, topology_from_env
from rddm_dist.config import EmaSection, EngineSection, OptimSection
from rddm_dist.model.net import build_net
from rddm_dist.training.ema import make_ema, profiles
from rddm_dist.training.engine import MAX_BUCKET, Engine
from rddm_dist.training.plan import make_plan

DIM_MULTS, SIZE = (1, 2, 4), 16
SETTINGS = tuple(
    (stage, precision) for stage in range(4) for precision in ("fp32", "bf16") if stage or precision == "fp32"
)
ITEM_BYTES = {"fp32": 4, "bf16": 2}
FP32 = 4
LIMIT_S = 600.0


@dataclass(frozen=True)
class Usage:
    """Bytes on one rank at one setting, measured, and what the formulas say."""

    world_size: int
    dim: int
    parameters: int
    stage: int
    precision: str
    kept: int
    at_step: int
    formula_kept: float
    formula_at_step: float


def kept_bytes(stage: int, precision: str, parameters: int, world_size: int, *, profiles: int = 1) -> float:
    """Bytes a rank keeps from step to step, for P parameters on W ranks and E averages (`profiles`).

    Adam's moments are 8 P bytes, an average 4 P, weights 4 P, or 2 P in bf16. Stage 0 has all of it on every rank.
    Stages 1 and 2 have the weights on every rank, and a W-th of fp32 weights (in fp32 too), moments and averages.
    bf16 at stage 1 adds gradients of 4 P, which DeepSpeed keeps. Stage 3 has a W-th of everything, gradients of 4 P
    with it, and the whole buffer in which gradients are reduced.
    """
    p, share, item = parameters, parameters / world_size, ITEM_BYTES[precision]
    states = 2 * FP32 + FP32 * profiles
    if stage == 0:
        return p * (FP32 + states)
    partitioned = share * (FP32 + states)
    if stage == 3:
        return partitioned + share * (item + FP32) + item * min(p, MAX_BUCKET)
    return p * item + partitioned + (p * FP32 if (stage, precision) == (1, "bf16") else 0)


def gradient_bytes(stage: int, precision: str, parameters: int, world_size: int) -> float:
    """Bytes of gradients on a rank between backward and step, beside what it keeps anyway.

    Stage 0 has all of them, stages 1 and 2 a W-th in fp32 (of a parameter that two ranks share, each has the whole
    gradient, which is left out here). bf16 at stage 1 has them in bf16 beside those it keeps; stage 3 keeps them.
    """
    if stage == 0:
        return FP32 * parameters
    if stage == 3:
        return 0.0
    return ITEM_BYTES["bf16"] * parameters if (stage, precision) == (1, "bf16") else FP32 * parameters / world_size


def live_storages() -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors Python knows, and of their gradients, by address."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return {storage.data_ptr(): storage for storage in storages}


def bytes_beside(others: Mapping[int, torch.UntypedStorage]) -> int:
    """Of live storages that are not among the others, which are held, so that their addresses are not used again."""
    return sum(storage.nbytes() for address, storage in live_storages().items() if address not in others)


def measure(topology: Topology, *, dim: int, stage: int, precision: str) -> Usage:
    """Train two steps and count what lives before and after the optimizer's second."""
    others = live_storages()
    engine = Engine(
        build_net(dim=dim, dim_mults=DIM_MULTS, num_nets=1),
        engine=EngineSection.model_validate({"zero_stage": stage, "precision": precision}),
        optim=OptimSection(),
        plan=make_plan(global_batch=topology.world_size, world_size=topology.world_size, micro_batch=1),
        topology=topology,
    )
    ema = make_ema(engine.pieces, profiles(EmaSection()))
    for step in (1, 2):
        backward(engine)
        at_step = bytes_beside(others)
        engine.step(lr=1e-4)
        ema.update(step)
    kept = bytes_beside(others)
    parameters = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    engine.close()
    setting = (stage, precision, parameters, topology.world_size)
    formula = kept_bytes(*setting)
    return Usage(
        topology.world_size,
        dim,
        parameters,
        stage,
        precision,
        kept,
        at_step,
        formula,
        formula + gradient_bytes(*setting),
    )


def backward(engine: Engine) -> None:
    image, time = torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1)
    outputs = engine(image, (time, time), image, None)
    engine.backward(torch.stack([output.square().mean() for output in outputs]).sum())


def work(options: argparse.Namespace) -> NoReturn:
    """What a worker does: every setting in turn; rank 0 writes the most of all ranks."""
    topology = topology_from_env()
    torch.set_num_threads(1)
    comm.initialize(topology)
    rows = []
    for dim in options.dims:
        for stage, precision in SETTINGS:
            mine = measure(topology, dim=dim, stage=stage, precision=precision)
            every = comm.gather_object((mine.kept, mine.at_step))
            if every is not None:
                kept, at_step = (max(values) for values in zip(*every, strict=True))
                rows.append({**asdict(mine), "kept": kept, "at_step": at_step})
    if topology.rank == 0:
        options.worker.write_text(json.dumps(rows))
    comm.leave(0)


def measure_group(options: argparse.Namespace, world_size: int) -> list[dict[str, Any]]:
    """The rows that a group of workers measures; EnvironmentFault if it fails or takes too long."""
    with tempfile.TemporaryDirectory() as scratch:
        result, log = Path(scratch) / "rows.json", Path(scratch) / "log"
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}")
        own = (__file__, "--worker", str(result), "--dims", *map(str, options.dims))
        with log.open("w") as output:
            try:
                subprocess.run([*launcher, *own], check=True, stdout=output, stderr=output, timeout=LIMIT_S)
            except subprocess.SubprocessError as error:
                tail = log.read_text()[-2000:]
                raise EnvironmentFault(f"{world_size} workers failed: {error}; they said: {tail}") from error
        return json.loads(result.read_text())


def show_rows(rows: list[dict[str, Any]]) -> None:
    """The table, in 10^6 bytes.   rows: of Usage"""

    def cells(row: dict[str, Any], what: str) -> tuple[str, str, str]:
        measured, formula = row[what], row[f"formula_{what}"]
        return f"{measured / 1e6:.2f}", f"{formula / 1e6:.2f}", f"{measured / formula:.3f}"

    print_table(
        ("stage", "format", "ranks", "parameters", "kept MB", "formula", "ratio", "at the step MB", "formula", "ratio"),
        (
            (
                str(row["stage"]),
                row["precision"],
                str(row["world_size"]),
                f"{row['parameters'] / 1e6:.2f} M",
                *cells(row, "kept"),
                *cells(row, "at_step"),
            )
            for row in sorted(rows, key=lambda row: (row["stage"], row["precision"] == "bf16", row["world_size"]))
        ),
    )


def main() -> None:
    parser = make_parser(__doc__, "memory")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 32, 48], help="widths of the U-Net (16 32 48)")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="numbers of workers (1 2 4)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if any(dim < 8 or dim % 8 for dim in options.dims):
        parser.error("--dims must be multiples of 8")
    if min(options.worlds) < 1:
        parser.error("--worlds must be at least 1")
    if options.worker:
        work(options)
    report = Report("memory", ("torch", "deepspeed"))
    rows: list[dict[str, Any]] = []
    with ProgressBar("memory", len(options.worlds), every_s=5.0) as bar:
        for number, world_size in enumerate(options.worlds):
            bar.update(number, f"{world_size} workers")
            rows += measure_group(options, world_size)
        bar.update(len(options.worlds), "")
    show_rows(rows)
    settings = {"dims": options.dims, "dim_mults": DIM_MULTS, "num_nets": 1, "size": SIZE, "worlds": options.worlds}
    report.write(options.json, settings=settings, results=rows)


if __name__ == "__main__":
    run_main(main)
