"""Run by the workers of a test: what DeepSpeed and the engine make of a few training steps at several settings.

universal_probe.py save FOLDER     FOLDER/stage-S gets DeepSpeed's checkpoint and pieces.pt, what the pieces say
universal_probe.py offload FOLDER  prints the losses with optimizer state on the device and in host memory
universal_probe.py further FOLDER  prints the losses without and with unusual values of all keys under zero_optimization
universal_probe.py scaler FOLDER   goes on from the state of a loss scale at every stage
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rddm_dist import comm
from rddm_dist.comm import Topology, topology_from_env
from rddm_dist.config import EngineSection, OptimSection
from rddm_dist.factory import make_net
from rddm_dist.training.engine import MOMENTS, ZERO, Engine
from rddm_dist.training.plan import make_plan
from tests.support.state_probe import BATCH, CONFIG, step_once

TAG = "final"
STAGES = (1, 2, 3)
UNUSUAL = {
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "use_multi_rank_bucket_allreduce": False,
    "overlap_comm": True,
    "ignore_unused_parameters": False,
    "memory_efficient_linear": False,
    "log_trace_cache_warnings": True,
    "enable_sanity_checks": True,
    "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_allgather_sequential": True,
    "reduce_bucket_size": 3000,
    "allgather_bucket_size": 3000,
    "sub_group_size": 3000,
    "stage3_prefetch_bucket_size": 100,
    "stage3_max_live_parameters": 3000,
    "stage3_max_reuse_distance": 100,
}


def build(topology: Topology, engine: Mapping[str, Any], *, clip_norm: float = 1.0) -> Engine:
    torch.manual_seed(0)
    return Engine(
        make_net(CONFIG),
        engine=EngineSection(**engine),
        optim=OptimSection(lr=1e-3, clip_norm=clip_norm),
        plan=make_plan(global_batch=BATCH, world_size=topology.world_size, micro_batch=1),
        topology=topology,
    )


def whole_state(engine: Engine) -> dict[str, dict[str, Tensor]] | None:
    """The pieces of all ranks put together, on rank 0.   -> kind -> parameter -> fp32, NaN where no piece is"""
    mine = [(piece.name, piece.start, {"fp32": piece.weight, **piece.moments}) for piece in engine.pieces]
    gathered = comm.gather_object(mine)
    if gathered is None:
        return None
    kinds = ("fp32", *MOMENTS)
    whole = {kind: {name: torch.full(shape, torch.nan) for name, shape in engine.shapes.items()} for kind in kinds}
    for name, start, tensors in (piece for pieces in gathered for piece in pieces):
        for kind, part in tensors.items():
            whole[kind][name].view(-1)[start : start + part.numel()] = part
    return whole


def save(folder: Path, topology: Topology) -> None:
    for stage in STAGES:
        engine = build(topology, {"zero_stage": stage})
        for step in range(3):
            step_once(engine, topology, step)
        own = folder / f"stage-{stage}"
        engine.net.save_checkpoint(str(own), tag=TAG, save_latest=False)
        whole = whole_state(engine)
        if whole is not None:
            torch.save(whole, own / "pieces.pt")
        engine.close()


def print_losses(name: str, topology: Topology, engine: Mapping[str, Any], *, clip_norm: float = 1.0) -> None:
    """Train five steps: `losses NAME STAGE ...`. The pieces must cover every parameter."""
    built = build(topology, engine, clip_norm=clip_norm)
    losses = [step_once(built, topology, step) for step in range(5)]
    whole = whole_state(built)
    assert whole is None or not any(value.isnan().any() for values in whole.values() for value in values.values())
    if topology.rank == 0:
        print("losses", name, engine["zero_stage"], *map(repr, losses), flush=True)
    built.close()


def offload(_: Path, topology: Topology) -> None:
    for stage in STAGES:
        print_losses("device", topology, {"zero_stage": stage})
        print_losses("host", topology, {"zero_stage": stage, "offload_optimizer": True})
    print_losses("free-device", topology, {"zero_stage": 3}, clip_norm=0.0)
    print_losses("free-host", topology, {"zero_stage": 3, "offload_optimizer": True}, clip_norm=0.0)


def further(_: Path, topology: Topology) -> None:
    for stage in STAGES:
        print_losses("plain", topology, {"zero_stage": stage})
        print_losses("unusual", topology, {"zero_stage": stage, "deepspeed": {ZERO: UNUSUAL}})


def scaler(_: Path, topology: Topology) -> None:
    """Only a GPU trains in fp16, so its scaler takes the place of the one that the engine's optimizer has here."""
    for stage in STAGES:
        engine = build(topology, {"zero_stage": stage})
        assert engine.loss_scaler == {} and engine.loss_scale() == 1.0
        engine.loss_scaler = {"cur_scale": 8.0, "cur_iter": 1.0, "last_overflow_iter": 0.0, "cur_hysteresis": 1.0}
        assert engine.loss_scale() == 1.0, "a run that left fp16 has no loss scale"
        check_scaler(engine, consecutive_hysteresis=False)
        check_scaler(engine, consecutive_hysteresis=True)
        engine.close()
        print("scaler", stage, flush=True)


def check_scaler(engine: Engine, *, consecutive_hysteresis: bool) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def start() -> None:
        engine._optimizer.loss_scaler = DynamicLossScaler(
            2**16, 4, 1, 2, consecutive_hysteresis, raise_error_at_min_scale=False
        )

    def scales_after(overflows: list[bool]) -> list[float]:
        scales = []
        for overflow in overflows:
            engine._optimizer.loss_scaler.update_scale(overflow)
            scales.append(engine.loss_scale())
        return scales

    draw = torch.Generator().manual_seed(0)
    past, future = ((torch.rand(50, generator=draw) < 0.15).tolist() for _ in range(2))
    start()
    engine.loss_scaler = {}
    assert engine.loss_scale() == 2**16, "a run that comes to fp16 begins with the first scale"
    unrestored = scales_after(future)
    start()
    scales_after(past)
    state = json.loads(json.dumps(engine.loss_scaler))
    expected = scales_after(future)
    start()
    engine.loss_scaler = state
    assert scales_after(future) == expected != unrestored
    assert len(set(expected)) > 3


if __name__ == "__main__":
    here = topology_from_env()
    torch.set_num_threads(1)
    comm.initialize(here)
    parts = {"save": save, "offload": offload, "further": further, "scaler": scaler}
    parts[sys.argv[1]](Path(sys.argv[2]), here)
    comm.leave(0)
