"""Power-function profiles, and averages rebuilt from snapshots against averages that were really tracked."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.training.posthoc import (
    RESOLUTION,
    Reconstruction,
    gamma_of,
    length_of,
    power_decay,
    reconstruction,
    stride,
    updated_at,
)

LENGTHS = [0.001, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.288]


def masses(step: int, length: float, *, steps: int) -> Tensor:
    """What the recursion itself gives to steps 1..`steps` in the average at `step`.   -> (steps,) float64"""
    shares = torch.zeros(steps, dtype=torch.float64)
    for tau in range(1, step + 1):
        decay = power_decay(tau, length)
        assert decay is not None
        shares *= decay
        shares[tau - 1] = 1.0 - decay
    return shares


def every(interval: int, steps: int, lengths: tuple[float, ...] = (0.05, 0.1)) -> list[tuple[int, float]]:
    return [(step, length) for step in range(interval, steps + 1, interval) for length in lengths]


def combine(made: Reconstruction, averages: Tensor) -> Tensor:
    return torch.tensor(made.weights, dtype=torch.float64) @ averages


@pytest.mark.parametrize("length", LENGTHS)
def test_gamma_and_length_are_inverse(length: float) -> None:
    assert length_of(gamma_of(length)) == pytest.approx(length, rel=1e-14)


@pytest.mark.parametrize("gamma", [1e-9, 0.1, 1.0, 6.94, 16.97, 1e3, 1e6])
def test_length_and_gamma_are_inverse(gamma: float) -> None:
    assert gamma_of(length_of(gamma)) == pytest.approx(gamma, rel=1e-12, abs=1e-14)


def test_a_longer_average_has_a_smaller_exponent() -> None:
    gammas = [gamma_of(length) for length in LENGTHS]
    assert gammas == sorted(gammas, reverse=True) and gammas[-1] > 0.0


@pytest.mark.parametrize("length", [0.03, 0.1, 0.25])
def test_the_relative_length_is_the_spread_of_the_steps_averaged(length: float) -> None:
    steps = 5000
    shares = masses(steps, length, steps=steps)
    middle = torch.arange(1, steps + 1, dtype=torch.float64) - 0.5
    mean = shares @ middle
    assert float((shares @ (middle - mean) ** 2).sqrt()) / steps == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("length", [0.03, 0.1, 0.25])
def test_the_recursion_gives_each_step_the_power_function_over_it(length: float) -> None:
    steps, power = 300, gamma_of(length) + 1.0
    tau = torch.arange(0, steps + 1, dtype=torch.float64) / steps
    shares = masses(steps, length, steps=steps)
    torch.testing.assert_close(shares, (tau**power).diff(), rtol=1e-9, atol=0.0)
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-13)


def test_the_first_update_copies() -> None:
    assert all(power_decay(1, length) == 0.0 for length in LENGTHS)
    assert all(0.0 < power_decay(2, length) < power_decay(3, length) < 1.0 for length in LENGTHS[1:])


@pytest.mark.parametrize("length", [0.0, -0.1, 12**-0.5, 0.3, float("nan"), float("inf")])
def test_a_length_outside_the_range_is_refused_with_the_flag_to_change(length: float) -> None:
    with pytest.raises(ConfigError, match=r"above 0 and below 0\.2887.*--length"):
        reconstruction([(10, 0.05)], step=10, length=length)


@pytest.mark.parametrize(
    ("stored", "hint"), [([], "ema.snapshot_every"), ([(40, 0.1), (20, 0.1)], "the first is of step 20")]
)
def test_nothing_to_make_an_average_from_is_refused(stored: list[tuple[int, float]], hint: str) -> None:
    with pytest.raises(ConfigError, match=f"at or before step 19: .*{hint}"):
        reconstruction(stored, step=19, length=0.1)


@pytest.mark.parametrize("length", [0.05, 0.1])
@pytest.mark.parametrize("step", [20, 200, 400])
def test_a_stored_average_is_its_own_reconstruction(length: float, step: int) -> None:
    stored = every(20, 400)
    made = reconstruction(stored, step=step, length=length)
    for place, weight in zip(stored, made.weights, strict=True):
        assert weight == pytest.approx(float(place == (step, length)), abs=1e-10), place
    assert made.error < 1e-12


def test_later_averages_are_not_used() -> None:
    stored = every(20, 400)
    made = reconstruction(stored, step=210, length=0.07)
    assert all((weight == 0.0) == (step > 210) for (step, _), weight in zip(stored, made.weights, strict=True))
    early = reconstruction([place for place in stored if place[0] <= 210], step=210, length=0.07)
    assert [weight for weight in made.weights if weight] == list(early.weights) and made.error == early.error


def test_one_average_is_all_there_is_to_give() -> None:
    made = reconstruction([(10, 0.05)], step=17, length=0.2)
    assert made.weights == (1.0,)
    wanted = masses(17, 0.2, steps=17)
    distance = torch.linalg.vector_norm(masses(10, 0.05, steps=17) - wanted) / torch.linalg.vector_norm(wanted)
    assert made.error == pytest.approx(float(distance), rel=1e-12)


@pytest.mark.parametrize(("step", "length"), [(400, 0.03), (400, 0.07), (400, 0.2), (200, 0.15), (215, 0.07)])
def test_no_other_mean_of_the_stored_averages_is_nearer(step: int, length: float) -> None:
    """The reported error is that of the explicit profiles, and moving any weight to another raises it."""
    stored = [place for place in every(20, 400) if place[0] <= step]
    made = reconstruction(stored, step=step, length=length)
    assert sum(made.weights) == pytest.approx(1.0, abs=1e-12)
    columns = torch.stack([masses(at, of, steps=step) for at, of in stored])
    wanted = masses(step, length, steps=step)
    residual = combine(made, columns) - wanted
    assert made.error == pytest.approx(float(residual.norm() / wanted.norm()), rel=1e-9)
    slopes = columns @ residual  # of half the squared distance by each weight: alike in all at the least one
    assert float(slopes.max() - slopes.min()) < 1e-12


# Distance of the rebuilt to the tracked average, relative to the one between the tracked average and the last weights.
# At the end 20 snapshots of each length stand behind it, in the middle 10.
@pytest.mark.parametrize(
    ("length", "at_end", "in_middle"), [(0.03, 0.02, 0.1), (0.07, 1e-3, 5e-3), (0.15, 1e-3, 5e-3), (0.2, 5e-3, 0.02)]
)
def test_a_rebuilt_average_is_the_one_that_was_tracked(length: float, at_end: float, in_middle: float) -> None:
    steps = 400
    generator = torch.Generator().manual_seed(5)
    walk = 100.0 + torch.randn(steps, 500, generator=generator, dtype=torch.float64).cumsum(0)
    stored = every(20, steps)
    averages = torch.stack([masses(at, of, steps=steps) @ walk for at, of in stored])
    for step, bound in [(steps, at_end), (steps // 2, in_middle)]:
        tracked = masses(step, length, steps=steps) @ walk
        rebuilt = combine(reconstruction(stored, step=step, length=length), averages)
        assert float((rebuilt - tracked).norm()) < bound * float((tracked - walk[step - 1]).norm())


def test_weights_that_never_change_come_back_unchanged() -> None:
    for step, length in [(400, 0.03), (7, 0.2), (333, 0.28), (20, 0.01)]:
        made = reconstruction([(5, 0.05), (6, 0.1), *every(20, 400)], step=step, length=length)
        assert sum(made.weights) == pytest.approx(1.0, abs=1e-12)


def test_denser_snapshots_rebuild_more_closely() -> None:
    errors = [reconstruction(every(interval, 400), step=400, length=0.07).error for interval in (100, 40, 20, 10)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 < errors[0]


@pytest.mark.parametrize("length", [0.02, 0.07, 0.15, 0.25])
def test_hundreds_of_snapshots_do_not_blow_up_the_rounding_of_what_is_stored(length: float) -> None:
    """Averages stored in fp32 carry its rounding into the result, magnified by the sum of |weights| at most."""
    for stored in (every(100, 20000), every(100, 10000) * 2, every(1, 100)):
        made = reconstruction(stored, step=stored[-1][0], length=length)
        assert sum(map(abs, made.weights)) < 100.0
        assert made.error < 0.02


def test_close_lengths_do_not_blow_up_the_weights_either() -> None:
    made = reconstruction(every(100, 10000, (0.05, 0.0501)) * 2, step=10000, length=0.07)
    assert sum(map(abs, made.weights)) < 1e3 and made.error < 1e-2


@pytest.mark.parametrize("length", [0.005, 0.07])
def test_a_million_steps_and_hundreds_of_snapshots_take_seconds(length: float) -> None:
    """Short averages give early steps masses below the smallest float64: they count as 0 and spoil nothing."""
    begin = time.perf_counter()
    made = reconstruction([*every(6250, 10**6), (1, 0.05), (2, 0.01)], step=10**6, length=length)
    assert time.perf_counter() - begin < 5.0
    assert sum(made.weights) == pytest.approx(1.0, abs=1e-10)
    assert 0.0 < made.error < (1e-3 if length == 0.07 else 1.0)


@pytest.mark.parametrize("length", [0.05, 0.2])
def test_updates_grow_rarer_and_their_decays_still_telescope(length: float) -> None:
    """The share of the first update is (1 / t)^(gamma + 1) at every update step t, over three changes of the stride."""
    first, share, last = 1, 1.0, 0
    for step in range(1, 5 * 2 * RESOLUTION):
        decay = power_decay(step, length)
        assert (decay is None) == (updated_at(step) != step)
        if decay is None:
            assert updated_at(step) == last
            continue
        share *= decay if step > first else 1.0
        last = step
        assert share == pytest.approx(step ** -(gamma_of(length) + 1.0), rel=1e-9, abs=0.0)
    assert {stride(step) for step in range(1, 5 * 2 * RESOLUTION)} == {1, 2, 4, 8}


def test_a_long_average_in_fp32_follows_weights_that_hardly_move() -> None:
    """Updates at every step would be below the rounding of the average, which then stands still."""
    length, steps, noise = 0.2, 30_000, 1e-4
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=generator, dtype=torch.float64)
    average, exact = torch.zeros(64), torch.zeros(64, dtype=torch.float64)
    for step in range(1, steps + 1):
        drift = 10 * noise * step / steps
        weights = base + noise * torch.randn(64, generator=generator, dtype=torch.float64) + drift
        decay = power_decay(step, length)
        if decay is not None:
            average.lerp_(weights.float(), 1.0 - decay)
        exact.lerp_(weights, 1.0 - (1.0 - 1.0 / step) ** (gamma_of(length) + 1.0))
    assert (average - exact).norm() < 0.05 * (exact - weights).norm()
