"""The recorded training steps of the published code, taken again; as a program through the engine, for each ZeRO stage.

python -m tests.support.golden_steps STAGE...
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rddm_dist import comm
from rddm_dist.comm import Topology
from rddm_dist.config import EngineSection, OptimSection
from rddm_dist.diffusion.objective import output_losses
from rddm_dist.diffusion.schedule import make_schedule
from rddm_dist.log import quiet_frameworks
from rddm_dist.model.net import Network, build_net
from rddm_dist.training.engine import Engine
from rddm_dist.training.plan import make_plan
from tests.support.diffusion import FixedDraws, pattern
from tests.support.filling import fill

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "train_steps.json").read_text())
ACCUMULATION, BATCH, T = 2, 2, 1000
SHAPE = (BATCH, 3, 16, 16)
TOLERANCE = 1e-3
# A thousandth of a sum is more than steps move it, so how far they do is compared as well.
MOVED = {"param_sum": 3e-5, "param_sqsum": 1e-5}
OLD = {"name": "adam", "lr": 8e-5, "betas": (0.9, 0.99)}


@dataclass(frozen=True)
class Variant:
    """A recorded run: arguments of build_net, make_schedule, output_losses, and the optimizer's."""

    net: dict[str, Any]
    loss: dict[str, Any]
    schedule: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=lambda: OLD)
    generate: bool = False


VARIANTS = {
    "exp2_share0_pred_res_noise_l1_adam8e-5": Variant({"num_nets": 2}, {"objective": "pred_res_noise"}),
    "exp2_share1_pred_res_add_noise_l1_adam8e-5": Variant(
        {"kind": "shared_encoder"}, {"objective": "pred_res_add_noise"}
    ),
    "exp2_shareminus1_pred_res_l1_adam8e-5": Variant({"num_nets": 1}, {"objective": "pred_res"}),
    "exp0_num_unet2_pred_res_noise_l2_radam2e-4_uncond": Variant(
        {"num_nets": 2, "condition": "none"},
        {"objective": "pred_res_noise", "loss": "l2", "time_input": "clocks"},
        {"kind": "ddim"},
        {"name": "radam", "lr": 2e-4, "betas": (0.9, 0.999)},
        generate=True,
    ),
}


def make_filled(variant: Variant) -> Network:
    net = build_net(dim=8, **variant.net)
    fill(net, "B")
    return net


def micro_losses(variant: Variant, net: Any, index: int) -> list[Tensor]:
    """The losses of micro-batch `index`, mean over the batch, one for each output."""
    # The published index t is our t + 1.
    t = torch.tensor([137 * (2 * index + 1) % T, 137 * (2 * index + 2) % T]) + 1
    x0 = 0.8 * pattern(SHAPE, 0.37, 0.1, np.sin)
    x_in = torch.zeros(SHAPE) if variant.generate else 0.9 * pattern(SHAPE, 0.23, 0.7, np.sin)
    draws: Any = FixedDraws(t, 1.1 * pattern(SHAPE, 1.7, 0.3 + index, np.cos))
    schedule = make_schedule(**variant.schedule, parity="official")
    parts = output_losses(net, schedule, x0=x0, x_in=x_in, draws=draws, **variant.loss)
    return [part.mean() for part in parts]


def engine_steps(name: str, stage: int) -> Iterator[dict[str, Any]]:
    """What `train_steps.json` records, step by step, by the engine at a ZeRO stage."""
    variant = VARIANTS[name]
    engine = Engine(
        make_filled(variant),
        engine=EngineSection(zero_stage=stage),
        optim=OptimSection(**variant.optim),
        plan=make_plan(global_batch=ACCUMULATION * BATCH, world_size=1, micro_batch=BATCH),
        topology=Topology(),
    )
    for step in range(len(RECORDED[name])):
        losses = []
        for micro in range(ACCUMULATION):
            if micro:
                engine.next_micro_batch()
            parts = micro_losses(variant, engine, ACCUMULATION * step + micro)
            # The engine divides by the number of micro-batches.
            engine.backward(torch.stack(parts).sum())
            losses.append([float(part.detach()) for part in parts])
        engine.step(lr=variant.optim["lr"])
        weights = torch.cat([piece.weight for piece in engine.pieces]).double()
        yield {
            "loss": [sum(column) / ACCUMULATION for column in zip(*losses, strict=True)],
            "grad_norm_before_clip": engine.grad_norm(),
            "param_sum": float(weights.sum()),
            "param_sqsum": float(weights.square().sum()),
        }
    engine.close()


def weights_of(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).double()


def sums_of(weights: Tensor) -> dict[str, float]:
    return {"param_sum": float(weights.sum()), "param_sqsum": float(weights.square().sum())}


@functools.cache
def sums_before(name: str) -> dict[str, float]:
    return sums_of(weights_of(make_filled(VARIANTS[name])))


def assert_recorded(name: str, index: int, step: Mapping[str, Any]) -> None:
    """Compare what a step recorded with the published one."""
    recorded, before = RECORDED[name][index], sums_before(name)
    losses = recorded["loss"]
    ours = step["loss"] if len(losses) > 1 else [sum(step["loss"])]
    assert ours == pytest.approx(losses, rel=TOLERANCE)
    for key in ("grad_norm_before_clip", "param_sum", "param_sqsum"):
        assert step[key] == pytest.approx(recorded[key], rel=TOLERANCE), key
    for key, tolerance in MOVED.items():
        moved = recorded[key] - before[key]
        assert step[key] - before[key] == pytest.approx(moved, rel=TOLERANCE, abs=tolerance), key
        assert abs(moved) > 3 * tolerance


if __name__ == "__main__":
    quiet_frameworks()
    comm.initialize(Topology())
    for text in sys.argv[1:]:
        for name in VARIANTS:
            print(json.dumps({"stage": int(text), "variant": name, "steps": list(engine_steps(name, int(text)))}))
