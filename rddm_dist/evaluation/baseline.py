"""Simple fixed filters that a learned restorer must beat, and the choice of the best one on training pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from data_pipeline.errors import DataError
from rddm_dist.evaluation.protocol import PROTOCOLS, Protocol, score

PixelPair = tuple[np.ndarray, np.ndarray]

GAUSSIAN_SIGMAS = (0.5, 0.8, 1.2, 1.8, 2.5)
MEDIAN_SIZES = (3, 5, 7)
MINIMUM_SIZES = (3, 5)


@dataclass(frozen=True)
class Baseline:
    """One filter; its parameters never depend on the image it is applied to.

    `curves` holds 256 output values for each of the 3 channels (kind "tone curve" only); `train_psnr` is the mean PSNR
    over the training pairs it was chosen on.
    """

    kind: Literal["untouched", "tone curve", "gaussian", "median", "minimum"]
    size: float = 0.0
    curves: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    train_psnr: float = float("nan")

    @property
    def name(self) -> str:
        if self.kind == "gaussian":
            return f"gaussian sigma {self.size:g}"
        return f"{self.kind} {self.size:g}x{self.size:g}" if self.size else self.kind

    def apply(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> the same"""
        if self.kind == "untouched":
            return image
        if self.kind == "tone curve":
            tables = np.array(self.curves, dtype=np.uint8)
            return np.stack([tables[c][image[..., c]] for c in range(3)], axis=-1)
        filters: dict[str, ImageFilter.Filter] = {
            "gaussian": ImageFilter.GaussianBlur(self.size),
            "median": ImageFilter.MedianFilter(max(3, int(self.size))),
            "minimum": ImageFilter.MinFilter(max(3, int(self.size))),
        }
        return np.asarray(Image.fromarray(image).filter(filters[self.kind]))


def choose_baseline(pairs: Sequence[PixelPair], *, protocol: Protocol = PROTOCOLS["rgb"]) -> Baseline:
    """The filter with the best mean PSNR over training pairs; the simpler one of two equals.

    pairs: (input, target), each (H, W, 3) uint8. Doing nothing is one of the candidates, as most filters only harm a
    lightly degraded image.
    """
    if not pairs:
        raise DataError("choosing a baseline needs at least one training pair")
    candidates = [
        Baseline("untouched"),
        fit_tone_curve(pairs),
        *(Baseline("gaussian", sigma) for sigma in GAUSSIAN_SIGMAS),
        *(Baseline("median", size) for size in MEDIAN_SIZES),
        *(Baseline("minimum", size) for size in MINIMUM_SIZES),
    ]
    rated = [replace(candidate, train_psnr=_mean_psnr(candidate, pairs, protocol)) for candidate in candidates]
    return max(rated, key=lambda candidate: candidate.train_psnr)


def fit_tone_curve(pairs: Sequence[PixelPair]) -> Baseline:
    """The best function of one channel value: the mean target of all training pixels with that input value.

    Values that never occur are interpolated between their neighbours.
    """
    curves = []
    for channel in range(3):
        counts, sums = np.zeros(256), np.zeros(256)
        for image, target in pairs:
            values = image[..., channel].ravel()
            counts += np.bincount(values, minlength=256)
            sums += np.bincount(values, weights=target[..., channel].ravel().astype(np.float64), minlength=256)
        seen = np.flatnonzero(counts)
        means = np.interp(np.arange(256), seen, sums[seen] / counts[seen])
        curves.append(tuple(int(value) for value in np.floor(means + 0.5)))
    return Baseline("tone curve", curves=tuple(curves))


def _mean_psnr(baseline: Baseline, pairs: Sequence[PixelPair], protocol: Protocol) -> float:
    values = [score(protocol, baseline.apply(image), target, metrics=("psnr",))["psnr"] for image, target in pairs]
    return float(np.mean(values))
