"""Training steps against recorded ones of the published code, with one optimizer and one per network."""

from __future__ import annotations

import copy

import pytest
import torch

from rddm_dist.training.engine import OPTIMIZERS
from tests.support.golden_steps import (
    ACCUMULATION,
    RECORDED,
    VARIANTS,
    assert_recorded,
    make_filled,
    micro_losses,
    sums_of,
    weights_of,
)


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
