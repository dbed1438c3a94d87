"""Training steps against recorded ones of the published code, with one optimizer, one per network, and the engine."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rddm_dist.training.engine import OPTIMIZERS
from tests.support.golden_steps import ACCUMULATION, RECORDED, VARIANTS, make_filled, micro_losses
from tests.support.processes import ROOT, run

TOLERANCE = 1e-3
# A thousandth of a sum is more than steps move it, so how far they do is compared as well.
MOVED = {"param_sum": 3e-5, "param_sqsum": 1e-5}
STAGES = (0, 2)  # the others compute the same: tests/distributed/test_state.py


def weights_of(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).double()


def sums_of(weights: Tensor) -> dict[str, float]:
    return {"param_sum": float(weights.sum()), "param_sqsum": float(weights.square().sum())}


@functools.cache
def sums_before(name: str) -> dict[str, float]:
    return sums_of(weights_of(make_filled(VARIANTS[name])))


def assert_recorded(name: str, index: int, step: Mapping[str, Any]) -> None:
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


def test_every_recorded_run_is_taken_again() -> None:
    assert set(RECORDED) == set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_plain_steps_equal_the_published_ones(name: str) -> None:
    """Updates go element by element and the norm is clipped over all, so an optimizer per network does the same."""
    variant = VARIANTS[name]
    net = make_filled(variant)
    twin = copy.deepcopy(net)
    settings = {key: value for key, value in variant.optim.items() if key != "name"}
    make = OPTIMIZERS[variant.optim["name"]]
    optimizers = [
        make(net.parameters(), **settings),
        *(make(each.parameters(), **settings) for each in twin.children()),
    ]
    for index in range(len(RECORDED[name])):
        losses = []
        for micro in range(ACCUMULATION):
            parts = micro_losses(variant, net, ACCUMULATION * index + micro)
            (torch.stack(parts).sum() / ACCUMULATION).backward()
            losses.append([float(part.detach()) / ACCUMULATION for part in parts])
        norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0))
        for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            theirs.grad = ours.grad
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad()
        weights = weights_of(net)
        step = {"loss": [sum(column) for column in zip(*losses, strict=True)], "grad_norm_before_clip": norm}
        assert_recorded(name, index, {**step, **sums_of(weights)})
        assert torch.equal(weights, weights_of(twin))


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
    for index, step in enumerate(steps):
        assert_recorded(name, index, step)
