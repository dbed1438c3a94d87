"""What a protocol compares, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from data_pipeline.errors import ConfigError, DataError
from rddm_dist.evaluation.protocol import PROTOCOLS, get_protocol, score, studio_luma


def image(seed: int, height: int = 24, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_studio_luma_of_the_primaries_is_that_of_the_standard() -> None:
    colors = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    assert studio_luma(colors[None]).tolist() == [[16, 235, 81, 145, 41]]


def test_rgb_psnr_is_over_all_pixels_and_channels() -> None:
    target = image(0)
    restored = target.copy()
    restored[3, 4, 1] ^= 16
    expected = 10 * np.log10(255**2 / (16**2 / target.size))
    assert score(PROTOCOLS["rgb"], restored, target)["psnr"] == pytest.approx(expected, abs=1e-9)


def test_y_ignores_a_change_of_colour_that_luma_does_not_show() -> None:
    target = np.full((16, 16, 3), 100, dtype=np.uint8)
    restored = target.copy()
    restored[..., 2] += 1  # 24.966 / 255 of a luma step, rounded away
    assert score(PROTOCOLS["y"], restored, target)["psnr"] == float("inf")
    assert score(PROTOCOLS["rgb"], restored, target)["psnr"] < 60


def test_a_border_does_not_count() -> None:
    protocol = dataclasses.replace(PROTOCOLS["rgb"], border=3)
    target = image(1)
    restored = target.copy()
    restored[:3] = 255 - restored[:3]
    restored[:, -3:] = 255 - restored[:, -3:]
    assert score(protocol, restored, target)["psnr"] == float("inf")


def test_only_the_metrics_asked_for_are_computed() -> None:
    assert list(score(PROTOCOLS["rgb"], image(0, 4, 4), image(1, 4, 4), metrics=("psnr",))) == ["psnr"]


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_a_protocol_describes_itself_in_json(name: str) -> None:
    described = json.loads(json.dumps(get_protocol(name).describe()))
    assert described["name"] == name
    assert {"color", "rounding", "size", "border", "region", "psnr", "ssim", "mean"} <= set(described)


def test_an_unknown_protocol_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="protocol lab is not known; choose one of rgb, y"):
        get_protocol("lab")


def test_images_of_other_sizes_or_types_are_refused() -> None:
    with pytest.raises(DataError, match="20x24 and 24x20"):
        score(PROTOCOLS["rgb"], image(0), image(0, 20, 24))
    with pytest.raises(DataError, match="8-bit"):
        score(PROTOCOLS["rgb"], image(0).astype(np.float32), image(0))
