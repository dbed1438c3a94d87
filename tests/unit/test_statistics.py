"""Intervals and paired differences: they cover what they should, and everybody gets the same digits."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from data_pipeline.rng import mix_seed
from rddm_dist.evaluation import statistics
from rddm_dist.evaluation.statistics import Difference, bootstrap_mean, paired_difference
from rddm_dist.evaluation.summary import summarize


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)


def interval(values: list[float] | np.ndarray, **options: float) -> tuple[float, float]:
    found = bootstrap_mean(values, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_95_percent_of_the_intervals_hold_the_true_mean() -> None:
    samples = normal(0, 400, 80)
    hits = 0
    for sample in samples:
        low, high = interval(sample, resamples=500)
        hits += low <= 0.0 <= high
    # Four standard deviations of the count: 4 sqrt(400 * 0.95 * 0.05) = 17.4.
    assert abs(hits - 0.95 * 400) < 18


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_the_interval_is_the_normal_one_for_many_values(confidence: float) -> None:
    sample = normal(1, 5000)
    low, high = interval(sample, confidence=confidence, resamples=20_000)
    error = sample.std() / math.sqrt(sample.size)
    reach = {0.5: 0.674490, 0.9: 1.644854, 0.99: 2.575829}[confidence]
    assert low == pytest.approx(sample.mean() - reach * error, abs=0.06 * error)
    assert high == pytest.approx(sample.mean() + reach * error, abs=0.06 * error)


@pytest.mark.parametrize("size", [2, 7, 60])
def test_scipy_finds_the_same_interval_up_to_its_own_draws(size: int) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    sample = np.exp(normal(2, size))  # skewed
    low, high = interval(sample, resamples=20_000)
    other = scipy_stats.bootstrap(
        (sample,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(3)
    ).confidence_interval
    error = sample.std() / math.sqrt(size)
    assert (low, high) == (pytest.approx(other.low, abs=0.1 * error), pytest.approx(other.high, abs=0.1 * error))


def test_all_resamples_of_three_values_come_with_their_probability() -> None:
    values = np.array([0.0, 1.0, 10.0])
    means = statistics._resampled_means(values, seed=5, resamples=27_000)
    expected: dict[float, int] = {}
    for draw in itertools.product(values, repeat=3):
        expected[round(sum(draw) / 3, 9)] = expected.get(round(sum(draw) / 3, 9), 0) + 1
    seen = dict(zip(*np.unique(means.round(9), return_counts=True), strict=True))
    assert set(seen) == set(expected)
    for mean, ways in expected.items():
        assert seen[mean] == pytest.approx(1000 * ways, abs=5 * math.sqrt(1000 * ways))


def test_the_draws_are_the_documented_ones() -> None:
    values = normal(4, 5)
    words = np.random.Philox(key=mix_seed(9, "bootstrap")).random_raw(3 * 2)  # ceil(5 / 2) = 3 words, 2 pairs
    halves = [half for word in words.tolist() for half in (word & 0xFFFFFFFF, word >> 32)]
    expected = []
    for pair in range(2):
        places = [halves[6 * pair + word] * 5 // 2**32 for word in range(5)]
        expected += [math.fsum(values[i] for i in places) / 5, math.fsum(values[4 - i] for i in places) / 5]
    assert statistics._resampled_means(values, seed=9, resamples=4) == pytest.approx(expected, abs=1e-15)


def test_neither_order_nor_chunks_change_a_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = normal(5, 301)
    first = interval(sample)
    assert interval(sample[::-1]) == first
    monkeypatch.setattr(statistics, "CHUNK", 1000)
    assert interval(sample) == first
    assert interval(sample, seed=1) != first


def test_values_that_are_not_finite_are_left_out() -> None:
    sample = [1.0, 2.0, 4.0]
    assert interval([math.inf, 1.0, 2.0, math.nan, 4.0, -math.inf]) == interval(sample)


@pytest.mark.parametrize("values", [[], [3.0], [3.0, math.inf], [math.nan] * 5])
def test_fewer_than_two_values_have_no_interval(values: list[float]) -> None:
    assert bootstrap_mean(values) is None


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bootstrap_mean([0.1] * 7) == (0.1, 0.1)


def test_an_interval_moves_and_scales_with_the_values() -> None:
    sample = normal(6, 50)
    low, high = interval(sample)
    assert interval(3.0 * sample + 20.0) == (pytest.approx(3 * low + 20), pytest.approx(3 * high + 20))


@pytest.mark.parametrize("size", [2, 3, 4, 57, 1200])
def test_the_interval_of_the_negated_values_is_the_mirror_image_digit_by_digit(size: int) -> None:
    for sample in (normal(12, size), np.exp(normal(13, size)) - 2.5, 20.0 + normal(14, size) / 3):
        for options in ({}, {"confidence": 0.9, "seed": 3, "resamples": 62}):
            low, high = interval(sample, **options)
            assert low < high
            assert interval(-sample, **options) == (-high, -low)


def test_values_that_are_their_own_mirror_image_have_such_an_interval() -> None:
    low, high = interval([-3.0, -0.1, 0.1, 3.0])
    assert low == -high < 0


def test_fifty_thousand_values_take_seconds() -> None:
    started = time.monotonic()
    interval(normal(7, 50_000))
    assert time.monotonic() - started < 20  # about one second on an idle core


@pytest.mark.parametrize("options", [{"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}, {"resamples": 3}])
def test_senseless_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="confidence in"):
        bootstrap_mean([1.0, 2.0], **options)  # type: ignore[arg-type]


def test_a_difference_counts_better_equal_and_worse_images() -> None:
    a, b = [3.0, 2.0, 1.0, 5.0], [1.0, 2.0, 4.0, 4.0]
    higher = paired_difference(a, b)
    assert (higher.mean, higher.better, higher.equal, higher.worse, higher.count) == (0.0, 2, 1, 1, 4)
    lower = paired_difference(a, b, better="lower")
    assert (lower.mean, lower.better, lower.equal, lower.worse) == (0.0, 1, 1, 2)
    assert (higher.low, higher.high) == bootstrap_mean([2.0, 0.0, -3.0, 1.0])


def test_pairs_with_a_value_that_is_not_finite_are_left_out_and_counted() -> None:
    a, b = [math.inf, 3.0, math.inf, 2.0, 7.0], [math.inf, 1.0, 5.0, math.nan, 6.0]
    found = paired_difference(a, b)
    assert (found.mean, found.count, found.left_out, found.better) == (1.5, 2, 3, 2)


def test_swapping_the_sides_turns_a_difference_round() -> None:
    a, b = normal(8, 40), 10.0 ** normal(9, 40)
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.mean is not None and there.low is not None and there.high is not None
    assert (back.mean, back.low, back.high) == (-there.mean, -there.high, -there.low)
    assert (there.better, there.worse) == (back.worse, back.better)


def test_the_gain_of_a_report_is_the_difference_to_its_input_digit_by_digit() -> None:
    psnr, before = (30.0 + normal(15, 2, 500)).tolist()
    gain = summarize([a - b for a, b in zip(psnr, before, strict=True)])
    there, back = paired_difference(psnr, before), paired_difference(before, psnr)
    assert (there.mean, there.low, there.high) == (gain["mean"], gain["low"], gain["high"])
    assert (back.mean, back.low, back.high) == (-gain["mean"], -gain["high"], -gain["low"])


def test_pairing_narrows_the_interval_where_images_are_hard_for_both() -> None:
    hardness, noise = 5.0 * normal(10, 100), normal(11, 2, 100)
    a, b = hardness + 0.1 * noise[0] + 0.2, hardness + 0.1 * noise[1]
    paired = paired_difference(a, b)
    assert paired.low is not None and paired.low > 0.1
    assert interval(a)[0] < b.mean()  # unpaired, nothing could be said


@pytest.mark.parametrize("values", [[], [1.0]])
def test_a_difference_of_fewer_than_two_images_has_no_interval(values: list[float]) -> None:
    count = len(values)
    mean = 0.0 if values else None
    assert paired_difference(values, values) == Difference(mean, None, None, 0, count, 0, count, 0)


def test_sides_of_different_length_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="got 2 and 1 values"):
        paired_difference([1.0, 2.0], [1.0])
