"""The forward process, its posterior and the times networks are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import ConfigError
from rddm_dist.diffusion.process import (
    check_process,
    ddpm_alpha_bar,
    levels_at,
    network_times,
    posterior,
    process_input,
    q_sample,
    times_of_levels,
)
from rddm_dist.diffusion.schedule import gather, make_schedule, readjust
from tests.support.diffusion import GOLDEN, NOISE, SCALARS, X0, X_IN, golden, pattern

Q_SAMPLES = [name for name in GOLDEN.files if name.startswith("q_sample/")]


def test_the_inputs_of_the_reference_numbers_are_the_described_patterns() -> None:
    shape = (2, 3, 4, 4)
    assert torch.equal(X0, 0.8 * pattern(shape, 0.37, 0.1, np.sin))
    assert torch.equal(X_IN, 0.9 * pattern(shape, 0.23, 0.7, np.sin))
    assert torch.equal(NOISE, 1.1 * pattern(shape, 1.7, 0.3, np.cos))
    assert torch.equal(golden("inputs/mask"), (pattern(shape, 0.5, 0.0, np.sin) > 0).float())


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


@pytest.mark.parametrize("times", [(0, 999), (500, 1)])
def test_two_term_posterior_mean_equals_the_published_one(times: tuple[int, int]) -> None:
    """x_t - alpha residual - beta2 / beta_cumsum noise, which equals the three-term mean where all three agree."""
    schedule, t = make_schedule(parity="official"), torch.tensor(times) + 1
    x_t = q_sample(schedule, x0=X0, residual=X_IN - X0, noise=NOISE, t=t)
    of_noise = gather(schedule.beta2, t) / gather(schedule.beta_cumsum, t)
    mean = x_t - gather(schedule.alpha, t) * (X_IN - X0) - of_noise * NOISE
    expected = golden(f"q_posterior/t{times[0]}_{times[1]}/mean_from_res_noise")
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-5)
    three_term = posterior(schedule, x_t=x_t, residual=X_IN - X0, x0=X0, t=t)[0]
    torch.testing.assert_close(mean, three_term, rtol=0, atol=1e-5)


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


def test_clock_times_of_the_visited_timesteps_equal_the_published_ones() -> None:
    schedule = make_schedule(kind="power", parity="official")
    told = network_times(schedule, torch.tensor([1000, 800, 600, 400, 200]), "clocks")
    expected = torch.tensor(SCALARS["times_fed"]["exp4_times_fed_to_nets"])
    torch.testing.assert_close(torch.stack(told, dim=1), expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "power", "ddim"])
@pytest.mark.parametrize("time_input", ["index", "clocks"])
def test_levels_of_a_timestep_tell_its_times(kind: str, time_input: str) -> None:
    """Where the tables rise; a plateau belongs to its latest timestep."""
    schedule = make_schedule(kind=kind, num_timesteps=30, sum_scale=0.5 if kind == "power" else 1.0)
    for t in range(2, 29):
        levels = (float(schedule.alpha_cumsum[t]), float(schedule.beta_cumsum[t]))
        told = times_of_levels(schedule, alpha_cumsum=levels[0], beta_cumsum=levels[1], time_input=time_input)
        expected = [float(time) for time in network_times(schedule, torch.tensor([t]), time_input)]
        assert told == pytest.approx(expected, abs=1e-5)


def test_levels_between_and_beyond_the_rows_tell_times_between_and_at_the_ends() -> None:
    schedule = make_schedule(num_timesteps=4, alpha="average", beta2="average")
    assert times_of_levels(schedule, alpha_cumsum=0.625, beta_cumsum=1.0) == pytest.approx((1.5, 3.0))
    assert times_of_levels(schedule, alpha_cumsum=0.0, beta_cumsum=0.0) == (0.0, 0.0)
    assert times_of_levels(schedule, alpha_cumsum=1.5, beta_cumsum=0.1) == (3.0, 0.0)


def test_levels_are_the_rows_of_the_tables_and_know_the_estimate_of_a_readjusted_schedule() -> None:
    own, other, t = make_schedule(kind="ddim"), make_schedule(kind="power"), torch.tensor([3, 700])
    levels = levels_at(readjust(own, alpha=other, keeps_estimate=True), t)
    assert torch.equal(levels.alpha_cumsum, gather(other.alpha_cumsum, t))
    assert torch.equal(levels.beta_cumsum, gather(own.beta_cumsum, t))
    assert torch.equal(levels.estimate_alpha_cumsum, gather(own.alpha_cumsum, t))
    assert torch.equal(levels.one_minus_alpha_cumsum, gather(own.one_minus_alpha_cumsum, t))


def test_the_ddpm_process_ends_in_nothing_and_rddm_in_the_degraded_image() -> None:
    assert process_input("rddm", X_IN) is X_IN
    assert torch.equal(process_input("ddpm", X_IN), torch.zeros_like(X_IN))


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos"])
def test_states_of_the_ddpm_process_are_those_of_a_ddpm(betas: str) -> None:
    """sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise."""
    schedule, t = make_schedule(kind="ddim", betas=betas), torch.tensor([10, 990])
    check_process(schedule, "ddpm")
    kept = ddpm_alpha_bar(schedule)[t].reshape(-1, 1, 1, 1)
    x_t = q_sample(schedule, x0=X0, residual=process_input("ddpm", X_IN) - X0, noise=NOISE, t=t)
    torch.testing.assert_close(x_t, (kept.sqrt() * X0 + (1 - kept).sqrt() * NOISE).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "process", "words"),
    [
        ({}, "diffusion", ["diffusion.process=diffusion", "rddm, ddpm"]),
        ({}, "ddpm", ["diffusion.process=ddpm", "kind=ddim", "sum_scale=1"]),
        ({"kind": "ddim", "sum_scale": 0.5}, "ddpm", ["diffusion.process=ddpm", "sum_scale=1"]),
        ({"kind": "ddim", "parity": "official"}, "ddpm", ["diffusion.process=ddpm", "parity=clean"]),
    ],
)
def test_processes_that_cannot_run_are_refused_by_name(
    settings: dict[str, Any], process: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        check_process(make_schedule(**settings), process)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_unknown_process_is_refused_where_it_is_used() -> None:
    with pytest.raises(ConfigError, match="diffusion.process=heat.*rddm, ddpm"):
        process_input("heat", X_IN)


def test_unknown_time_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="diffusion.time_input=hours.*index, clocks"):
        times_of_levels(make_schedule(), alpha_cumsum=1.0, beta_cumsum=1.0, time_input="hours")
    with pytest.raises(ConfigError, match="diffusion.time_input=hours.*index, clocks"):
        network_times(make_schedule(), torch.tensor([1]), "hours")
