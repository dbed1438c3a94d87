"""DDIM and RDDM: published coefficients and trajectories of converted networks, and where the two are the same."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.ddim import (
    converted_prediction,
    converted_timesteps,
    ddpm_coefficients,
    rddm_coefficients,
    sample_converted,
)
from rddm_dist.diffusion.process import ddpm_alpha_bar
from rddm_dist.diffusion.schedule import Schedule, ddpm_betas, make_schedule, readjust, schedule_from_alpha_bar
from tests.support.diffusion import GOLDEN_DIR, NOISE, X0, Fake, PatternDraws, pattern

GOLDEN = np.load(GOLDEN_DIR / "ddim_to_rddm.npz")
SUMMARY = json.loads((GOLDEN_DIR / "ddim_to_rddm.json").read_text())
SHAPE = (2, 3, 4, 4)
CONVERTED = make_schedule(kind="ddim")


def fake_noise(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
    """The network of the reference numbers."""
    return [0.9 * x_t + 0.05 * times[0].reshape(-1, 1, 1, 1) / 1000]


def trajectory(schedule: Schedule, net: Fake = fake_noise, **settings: Any) -> Tensor:
    """All states, the start first; the stochastic noise is the same at every step, as in the reference numbers."""
    states: list[Tensor] = []
    result = sample_converted(
        net,
        schedule,
        shape=SHAPE,
        draws=PatternDraws(phase=1.0),  # type: ignore[arg-type]
        on_step=lambda k, x, prediction: states.append(x),
        **settings,
    )
    assert torch.equal(result, states[-1])
    return torch.stack(states)


def settings_of(tag: str) -> dict[str, Any]:
    """S5_eta0_clip1_useclip0 -> the arguments of sample_converted."""
    steps, eta, clip, rederive = tag.split("_")
    return {
        "steps": int(steps[1:]),
        "eta": float(eta.removeprefix("eta")),
        "clip_range": 1.0 if clip == "clip1" else None,
        "rederives_noise": rederive == "useclip1",
    }


def test_the_start_is_the_published_one() -> None:
    np.testing.assert_array_equal(pattern(SHAPE, 0.9, 0.2, np.cos), GOLDEN["inputs/x_T"])


def test_coefficients_equal_the_published_ones() -> None:
    """Published in float32 from a float32 product, whose rounding the root magnifies at the start: 2e-6."""
    alpha_bar = torch.cumprod(1 - ddpm_betas("linear", 1000), 0)
    np.testing.assert_allclose(alpha_bar, GOLDEN["coef/alphas_cumprod"], rtol=0, atol=2e-6)
    alpha_cumsum, beta_cumsum = rddm_coefficients(alpha_bar)
    for table, name in ((alpha_cumsum, "alphas_cumsum_res"), (beta_cumsum, "betas_cumsum_res")):
        np.testing.assert_allclose(table, GOLDEN[f"coef/{name}"], rtol=0, atol=2e-6)
    minus_one = GOLDEN["coef/alphas_cumprod_minus_one_res"]
    np.testing.assert_allclose(-CONVERTED.one_minus_alpha_cumsum[1:], minus_one, rtol=0, atol=2e-6)
    kept = readjust(CONVERTED, alpha=make_schedule(kind="power", alpha_power=0.3), keeps_estimate=True)
    adjusted = GOLDEN["coef/alphas_cumsum_res_adjust_decreased_a0.3"]
    np.testing.assert_allclose(kept.alpha_cumsum[1:], adjusted, rtol=0, atol=2e-6)
    np.testing.assert_allclose(-kept.one_minus_alpha_cumsum[1:], minus_one, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["ddim", "rddm"])
@pytest.mark.parametrize("tag", [name.removeprefix("ddim/") for name in GOLDEN.files if name.startswith("ddim/")])
def test_trajectories_equal_the_published_ones(tag: str, method: str) -> None:
    states = trajectory(CONVERTED, method=method, **settings_of(tag))
    np.testing.assert_allclose(states, GOLDEN[f"{method}/{tag}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in GOLDEN.files if name.startswith("rddm_adjust_alpha/")])
def test_trajectories_with_readjusted_alpha_equal_the_published_ones(name: str) -> None:
    shape, power, tag = name.removeprefix("rddm_adjust_alpha/").split("_", 2)
    alpha = make_schedule(kind="power", alpha=shape, alpha_power=float(power[1:]))
    states = trajectory(readjust(CONVERTED, alpha=alpha, keeps_estimate=True), **settings_of(f"{tag}_useclip0"))
    np.testing.assert_allclose(states, GOLDEN[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tag", SUMMARY)
def test_ddim_and_rddm_differ_by_as_much_as_was_published(tag: str) -> None:
    """Nothing where nothing is clamped or the noise is rederived, else the published amount.

    "original-our(to_RDDM=0)" compares two versions of the authors' scheduler and has no counterpart here.
    """
    expected, settings = SUMMARY[tag], settings_of(tag)
    visited = [t - 1 for t in converted_timesteps(1000, settings["steps"])]
    if "..." in expected["timesteps"]:
        first, last = expected["timesteps"][:2], expected["timesteps"][-1]
        assert visited[:2] == first and visited[-1] == last and len(visited) == settings["steps"]
    else:
        assert visited == expected["timesteps"]
    apart = (trajectory(CONVERTED, method="ddim", **settings) - trajectory(CONVERTED, **settings)).abs()
    for measured, key in ((apart[-1].max(), "final"), (apart.max(), "over path")):
        assert measured.item() == pytest.approx(expected[f"max|DDIM-RDDM| {key}"], abs=1e-4)
    is_same = settings["clip_range"] is None or settings["rederives_noise"]
    assert (apart.max() < 2e-5) == is_same


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos"])
@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_ddim_to_rddm_to_ddim_is_the_identity(betas: str, num_timesteps: int) -> None:
    alpha_bar = torch.cumprod(1 - ddpm_betas(betas, num_timesteps), 0)
    torch.testing.assert_close(ddpm_coefficients(*rddm_coefficients(alpha_bar)), alpha_bar, rtol=1e-8, atol=1e-15)
    schedule = schedule_from_alpha_bar(alpha_bar)
    alpha_cumsum, beta_cumsum = rddm_coefficients(alpha_bar)
    assert torch.equal(schedule.alpha_cumsum[1:], alpha_cumsum.float())
    torch.testing.assert_close(schedule.beta_cumsum[1:], beta_cumsum.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ddpm_alpha_bar(schedule)[1:], alpha_bar, rtol=1e-6, atol=0)
    back = ddpm_coefficients(schedule.alpha_cumsum, schedule.beta_cumsum)
    torch.testing.assert_close(back[1:], alpha_bar, rtol=0, atol=1e-6)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos"])
@pytest.mark.parametrize(("clip_range", "rederives_noise"), [(None, False), (None, True), (1.0, True), (0.3, True)])
def test_ddim_is_converted_rddm_without_clamping_or_with_rederived_noise(
    betas: str, clip_range: float | None, rederives_noise: bool
) -> None:
    schedule = make_schedule(kind="ddim", betas=betas, num_timesteps=60)
    for steps, eta in itertools.product((1, 4, 60), (0.0, 0.3, 1.0)):
        settings: dict[str, Any] = {
            "steps": steps,
            "eta": eta,
            "clip_range": clip_range,
            "rederives_noise": rederives_noise,
        }
        ddim, rddm = (trajectory(schedule, method=method, **settings) for method in ("ddim", "rddm"))
        torch.testing.assert_close(rddm, ddim, rtol=1e-5, atol=2e-5)


def test_plain_clamping_leaves_what_was_cut_off_in_the_state() -> None:
    """One step apart, rddm - ddim = (1 - alpha_t) (unclamped x0 - clamped x0)."""
    settings: dict[str, Any] = {"steps": 5, "clip_range": 0.5}
    states = [trajectory(CONVERTED, method=method, **settings) for method in ("ddim", "rddm")]
    kept, x = float(CONVERTED.one_minus_alpha_cumsum[801]), states[0][0]
    noise = fake_noise(x, (torch.full((2,), 800.0),) * 2, x, None, None)[0]
    x0 = (x - float(CONVERTED.beta_cumsum[801]) * noise) / kept
    cut_off = kept * (x0 - x0.clamp(-0.5, 0.5))
    assert cut_off.abs().max() > 0.01
    torch.testing.assert_close(states[1][1] - states[0][1], cut_off, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["ddim", "rddm"])
def test_an_oracle_restores_x0(method: str) -> None:
    """A network that knows the noise of x0 in every state."""
    schedule = make_schedule(kind="ddim", num_timesteps=60)

    def net(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
        assert torch.equal(x_in, torch.zeros_like(x_t)) and mask is None and x_self is None
        t = int(times[0][0]) + 1
        return [(x_t - schedule.one_minus_alpha_cumsum[t] * X0) / schedule.beta_cumsum[t]]

    for steps, eta, clip_range, rederives in itertools.product((1, 7, 60), (0.0, 1.0), (None, 1.0), (False, True)):
        x = sample_converted(
            net,
            schedule,
            shape=SHAPE,
            steps=steps,
            draws=Draws(seed=3, ids=torch.tensor([1, 2])),
            eta=eta,
            clip_range=clip_range,
            rederives_noise=rederives,
            method=method,
        )
        torch.testing.assert_close(x, X0, rtol=0, atol=1e-4)


def test_a_prediction_is_clamped_in_residual_and_x0_and_its_noise_follows() -> None:
    t = 500
    kept, beta = float(CONVERTED.one_minus_alpha_cumsum[t]), float(CONVERTED.beta_cumsum[t])
    x_t = kept * X0 + beta * NOISE
    settings: dict[str, Any] = {"schedule": CONVERTED, "x_t": x_t, "t": t}
    plain = converted_prediction(NOISE, clip_range=None, rederives_noise=False, **settings)
    torch.testing.assert_close(plain.x0, X0, rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.residual, -X0, rtol=0, atol=1e-5)
    clamped = converted_prediction(NOISE, clip_range=0.2, rederives_noise=True, **settings)
    torch.testing.assert_close(clamped.x0, X0.clamp(-0.2, 0.2), rtol=0, atol=1e-5)
    torch.testing.assert_close(clamped.residual, -clamped.x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept * clamped.x0 + beta * clamped.noise, x_t, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"kind": "power"}, {"kind": "ddim", "sum_scale": 0.5}, {"alpha_kind": "ddim"}],
)
def test_coefficients_of_no_ddpm_are_refused(settings: dict[str, Any]) -> None:
    schedule = make_schedule(**settings)
    for refuse in (
        lambda: ddpm_coefficients(schedule.alpha_cumsum, schedule.beta_cumsum),
        lambda: trajectory(schedule, steps=5),
    ):
        with pytest.raises(ConfigError, match=r"no DDPM.*\(1 - alpha_cumsum\)\^2.*kind=ddim") as error:
            refuse()
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="alpha_bar"):
        rddm_coefficients(torch.tensor([1.1]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, ["steps=0", "1..1000"]),
        ({"steps": 1001}, ["steps=1001", "sample.steps"]),
        ({"eta": 1.01}, ["eta=1.01", "0..1", "sample.eta"]),
        ({"method": "euler"}, ["method=euler", "rddm, ddim"]),
        ({"clip_range": 0.0}, ["clip_range=0.0", "above 0"]),
        ({"clip_range": float("nan")}, ["clip_range=nan"]),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        trajectory(CONVERTED, **{"steps": 5, **settings})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_schedules_that_conversion_cannot_use_are_refused() -> None:
    adjusted = readjust(CONVERTED, alpha=make_schedule(), keeps_estimate=True)
    with pytest.raises(ConfigError, match="method=ddim knows no readjusted schedule"):
        trajectory(adjusted, steps=5, method="ddim")
    with pytest.raises(ConfigError, match="diffusion.parity=clean"):
        trajectory(make_schedule(kind="ddim", parity="official"), steps=5)
    with pytest.raises(ConfigError, match="needs 1 network outputs"):
        trajectory(CONVERTED, lambda x_t, *_: [x_t, x_t], steps=5)
