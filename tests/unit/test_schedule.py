"""Coefficient tables: official buffers to the last digits, exact identities of the clean ones, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import ConfigError
from rddm_dist.diffusion.schedule import Schedule, ddpm_betas, make_schedule, readjust, schedule_from_alpha_bar

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "schedules.npz")
BUFFERS = {
    "alpha": "alphas",
    "alpha_cumsum": "alphas_cumsum",
    "one_minus_alpha_cumsum": "one_minus_alphas_cumsum",
    "beta2": "betas2",
    "beta2_cumsum": "betas2_cumsum",
    "beta_cumsum": "betas_cumsum",
    "posterior_coef1": "posterior_mean_coef1",
    "posterior_coef2": "posterior_mean_coef2",
    "posterior_coef3": "posterior_mean_coef3",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance": "posterior_log_variance_clipped",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "linear_T10_s1": {"num_timesteps": 10},
    "linear_T10_s0.01": {"num_timesteps": 10, "sum_scale": 0.01},
    "linear_T1000_s1": {},
    "linear_T1000_s0.01": {"sum_scale": 0.01},
    "power_ratio1_T10_s1": {"kind": "power", "num_timesteps": 10},
    "power_ratio1_T1000_s1": {"kind": "power"},
    "ddimconv_ctor_T10": {"kind": "ddim", "num_timesteps": 10},
    "ddimconv_ctor_T1000": {"kind": "ddim"},
    "ddimconv_reinit_T1000": {"kind": "ddim"},
    "exp6_reinit_T1000": {"kind": "power", "alpha_power": 2.0, "beta2": "average"},
}
CLEAN: list[dict[str, Any]] = [
    {"num_timesteps": 1},
    {"num_timesteps": 7, "alpha": "average", "beta2": "decreased", "sum_scale": 4.0},
    {"sum_scale": 0.01},
    {"kind": "power", "num_timesteps": 50, "alpha_power": 0.3, "beta2_power": 3.0},
    {"kind": "power", "num_timesteps": 50, "alpha": "normal", "beta2": "average"},
    {"kind": "ddim", "num_timesteps": 100, "sum_scale": 0.5},
    {"kind": "ddim", "betas": "scaled_linear"},
    {"kind": "ddim", "betas": "squaredcos"},
    {"kind": "power", "num_timesteps": 50, "alpha": "increased", "alpha_power": 0.0, "beta2": "normal"},
    {"num_timesteps": 40, "beta2_kind": "ddim", "betas": "scaled_linear", "sum_scale": 2.0},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_official_tables_equal_the_published_buffers(family: str) -> None:
    schedule = make_schedule(**FAMILIES[family], parity="official")
    tolerance = 1e-6 if family.startswith("linear") else 2e-6
    for ours, theirs in BUFFERS.items():
        # The re-initialiser of the converted family copies increment 1 into 0; nothing reads it, ours keeps 0.
        first = 1 if "ddimconv_reinit" in family and ours in ("alpha", "beta2") else 0
        table = getattr(schedule, ours)
        assert table.dtype == torch.float32
        np.testing.assert_allclose(table[1 + first :], GOLDEN[f"{family}/{theirs}"][first:], rtol=0, atol=tolerance)
    # The authors also store beta; here it is the root of beta2 (of the re-initialiser's first increment see above).
    first = 1 if "ddimconv_reinit" in family else 0
    np.testing.assert_allclose(
        schedule.beta2[1 + first :].sqrt(), GOLDEN[f"{family}/betas"][first:], rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("num_timesteps", [10, 1000])
@pytest.mark.parametrize("shape", ["increased", "decreased"])
@pytest.mark.parametrize("power", [0.3, 1.0, 2.0, 3.0])
def test_power_weights_equal_the_published_ones(shape: str, power: float, num_timesteps: int) -> None:
    schedule = make_schedule(kind="power", num_timesteps=num_timesteps, alpha=shape, alpha_power=power)
    expected = GOLDEN[f"gen_power_f32/{shape}_a{power:g}_T{num_timesteps}"]
    np.testing.assert_allclose(schedule.alpha[1:], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("num_timesteps", [10, 1000])
@pytest.mark.parametrize("shape", ["average", "normal"])
def test_even_and_bell_shaped_weights_equal_the_published_ones(shape: str, num_timesteps: int) -> None:
    schedule = make_schedule(kind="power", num_timesteps=num_timesteps, beta2=shape)
    np.testing.assert_allclose(schedule.beta2[1:], GOLDEN[f"gen_power_f32/{shape}_T{num_timesteps}"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("num_timesteps", [10, 1000])
@pytest.mark.parametrize("shape", ["increased", "decreased", "average"])
def test_linear_weights_equal_the_published_ones(shape: str, num_timesteps: int) -> None:
    schedule = make_schedule(num_timesteps=num_timesteps, alpha=shape, beta2=shape)
    for table in (schedule.alpha, schedule.beta2):
        np.testing.assert_allclose(table[1:], GOLDEN[f"gen_linear_f64/{shape}_T{num_timesteps}"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_squared_cosine_betas_equal_the_published_ones(num_timesteps: int) -> None:
    betas = GOLDEN[f"betas_for_alpha_bar/T{num_timesteps}"].astype(np.float64)
    np.testing.assert_allclose(ddpm_betas("squaredcos", num_timesteps), betas, rtol=0, atol=1e-6)
    schedule = make_schedule(kind="ddim", betas="squaredcos", num_timesteps=num_timesteps)
    np.testing.assert_allclose(schedule.beta2_cumsum[1:], 1 - np.cumprod(1 - betas), rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", CLEAN)
def test_clean_tables_satisfy_their_definitions(settings: dict[str, Any]) -> None:
    schedule = make_schedule(**settings)
    alpha_cumsum, beta2_cumsum = schedule.alpha_cumsum.double(), schedule.beta2_cumsum.double()
    assert alpha_cumsum[0] == 0 and beta2_cumsum[0] == 0 and schedule.one_minus_alpha_cumsum[0] == 1
    assert schedule.num_timesteps == settings.get("num_timesteps", 1000) == len(alpha_cumsum) - 1
    torch.testing.assert_close(schedule.alpha.double().cumsum(0), alpha_cumsum, rtol=0, atol=1e-5)
    torch.testing.assert_close(schedule.beta2.double().cumsum(0), beta2_cumsum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(schedule.one_minus_alpha_cumsum.double(), 1 - alpha_cumsum, rtol=0, atol=1e-7)
    torch.testing.assert_close(schedule.beta_cumsum**2, schedule.beta2_cumsum, rtol=1e-6, atol=0)
    if "ddim" not in (settings.get("kind"), settings.get("beta2_kind")):
        assert alpha_cumsum[-1] == pytest.approx(1, abs=1e-7)
        assert schedule.one_minus_alpha_cumsum[-1] == 0
        assert beta2_cumsum[-1] == pytest.approx(settings.get("sum_scale", 1.0), rel=1e-6)


@pytest.mark.parametrize("settings", CLEAN)
def test_posterior_mean_keeps_the_marginal(settings: dict[str, Any]) -> None:
    """Averaged over x_t, the posterior has mean x0 + alpha_cumsum[t-1] residual and variance beta2_cumsum[t-1]."""
    s = make_schedule(**settings)
    t = torch.arange(1, s.num_timesteps + 1)
    of_x0 = s.posterior_coef1[t] + s.posterior_coef3[t]
    of_residual = s.posterior_coef1[t] * s.alpha_cumsum[t] + s.posterior_coef2[t]
    variance = s.posterior_coef1[t] ** 2 * s.beta2_cumsum[t] + s.posterior_variance[t]
    torch.testing.assert_close(of_x0, torch.ones_like(of_x0), rtol=0, atol=1e-6)
    torch.testing.assert_close(of_residual, s.alpha_cumsum[t - 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(variance, s.beta2_cumsum[t - 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [s for s in CLEAN if s.get("num_timesteps", 2) > 1])
def test_two_term_and_three_term_posterior_means_agree(settings: dict[str, Any]) -> None:
    """coef1 x_t + coef2 residual + coef3 x0 = x_t - alpha residual - beta2 / beta_cumsum noise, where x_t has noise."""
    s = make_schedule(**settings)
    residual, noise, x0 = 0.7, -1.3, 0.4
    for t in range(1, s.num_timesteps + 1):
        if s.beta_cumsum[t] == 0:
            continue
        x_t = x0 + s.alpha_cumsum[t] * residual + s.beta_cumsum[t] * noise
        three = s.posterior_coef1[t] * x_t + s.posterior_coef2[t] * residual + s.posterior_coef3[t] * x0
        two = x_t - s.alpha[t] * residual - s.beta2[t] / s.beta_cumsum[t] * noise
        assert three.item() == pytest.approx(two.item(), abs=2e-6)


def test_linear_tables_have_their_closed_forms() -> None:
    schedule, total = make_schedule(sum_scale=0.25), 1000
    t = torch.arange(total + 1, dtype=torch.float64)
    alpha_cumsum = t * (2 * total + 1 - t) / (total * (total + 1))
    torch.testing.assert_close(schedule.alpha_cumsum, alpha_cumsum.float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        schedule.beta2_cumsum, (0.25 * t * (t + 1) / (total * (total + 1))).float(), rtol=1e-6, atol=0
    )


def test_one_minus_alpha_cumsum_keeps_its_precision_near_the_end() -> None:
    """1 - alpha_cumsum[T-k] = k (k + 1) / (T (T + 1)) to float32 precision, though alpha_cumsum itself rounds to 1."""
    schedule = make_schedule(num_timesteps=20_000)
    for k in (1, 2, 3):
        expected = k * (k + 1) / (20_000 * 20_001)
        assert schedule.one_minus_alpha_cumsum[-1 - k].item() == pytest.approx(expected, rel=1e-6)


def test_ddim_conversion_lies_on_the_ddim_circle() -> None:
    """(1 - alpha_cumsum)^2 + beta_cumsum^2 = 1, the inverse of the conversion."""
    schedule = make_schedule(kind="ddim", betas="scaled_linear")
    radius = schedule.one_minus_alpha_cumsum.double() ** 2 + schedule.beta2_cumsum.double()
    torch.testing.assert_close(radius, torch.ones_like(radius), rtol=0, atol=1e-6)


PARTS: list[dict[str, Any]] = [
    {"kind": "linear", "alpha": "average", "beta2": "decreased"},
    {"kind": "power", "alpha_power": 0.3, "beta2_power": 2.0},
    {"kind": "ddim", "betas": "squaredcos"},
]


@pytest.mark.parametrize("parity", ["clean", "official"])
@pytest.mark.parametrize("of_alpha", PARTS)
@pytest.mark.parametrize("of_beta2", PARTS)
def test_alpha_and_beta2_of_any_two_kinds_go_together(
    of_alpha: dict[str, Any], of_beta2: dict[str, Any], parity: str
) -> None:
    """Built as one or readjusted from two, each table is the one its kind has alone, and the posterior fits."""
    settings: dict[str, Any] = {"num_timesteps": 50, "sum_scale": 0.5, "parity": parity}
    first, second = make_schedule(**of_alpha, **settings), make_schedule(**of_beta2, **settings)
    own = {key: value for key, value in of_alpha.items() if key.startswith("alpha")}
    own |= {key: value for key, value in of_beta2.items() if key.startswith("beta2")}
    mixed = make_schedule(
        alpha_kind=of_alpha["kind"], beta2_kind=of_beta2["kind"], betas="squaredcos", **own, **settings
    )
    for schedule in (mixed, readjust(first, beta2=second), readjust(second, alpha=first)):
        for name in ("alpha", "alpha_cumsum", "one_minus_alpha_cumsum", "estimate_alpha_cumsum"):
            assert torch.equal(getattr(schedule, name), getattr(first, name))
        for name in ("beta2", "beta2_cumsum", "beta_cumsum"):
            assert torch.equal(getattr(schedule, name), getattr(second, name))
        for name in BUFFERS:
            torch.testing.assert_close(getattr(schedule, name), getattr(mixed, name), rtol=1e-5, atol=2e-6)
        assert schedule.sum_scale == 0.5 and schedule.parity == parity


@pytest.mark.parametrize("other", PARTS)
def test_a_wholly_readjusted_schedule_is_the_other_one(other: dict[str, Any]) -> None:
    theirs = make_schedule(num_timesteps=50, sum_scale=2.0, **other)
    adjusted = readjust(make_schedule(num_timesteps=50), alpha=theirs, beta2=theirs)
    for name in BUFFERS:
        torch.testing.assert_close(getattr(adjusted, name), getattr(theirs, name), rtol=1e-5, atol=2e-6)
    assert adjusted.sum_scale == 2.0


def test_readjusting_with_nothing_changes_nothing_and_keeping_the_estimate_keeps_it() -> None:
    own, other = make_schedule(kind="ddim", num_timesteps=50), make_schedule(kind="power", num_timesteps=50)
    same = readjust(own)
    for name in BUFFERS:
        torch.testing.assert_close(getattr(same, name), getattr(own, name), rtol=1e-5, atol=2e-6)
    kept = readjust(own, alpha=other, keeps_estimate=True)
    assert torch.equal(kept.alpha_cumsum, other.alpha_cumsum)
    assert torch.equal(kept.estimate_alpha_cumsum, own.alpha_cumsum)
    assert torch.equal(kept.one_minus_alpha_cumsum, own.one_minus_alpha_cumsum)


def test_schedules_of_other_lengths_cannot_readjust() -> None:
    with pytest.raises(ConfigError, match="10 timesteps cannot readjust one of 1000.*sample.schedule"):
        readjust(make_schedule(), alpha=make_schedule(num_timesteps=10))


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos"])
def test_a_schedule_from_alpha_bar_is_the_converted_one(betas: str) -> None:
    converted = make_schedule(kind="ddim", betas=betas, num_timesteps=100)
    ours = schedule_from_alpha_bar(torch.cumprod(1 - ddpm_betas(betas, 100), 0))
    assert all(torch.equal(getattr(ours, name), getattr(converted, name)) for name in BUFFERS)


@pytest.mark.parametrize("alpha_bar", [[0.5, 0.6], [1.5, 0.5], [0.5, 0.0], [], [[0.5]], [float("nan")]])
def test_alpha_bar_of_no_ddpm_is_refused(alpha_bar: list[Any]) -> None:
    with pytest.raises(ConfigError, match="alpha_bar"):
        schedule_from_alpha_bar(torch.tensor(alpha_bar))


def test_moving_a_schedule_keeps_every_table() -> None:
    schedule = make_schedule(num_timesteps=5, parity="official")
    moved = schedule.to("cpu")
    assert isinstance(moved, Schedule) and torch.equal(moved.estimate_alpha_cumsum, schedule.estimate_alpha_cumsum)
    assert moved.parity == "official" and moved.sum_scale == schedule.sum_scale
    assert all(torch.equal(getattr(moved, name), getattr(schedule, name)) for name in BUFFERS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "cosine"}, ["diffusion.schedule.kind=cosine", "linear, power, ddim"]),
        ({"alpha_kind": "cosine"}, ["diffusion.schedule.alpha_kind=cosine", "same, linear, power, ddim"]),
        ({"beta2_kind": "both"}, ["diffusion.schedule.beta2_kind=both", "same, linear"]),
        ({"beta2_kind": "power", "num_timesteps": 1}, ["diffusion.num_timesteps"]),
        ({"alpha": "normal"}, ["diffusion.schedule.alpha=normal", "kind=linear", "average"]),
        ({"beta2": "up"}, ["diffusion.schedule.beta2=up"]),
        ({"kind": "ddim", "betas": "cosine"}, ["diffusion.schedule.betas=cosine", "squaredcos"]),
        ({"parity": "exact"}, ["diffusion.parity=exact", "official"]),
        ({"num_timesteps": 0}, ["diffusion.num_timesteps=0"]),
        ({"kind": "power", "num_timesteps": 1}, ["diffusion.num_timesteps"]),
        ({"sum_scale": 0.0}, ["diffusion.sum_scale=0.0"]),
        ({"sum_scale": math.nan}, ["diffusion.sum_scale=nan"]),
        ({"kind": "power", "alpha_power": -1.0}, ["diffusion.schedule.alpha_power=-1.0"]),
        ({"beta2_power": 2.0}, ["diffusion.schedule.beta2_power=2.0", "kind=power"]),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_schedule(**settings)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
