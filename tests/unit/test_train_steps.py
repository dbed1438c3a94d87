"""Training steps against recorded ones of the published code, with one optimizer, one per network, and the engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from rddm_dist.training.engine import OPTIMIZERS
from tests.support.golden_steps import ACCUMULATION, RECORDED, VARIANTS, make_filled, micro_losses
from tests.support.processes import ROOT, run

TOLERANCE = 1e-3
STAGES = (0, 2)  # the others compute the same: tests/distributed/test_state.py


def assert_recorded(step: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    losses = recorded["loss"]
    ours = step["loss"] if len(losses) > 1 else [sum(step["loss"])]
    assert ours == pytest.approx(losses, rel=TOLERANCE)
    for name in ("grad_norm_before_clip", "param_sum", "param_sqsum"):
        assert step[name] == pytest.approx(recorded[name], rel=TOLERANCE), name


def test_every_recorded_run_is_taken_again() -> None:
    assert set(RECORDED) == set(VARIANTS)


@pytest.mark.parametrize("per_network", [False, True], ids=["one optimizer", "one per network"])
@pytest.mark.parametrize("name", VARIANTS)
def test_plain_steps_equal_the_published_ones(name: str, per_network: bool) -> None:
    """The updates are element by element and the norm is clipped over all, so the number of optimizers is no matter."""
    variant = VARIANTS[name]
    net = make_filled(variant)
    groups = [child.parameters() for child in net.children()] if per_network else [net.parameters()]
    settings = {key: value for key, value in variant.optim.items() if key != "name"}
    optimizers = [OPTIMIZERS[variant.optim["name"]](list(group), **settings) for group in groups]
    before = torch.cat([p.detach().flatten() for p in net.parameters()]).double()
    moved = 0.0
    for step, recorded in enumerate(RECORDED[name]):
        losses = []
        for micro in range(ACCUMULATION):
            parts = micro_losses(variant, net, ACCUMULATION * step + micro)
            (torch.stack(parts).sum() / ACCUMULATION).backward()
            losses.append([float(part.detach()) / ACCUMULATION for part in parts])
        norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        weights = torch.cat([p.detach().flatten() for p in net.parameters()]).double()
        ours = {
            "loss": [sum(column) for column in zip(*losses, strict=True)],
            "grad_norm_before_clip": norm,
            "param_sum": float(weights.sum()),
            "param_sqsum": float(weights.square().sum()),
        }
        assert_recorded(ours, recorded)
        # The sums hardly move, so how far they do is compared as well.
        moved = ours["param_sum"] - float(before.sum())
        assert moved == pytest.approx(recorded["param_sum"] - float(before.sum()), rel=0.02, abs=1e-5)
    assert moved != 0


@pytest.fixture(scope="module")
def engine_runs() -> dict[tuple[int, str], list[dict[str, Any]]]:
    command = [sys.executable, "-m", "tests.support.golden_steps", *map(str, STAGES)]
    result = run(command, cwd=ROOT, timeout_s=200)
    assert result.code == 0, result.text
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"stage"')]
    return {(line["stage"], line["variant"]): line["steps"] for line in lines}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_takes_the_published_steps(
    engine_runs: dict[tuple[int, str], list[dict[str, Any]]], name: str, stage: int
) -> None:
    steps = engine_runs[stage, name]
    assert len(steps) == len(RECORDED[name])
    for step, recorded in zip(steps, RECORDED[name], strict=True):
        assert_recorded(step, recorded)
