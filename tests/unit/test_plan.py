"""Spreading the global batch: nothing lost, little wasted, the loss still a mean over the batch."""

from __future__ import annotations

import pytest

from data_pipeline.errors import ConfigError
from rddm_dist.config import OptimSection
from rddm_dist.training.plan import make_plan
from rddm_dist.training.step import learning_rate


@pytest.mark.parametrize("global_batch", [1, 2, 7, 8, 16, 30])
@pytest.mark.parametrize("micro_batch", [0, 1, 3, 8])
def test_every_row_has_a_place_and_filler_is_minimal(global_batch: int, micro_batch: int) -> None:
    for world_size in range(1, global_batch + 1):
        plan = make_plan(global_batch=global_batch, world_size=world_size, micro_batch=micro_batch)
        share = -(-global_batch // world_size)
        assert plan.rows_per_rank >= share
        assert plan.micro_batch <= (micro_batch or share)
        # No smaller micro-batch with as many micro-batches would hold the share.
        assert (plan.micro_batch - 1) * plan.accumulation < share
        # DeepSpeed's mean over ranks and micro-batches of loss_scale * sum is the mean over the global batch.
        assert plan.loss_scale / plan.world_size / plan.accumulation == pytest.approx(1 / global_batch)


def test_more_workers_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 workers exceed train.global_batch=2"):
        make_plan(global_batch=2, world_size=3, micro_batch=0)


def test_filler_is_told() -> None:
    assert (
        "1 filler row(s) per step, 11% of the work" in make_plan(global_batch=8, world_size=3, micro_batch=0).describe()
    )


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    settings = OptimSection(lr=1.0, warmup_steps=10, schedule="cosine", decay_steps=110, min_lr_ratio=0.1)
    rates = [learning_rate(step, settings) for step in range(1, 201)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[59] == pytest.approx(0.55)
    assert rates[109:] == pytest.approx([0.1] * 91)
    assert learning_rate(1, OptimSection(lr=2.0)) == 2.0
