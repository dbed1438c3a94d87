"""The DeepSpeed door without DeepSpeed: derived configuration, refusals, and builds that were killed."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipeline.errors import ConfigError
from rddm_dist.config import Config, EngineSection, OptimSection
from rddm_dist.model.net import build_net
from rddm_dist.training.engine import (
    LEFT_LOCK_S,
    MAX_BUCKET,
    OPTIMIZERS,
    _drop_left_lock,
    check_engine,
    deepspeed_config,
    parameter_groups,
)
from rddm_dist.training.engine_keys import (
    CLOSED_KEYS,
    CLOSED_ZERO_KEYS,
    COUNTS,
    DERIVED_KEYS,
    OPEN_KEYS,
    SWITCHES,
    ZERO,
)
from rddm_dist.training.plan import make_plan


def test_batch_sizes_are_derived_and_multiply() -> None:
    plan = make_plan(global_batch=10, world_size=4, micro_batch=2)
    config = deepspeed_config(EngineSection(zero_stage=2), OptimSection(), plan)
    micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == micro * accumulation * 4 == 16


def test_further_keys_are_merged_into_the_derived_ones() -> None:
    plan = make_plan(global_batch=2, world_size=1, micro_batch=0)
    engine = EngineSection(zero_stage=3, deepspeed={ZERO: {"reduce_bucket_size": 7, "reduce_scatter": False}})
    check_engine(engine, on_gpu=False)
    config = deepspeed_config(engine, OptimSection(), plan)
    assert config[ZERO]["stage"] == 3
    assert config[ZERO]["reduce_bucket_size"] == 7
    assert config[ZERO]["reduce_scatter"] is False


@pytest.mark.parametrize("parameters", [1, 1000, MAX_BUCKET, 2 * MAX_BUCKET])
def test_gradients_are_reduced_in_a_buffer_no_larger_than_the_network(parameters: int) -> None:
    plan = make_plan(global_batch=2, world_size=1, micro_batch=0)
    config = deepspeed_config(EngineSection(), OptimSection(), plan, parameters=parameters)
    assert config[ZERO]["reduce_bucket_size"] == min(parameters, MAX_BUCKET)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "fp16"}, "needs a GPU"),
        ({"precision": "bf16", "zero_stage": 0}, "set engine.zero_stage=1"),
        ({"offload_optimizer": True, "zero_stage": 0}, "needs engine.zero_stage 1, 2 or 3"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_engine(EngineSection.model_validate(settings), on_gpu=False)


def refusal(deepspeed: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        check_engine(EngineSection(deepspeed=deepspeed), on_gpu=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nested(key: str, value: object) -> dict[str, object]:
    first, _, rest = key.partition(".")
    return {first: {rest: value} if rest else value}


@pytest.mark.parametrize("key", DERIVED_KEYS)
def test_a_derived_key_is_refused_and_ours_named(key: str) -> None:
    ours = DERIVED_KEYS[key]
    assert refusal(nested(key, 1)) == f"engine.deepspeed.{key} is derived; remove it and set {ours}"
    value: object = Config()
    for part in ours.split("."):
        value = getattr(value, part)


@pytest.mark.parametrize("key", [*CLOSED_KEYS, *(f"{ZERO}.{key}" for key in CLOSED_ZERO_KEYS)])
def test_a_key_that_would_change_a_step_or_move_its_state_is_refused(key: str) -> None:
    assert refusal(nested(key, True)).startswith(f"engine.deepspeed.{key} is not supported; remove it")


@pytest.mark.parametrize(
    ("deepspeed", "said"),
    [
        ({"zero_optimisation": {}}, f"zero_optimisation is no key of DeepSpeed; the nearest is {ZERO}"),
        ({"train_batchsize": 1}, "train_batchsize is no key of DeepSpeed; the nearest is train_batch_size"),
        ({ZERO: {"overlap_com": True}}, f"overlap_com is no key of DeepSpeed; the nearest is {ZERO}.overlap_comm"),
        ({"reduce_bucket_size": 1}, f"no key of DeepSpeed; the nearest is {ZERO}.reduce_bucket_size"),
        ({ZERO: 2}, f"{ZERO} must be a mapping"),
        ({ZERO: None}, f"{ZERO} must be a mapping"),
        ({ZERO: {"overlap_comm": 1}}, "overlap_comm=1 must be true or false"),
        ({ZERO: {"reduce_bucket_size": "5e8"}}, "reduce_bucket_size='5e8' must be a whole number of at least 1"),
        ({ZERO: {"reduce_bucket_size": 0}}, "reduce_bucket_size=0 must be a whole number of at least 1"),
        ({ZERO: {"reduce_bucket_size": True}}, "reduce_bucket_size=True must be a whole number of at least 1"),
    ],
)
def test_a_mistaken_further_key_is_refused(deepspeed: dict[str, object], said: str) -> None:
    assert said in refusal(deepspeed)


def test_every_further_key_passes_with_a_value_of_its_kind() -> None:
    zero = {**dict.fromkeys(SWITCHES, True), **COUNTS}
    check_engine(EngineSection(deepspeed={ZERO: zero, **dict.fromkeys(OPEN_KEYS)}), on_gpu=False)


def two_networks() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({f"unet{i}": nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)) for i in (0, 1)})


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_one_optimizer_with_two_rates_is_two_optimizers(name: str, weight_decay: float) -> None:
    """Clipped over both networks jointly, as the authors do with an optimizer for each."""
    optim = OptimSection(name=name, lr=1e-2, noise_lr=3e-3, weight_decay=weight_decay)
    one, other = two_networks(), two_networks()
    shared = {"betas": optim.betas, "eps": optim.eps, "weight_decay": weight_decay}
    groups, ratios = parameter_groups(one, optim)
    together = [OPTIMIZERS[name](groups, lr=optim.lr, **shared)]
    for group, ratio in zip(together[0].param_groups, ratios, strict=True):
        group["lr"] = optim.lr * ratio
    apart = [
        OPTIMIZERS[name](other["unet0"].parameters(), lr=1e-2, **shared),
        OPTIMIZERS[name](other["unet1"].parameters(), lr=3e-3, **shared),
    ]
    for step in range(8):
        images = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for nets, optimizers in ((one, together), (other, apart)):
            loss = (nets["unet0"](images) - images).square().sum() + (nets["unet1"](images) + images).abs().sum()
            nets.zero_grad()
            loss.backward()
            assert nn.utils.clip_grad_norm_(nets.parameters(), 1.0) > 1.0
            for optimizer in optimizers:
                optimizer.step()
    for (key, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8, msg=key)
    assert (one["unet1"][0].weight - two_networks()["unet1"][0].weight).abs().max() > 1e-3


def test_every_parameter_is_in_one_group_and_the_second_is_the_second_network() -> None:
    net = build_net(dim=8, dim_mults=(1, 2), num_nets=2)
    (first, second), ratios = parameter_groups(net, OptimSection(lr=1e-4, noise_lr=3e-4))
    assert [id(p) for p in first["params"]] == [id(p) for p in net.get_submodule("unet0").parameters()]
    assert [id(p) for p in second["params"]] == [id(p) for p in net.get_submodule("unet1").parameters()]
    assert ratios == pytest.approx([1.0, 3.0])
    [only], ratios = parameter_groups(net, OptimSection(lr=1e-4))
    assert len(only["params"]) == len(list(net.parameters())) and ratios == [1.0]


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
