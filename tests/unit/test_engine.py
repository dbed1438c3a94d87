"""The DeepSpeed door without DeepSpeed: derived configuration, refusals, and builds that were killed."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from rddm_dist.config import EngineSection, OptimSection
from rddm_dist.training.engine import LEFT_LOCK_S, _drop_left_lock, check_engine, deepspeed_config
from rddm_dist.training.plan import make_plan


def test_batch_sizes_are_derived_and_multiply() -> None:
    plan = make_plan(global_batch=10, world_size=4, micro_batch=2)
    config = deepspeed_config(EngineSection(zero_stage=2), OptimSection(), plan)
    micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == micro * accumulation * 4 == 16


def test_further_keys_are_merged_into_the_derived_ones() -> None:
    plan = make_plan(global_batch=2, world_size=1, micro_batch=0)
    engine = EngineSection(zero_stage=3, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "seed": 3})
    config = deepspeed_config(engine, OptimSection(), plan)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["seed"] == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "fp16"}, "needs a GPU"),
        ({"precision": "bf16", "zero_stage": 0}, "set engine.zero_stage=1"),
        ({"offload_optimizer": True, "zero_stage": 0}, "needs engine.zero_stage 1, 2 or 3"),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "engine.deepspeed.zero_optimization.stage is derived"),
        ({"deepspeed": {"train_batch_size": 4}}, "engine.deepspeed.train_batch_size is derived"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_engine(EngineSection.model_validate(settings), on_gpu=False)


def test_the_lock_of_a_killed_build_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 2 * LEFT_LOCK_S,) * 2)
    _drop_left_lock(lock)
    assert not lock.exists()


def test_a_lock_in_use_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    threading.Timer(0.4, lock.unlink).start()
    started = time.monotonic()
    _drop_left_lock(lock)
    assert not lock.exists() and time.monotonic() - started >= 0.3
