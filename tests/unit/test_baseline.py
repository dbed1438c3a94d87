"""The simple filters, and that the best one is found for the degradation it is made for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_pipeline.errors import DataError
from rddm_dist.evaluation.baseline import Baseline, choose_baseline, fit_tone_curve
from tests.support.datasets import random_image


def smooth(seed: int) -> np.ndarray:
    """(48, 56, 3) uint8 without sharp edges."""
    return np.asarray(Image.fromarray(random_image(seed, (48, 56))).filter(ImageFilter.GaussianBlur(4)))


def degraded_pairs(kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    pairs = []
    for seed in range(3):
        target = smooth(seed)
        if kind == "dark":
            image = (target * 0.4 + 20).astype(np.uint8)
        elif kind == "noise":
            image = np.clip(target + rng.normal(0, 20, target.shape), 0, 255).astype(np.uint8)
        elif kind == "salt":
            image = np.where(rng.random((48, 56, 1)) < 0.08, 255, target).astype(np.uint8)
        else:
            image = target
        pairs.append((image, target))
    return pairs


@pytest.mark.parametrize(
    ("degradation", "kind"), [("dark", "tone curve"), ("noise", "gaussian"), ("salt", "median"), ("none", "untouched")]
)
def test_each_degradation_finds_its_filter(degradation: str, kind: str) -> None:
    assert choose_baseline(degraded_pairs(degradation)).kind == kind


def test_the_tone_curve_inverts_a_change_of_brightness() -> None:
    pairs = degraded_pairs("dark")
    restored = fit_tone_curve(pairs).apply(pairs[0][0])
    assert np.abs(restored.astype(int) - pairs[0][1]).max() <= 2


def test_the_tone_curve_treats_each_channel_by_itself() -> None:
    target = smooth(5)
    image = target.copy()
    image[..., 1] = 255 - image[..., 1]
    assert np.abs(fit_tone_curve([(image, target)]).apply(image).astype(int) - target).max() <= 1


def test_the_minimum_filter_takes_the_smallest_neighbour() -> None:
    image = random_image(0, (16, 16))
    middle = Baseline("minimum", 3).apply(image)[5, 7]
    assert middle.tolist() == image[4:7, 6:9].min(axis=(0, 1)).tolist()


def test_a_baseline_says_what_it_is() -> None:
    names = [Baseline("gaussian", 1.2).name, Baseline("median", 5).name, Baseline("tone curve").name]
    assert names == ["gaussian sigma 1.2", "median 5x5", "tone curve"]


def test_no_pairs_are_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        choose_baseline([])
