"""Synthetic degradations: repeatable, of the stated strength, and hard for simple filters where they should be."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from data_pipeline.degrade import gaussian_noise, rain
from tests.support.datasets import random_image

IMAGE = random_image(3, (96, 120)).astype(np.float32) / 255.0 * 0.6


def test_noise_has_the_stated_strength() -> None:
    noise = gaussian_noise(IMAGE, 25.0, seed=1, sample_id=2) - IMAGE
    assert noise.dtype == np.float32
    assert abs(float(noise.std()) * 255.0 - 25.0) < 0.5 and abs(float(noise.mean()) * 255.0) < 0.6
    assert np.array_equal(gaussian_noise(IMAGE, 0.0, seed=1, sample_id=2), IMAGE)


def test_degradations_depend_on_seed_and_sample_alone() -> None:
    for degrade in (partial(rain, IMAGE), partial(gaussian_noise, IMAGE, 10.0)):
        assert np.array_equal(degrade(seed=1, sample_id=2), degrade(seed=1, sample_id=2))
        assert not np.array_equal(degrade(seed=1, sample_id=2), degrade(seed=1, sample_id=3))
        assert not np.array_equal(degrade(seed=1, sample_id=2), degrade(seed=2, sample_id=2))


def test_rain_only_brightens_and_stays_in_range() -> None:
    rained = rain(IMAGE, seed=1, sample_id=2, density=0.02, length=21)
    assert rained.shape == IMAGE.shape and rained.dtype == np.float32
    assert float((rained - IMAGE).min()) >= 0.0 and float(rained.max()) <= 1.0
    wet = float((rained > IMAGE).any(axis=2).mean())
    expected = 1.0 - (1.0 - 0.02) ** 21  # a pixel is dry when none of the 21 heads that could reach it is there
    assert abs(wet - expected) < 0.06


@pytest.mark.parametrize("option", [{"density": 1e-9}, {"strength": 0.0}])
def test_no_rain_leaves_the_image(option: dict[str, Any]) -> None:
    assert np.array_equal(rain(IMAGE, seed=1, sample_id=2, **option), IMAGE)


def test_streaks_have_the_stated_length_and_lean_within_the_angle() -> None:
    black = np.zeros((80, 80, 3), np.float32)
    upright = rain(black, seed=1, sample_id=4, density=0.0005, length=15, max_angle=0.0)[:, :, 0]
    for column in np.flatnonzero(upright.any(axis=0)):
        runs = np.flatnonzero(np.diff(np.concatenate([[0], upright[:, column] > 0, [0]])))
        whole = [stop - start for start, stop in zip(runs[::2], runs[1::2], strict=True) if start > 0 and stop < 80]
        assert all(length >= 15 for length in whole)
    columns = [
        sum(
            np.count_nonzero(
                rain(black, seed=1, sample_id=n, density=0.0002, length=15, max_angle=angle).any(axis=(0, 2))
            )
            for n in range(6)
        )
        for angle in (0.0, 40.0)
    ]
    assert columns[1] > 2 * columns[0] > 0
