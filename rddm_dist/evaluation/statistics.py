"""What a mean over images is worth: bootstrap intervals and paired differences, the same digits for everybody."""

from __future__ import annotations

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
    interpolated, of the means of `resamples` draws of N values with replacement. Neither the order of the values nor
    other data matter, so whoever has the values gets the interval. Resample r takes the sorted values at
    floor(w N / 2^32) for the N 32-bit words w from place 2 r ceil(N / 2) on of Philox 4x64-10 (the stream of
    numpy.random.Philox, low half of each 64-bit word first) under the key mix_seed(seed, "bootstrap").
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence in (0, 1) and at least 1 resample; got {confidence}, {resamples}")
    finite = np.asarray(values, dtype=np.float64).ravel()
    finite = np.sort(finite[np.isfinite(finite)])
    if finite.size < 2:
        return None
    # Means of what lies above the smallest value: exact where all values are equal.
    means = _resampled_means(finite - finite[0], seed=seed, resamples=resamples)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2]) + finite[0]
    return float(low), float(high)


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
    everybody) drops out, so it is narrower than the intervals of the two means suggest.
    """
    first, second = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if first.size != second.size:
        raise ValueError(f"a pair for every image; got {first.size} and {second.size} values")
    is_finite = np.isfinite(first) & np.isfinite(second)
    differences = first[is_finite] - second[is_finite]
    interval = bootstrap_mean(differences, seed=seed, resamples=resamples, confidence=confidence)
    higher, lower = int((differences > 0).sum()), int((differences < 0).sum())
    return Difference(
        mean=float(np.sort(differences).mean()) if differences.size else None,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        better=higher if better == "higher" else lower,
        equal=int((differences == 0).sum()),
        worse=lower if better == "higher" else higher,
        count=differences.size,
        left_out=first.size - differences.size,
    )


def _resampled_means(values: np.ndarray, *, seed: int, resamples: int) -> np.ndarray:
    """The means of all resamples, in their order.   values: (N,) float64 -> (resamples,) float64"""
    count = values.size
    words_each = -(-count // 2)  # 64-bit words of a resample, two indices each
    stream = np.random.Philox(key=mix_seed(seed, "bootstrap"))
    rows = max(1, CHUNK // count)
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        words = stream.random_raw((stop - start) * words_each).astype("<u8").view("<u4")
        halves = words.reshape(stop - start, 2 * words_each)[:, :count].astype(np.uint64)
        index = ((halves * np.uint64(count)) >> np.uint64(32)).astype(np.intp)
        means[start:stop] = values[index].mean(axis=1)
    return means
