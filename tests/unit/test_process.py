"""The forward process, its posterior and the times networks are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.diffusion.process import network_times, posterior, q_sample
from rddm_dist.diffusion.schedule import make_schedule

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "diffusion.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


X0, X_IN, NOISE = golden("inputs/x0"), golden("inputs/x_in"), golden("inputs/eps")
Q_SAMPLES = [name for name in GOLDEN.files if name.startswith("q_sample/")]


@pytest.mark.parametrize("name", Q_SAMPLES)
def test_q_sample_equals_the_published_one(name: str) -> None:
    size, scale, *times = name.split("/")[1].replace("T", "").replace("s", "").replace("t", "").split("_")
    schedule = make_schedule(num_timesteps=int(size), sum_scale=float(scale), parity="official")
    t = torch.tensor([int(time) + 1 for time in times])
    x_t = q_sample(schedule, x0=X0, residual=X_IN - X0, noise=NOISE, t=t)
    torch.testing.assert_close(x_t, golden(name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("times", [(0, 999), (500, 1)])
def test_q_sample_of_generation_equals_the_published_one(times: tuple[int, int]) -> None:
    schedule = make_schedule(kind="ddim", parity="official")
    x_t = q_sample(schedule, x0=X0, residual=-X0, noise=NOISE, t=torch.tensor(times) + 1)
    expected = golden(f"q_sample_ddimconv/gen_T1000_t{times[0]}_{times[1]}")
    torch.testing.assert_close(x_t, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("times", [(0, 999), (500, 1)])
def test_posterior_equals_the_published_one(times: tuple[int, int]) -> None:
    schedule = make_schedule(parity="official")
    t, residual = torch.tensor(times) + 1, X_IN - X0
    x_t = q_sample(schedule, x0=X0, residual=residual, noise=NOISE, t=t)
    prefix = f"q_posterior/t{times[0]}_{times[1]}"
    for ours, name in zip(
        posterior(schedule, x_t=x_t, residual=residual, x0=X0, t=t), ("mean", "var", "logvar"), strict=True
    ):
        torch.testing.assert_close(ours, golden(f"{prefix}/{name}"), rtol=0, atol=1e-5)


def test_row_0_is_the_clean_image_and_the_last_row_the_noisy_input() -> None:
    schedule = make_schedule(sum_scale=0.25)
    x_t = q_sample(schedule, x0=X0, residual=X_IN - X0, noise=NOISE, t=torch.tensor([0, 1000]))
    torch.testing.assert_close(x_t[0], X0[0], rtol=0, atol=0)
    torch.testing.assert_close(x_t[1], X_IN[1] + 0.5 * NOISE[1], rtol=0, atol=1e-6)


def test_q_sample_is_float32_for_bfloat16_images() -> None:
    x0 = X0.bfloat16()
    x_t = q_sample(make_schedule(), x0=x0, residual=X_IN.bfloat16() - x0, noise=NOISE, t=torch.tensor([1, 500]))
    assert x_t.dtype == torch.float32


def test_index_times_start_from_0_for_both_networks() -> None:
    times = network_times(make_schedule(), torch.tensor([1, 1000]))
    assert [time.tolist() for time in times] == [[0.0, 999.0]] * 2
    assert all(time.dtype == torch.float32 for time in times)


@pytest.mark.parametrize(("kind", "name"), [("power", "power"), ("ddim", "ddimconv")])
def test_clock_times_equal_the_published_ones(kind: str, name: str) -> None:
    schedule = make_schedule(kind=kind, parity="official")
    times = network_times(schedule, torch.tensor([301, 801]), "clocks")
    for time, which in zip(times, ("alpha", "beta"), strict=True):
        expected = golden(f"two_time_inputs_{name}_T1000/t_300_800/{which}_time")
        torch.testing.assert_close(time, expected, rtol=1e-6, atol=1e-4)


def test_unknown_time_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="diffusion.time_input=hours.*index, clocks"):
        network_times(make_schedule(), torch.tensor([1]), "hours")
