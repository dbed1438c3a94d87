"""What a mean over images is worth: bootstrap intervals and paired differences, the same digits for everybody."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_pipeline.rng import mix_seed

CONFIDENCE, RESAMPLES = 0.95, 2000
CHUNK = 1 << 20  # indices drawn at once, some 30 MB of work space

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Difference:
    """Per-image differences a - b of a metric, over the images that have a finite value on both sides.

    mean: None without such an image; low, high: bootstrap interval of the mean, None for fewer than two;
    better, equal, worse: images on which a is better than b, equal to it, worse; count: their sum;
    left_out: images with a value that is not finite (restored exactly, not a number) on either side.
    """

    mean: float | None
    low: float | None
    high: float | None
    better: int
    equal: int
    worse: int
    count: int
    left_out: int


def bootstrap_mean(
    values: Values, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of the finite values.   values: (N,)  ->  (low, high), None for N < 2

    Efron, Tibshirani: An Introduction to the Bootstrap, 1993, chapter 13: quantiles (1 -+ confidence) / 2, linearly
    interpolated, of the means of `resamples` (an even number) draws of N values with replacement. Neither the order of
    the values nor other data matter, so whoever has the values gets the interval. Draws come in pairs: of pair r, one
    takes the sorted values at i = floor(w N / 2^32) for the N 32-bit words w from place 2 r ceil(N / 2) on of Philox
    4x64-10 (the stream of numpy.random.Philox, low half of each 64-bit word first) under the key mix_seed(seed,
    "bootstrap"), and the other, its mirror image, those at N - 1 - i (Hall: Antithetic resampling for the bootstrap,
    Biometrika 76, 1989). So the interval of -values is (-high, -low), digit by digit.
    """
    if not 0 < confidence < 1 or resamples < 2 or resamples % 2:
        raise ValueError(f"confidence in (0, 1) and an even number of resamples; got {confidence}, {resamples}")
    finite = np.asarray(values, dtype=np.float64).ravel()
    finite = np.sort(finite[np.isfinite(finite)])
    if finite.size < 2:
        return None
    # Means of distances from the middle of the range: exact where all values are equal, and negated with the values.
    middle = finite[0] / 2 + finite[-1] / 2
    means = _resampled_means(finite - middle, seed=seed, resamples=resamples)
    tail = (1 - confidence) / 2
    # The upper quantile as the lower one of the negated means, as 1 - tail is rounded.
    return float(middle + np.quantile(means, tail)), float(middle - np.quantile(-means, tail))


def paired_difference(
    a: Values,
    b: Values,
    *,
    better: Literal["higher", "lower"] = "higher",
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Difference:
    """How a differs from b on the same images.   a, b: (N,), entry i of both of one image; better: of the metric

    The interval is that of bootstrap_mean over the differences: what images have in common (some are hard for
    everybody) drops out, so it is narrower than the intervals of the two means suggest. The mean is of the exact sum.
    Swapped sides have the same digits: mean, low and high of b - a are -mean, -high and -low of a - b.
    """
    first, second = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if first.size != second.size:
        raise ValueError(f"a pair for every image; got {first.size} and {second.size} values")
    is_finite = np.isfinite(first) & np.isfinite(second)
    differences = first[is_finite] - second[is_finite]
    interval = bootstrap_mean(differences, seed=seed, resamples=resamples, confidence=confidence)
    higher, lower = int((differences > 0).sum()), int((differences < 0).sum())
    return Difference(
        mean=math.fsum(differences) / differences.size if differences.size else None,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        better=higher if better == "higher" else lower,
        equal=int((differences == 0).sum()),
        worse=lower if better == "higher" else higher,
        count=differences.size,
        left_out=first.size - differences.size,
    )


def _resampled_means(values: np.ndarray, *, seed: int, resamples: int) -> np.ndarray:
    """The means of all resamples, each behind the one it mirrors.   values: (N,) float64 -> (resamples,) float64"""
    count, pairs = values.size, resamples // 2
    words_each = -(-count // 2)  # 64-bit words of a pair of resamples, two indices each
    stream = np.random.Philox(key=mix_seed(seed, "bootstrap"))
    rows = max(1, CHUNK // count)
    means = np.empty((pairs, 2))
    for start in range(0, pairs, rows):
        stop = min(start + rows, pairs)
        words = stream.random_raw((stop - start) * words_each).astype("<u8").view("<u4")
        halves = words.reshape(stop - start, 2 * words_each)[:, :count].astype(np.uint64)
        index = ((halves * np.uint64(count)) >> np.uint64(32)).astype(np.intp)
        means[start:stop, 0] = values[index].mean(axis=1)
        means[start:stop, 1] = values[::-1][index].mean(axis=1)
    return means.ravel()  # (pairs, 2) -> (resamples,)
