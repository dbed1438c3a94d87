"""Numbers about the images of a dataset: brightness, residual, clipping, PSNR; of all samples or of a counted draw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.errors import BadSample, DataError
from data_pipeline.reader import Dataset, Place
from data_pipeline.records import Sample
from data_pipeline.rng import integers, permutation
from data_pipeline.threads import map_ordered


@dataclass(frozen=True)
class PairFacts:
    """What an input is to its target, on the 0-255 scale.

    residual_*: of input - target over all pixels and channels; input_clipped: part of its values that are 0 or 255;
    psnr: in dB, inf when the two are identical.
    """

    input_brightness: float
    input_clipped: float
    residual_mean: float
    residual_std: float
    residual_min: int
    residual_max: int
    psnr: float


@dataclass(frozen=True)
class SampleFacts:
    """A sample in numbers. width, height: pixels; bytes: encoded; brightness and clipped: of the target, as in
    PairFacts; pair: None where there is no input."""

    width: int
    height: int
    bytes: int
    brightness: float
    clipped: float
    pair: PairFacts | None


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest of a number over the samples where it is finite; count says how many those are."""

    count: int
    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """None when no value is finite."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return None
        return Spread(len(finite), math.fsum(finite) / len(finite), min(finite), max(finite))


@dataclass(frozen=True)
class Column:
    """A number of every sample that has it, with its name and unit ("" for none)."""

    name: str
    unit: str
    values: tuple[float, ...]


def collect_facts(dataset: Dataset, num: int, *, seed: int, jobs: int = 0) -> Iterator[SampleFacts]:
    """The numbers of `num` counted-random samples (of all, where there are no more), in the order they lie in.

    Of a tiled dataset the samples are tiles. jobs: threads, 0 for one per core. Raises DataError for a sample that
    cannot be read.
    """
    return map_ordered(lambda place: _facts_at(dataset, place), draw_places(dataset, num, seed=seed), jobs=jobs)


def draw_places(dataset: Dataset, num: int, *, seed: int) -> list[Place]:
    """Where min(num, samples) counted-random samples lie, ascending. Reads nothing."""
    counts = dataset.manifest.counts
    ends = np.cumsum(counts)
    numbers = np.array(draw(dataset.manifest.num_samples, num, seed=seed, purpose="places"), dtype=np.int64)
    shards = np.searchsorted(ends, numbers, side="right")
    return [
        Place(*row) for row in zip(shards.tolist(), (numbers - ends[shards] + counts[shards]).tolist(), strict=True)
    ]


def read_sample(dataset: Dataset, place: Place) -> Sample:
    """A sample, decoded. Raises DataError, and names the doctor, where it cannot be read."""
    try:
        return dataset.sample(*place)
    except BadSample as error:
        raise DataError(f"{error}; see what else is wrong: rddm doctor data {dataset.uri}") from error


def _facts_at(dataset: Dataset, place: Place) -> SampleFacts:
    num_bytes = sum(member.size for member in dataset.index(place.shard_index)[place.offset].members)
    return sample_facts(read_sample(dataset, place), num_bytes=num_bytes)


def columns(facts: Sequence[SampleFacts]) -> list[Column]:
    """The numbers of many samples by name, those of pairs only where there are pairs. Clipping is in percent."""
    pairs = [fact.pair for fact in facts if fact.pair is not None]
    table = [
        ("brightness of targets", "", [fact.brightness for fact in facts]),
        ("brightness of inputs", "", [pair.input_brightness for pair in pairs]),
        ("clipped in targets", "%", [100.0 * fact.clipped for fact in facts]),
        ("clipped in inputs", "%", [100.0 * pair.input_clipped for pair in pairs]),
        ("residual mean", "", [pair.residual_mean for pair in pairs]),
        ("residual deviation", "", [pair.residual_std for pair in pairs]),
        ("residual minimum", "", [float(pair.residual_min) for pair in pairs]),
        ("residual maximum", "", [float(pair.residual_max) for pair in pairs]),
        ("PSNR of inputs", "dB", [pair.psnr for pair in pairs]),
        ("width", "px", [float(fact.width) for fact in facts]),
        ("height", "px", [float(fact.height) for fact in facts]),
        ("size", "kB", [fact.bytes / 1e3 for fact in facts]),
    ]
    return [Column(name, unit, tuple(values)) for name, unit, values in table if values]


def common_sizes(facts: Sequence[SampleFacts]) -> list[tuple[str, int]]:
    """Sizes as WIDTHxHEIGHT with how many samples have them, the most frequent first."""
    counts = Counter((fact.width, fact.height) for fact in facts)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(f"{width}x{height}", count) for (width, height), count in ranked]


def sample_facts(sample: Sample, *, num_bytes: int) -> SampleFacts:
    """The numbers of one decoded sample; num_bytes: what its images take encoded."""
    height, width = sample.target.shape[:2]
    pair = None if sample.input is None else pair_facts(sample.input, sample.target)
    return SampleFacts(
        width, height, num_bytes, float(sample.target.mean()), clipped_fraction(sample.target), pair=pair
    )


def pair_facts(degraded: np.ndarray, target: np.ndarray) -> PairFacts:
    """The numbers of an input and its target.   degraded, target: (H, W, 3) uint8 of one size"""
    residual = degraded.astype(np.int16) - target
    mean, mean_square = float(residual.mean()), float(np.square(residual, dtype=np.int32).mean())
    return PairFacts(
        input_brightness=float(degraded.mean()),
        input_clipped=clipped_fraction(degraded),
        residual_mean=mean,
        residual_std=math.sqrt(max(mean_square - mean * mean, 0.0)),
        residual_min=int(residual.min()),
        residual_max=int(residual.max()),
        psnr=10.0 * math.log10(255.0**2 / mean_square) if mean_square else math.inf,
    )


def clipped_fraction(image: np.ndarray) -> float:
    """Part of the values that are 0 or 255.   image: (H, W, C) uint8  ->  0..1"""
    # 255 + 1 wraps to 0: both ends come down to values below 2.
    return float((image + np.uint8(1) < 2).mean())


def draw(total: int, num: int, *, seed: int, purpose: str) -> list[int]:
    """min(num, total) different numbers of 0..total-1, ascending; counted-random, total up to 2^31.

    Costs about `num`, however large `total` is.
    """
    if 2 * num >= total:
        return sorted(permutation(seed, total, purpose)[:num].tolist())
    chosen: set[int] = set()
    step = 0
    while len(chosen) < num:
        words = integers(seed, purpose, torch.arange(step, step + num), total).tolist()
        chosen.update(words[: num - len(chosen)])
        step += num
    return sorted(chosen)
