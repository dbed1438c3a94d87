"""Luma, gray and CIELAB against the standards' own numbers and two independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageCms

from rddm_dist.evaluation.color import SRGB_TO_XYZ_D50, match_mean_gray, mean_gray, srgb_to_lab, studio_luma


def random_colors(seed: int, height: int = 24, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_studio_luma_of_the_primaries_is_that_of_the_standard() -> None:
    colors = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    assert studio_luma(colors[None]).tolist() == [[16, 235, 81, 145, 41]]
    exact = studio_luma(colors[None], rounded=False)
    assert exact[0].tolist() == pytest.approx([16, 235, 16 + 65.481, 16 + 128.553, 16 + 24.966], abs=1e-12)


def test_rounded_luma_is_the_exact_one_rounded() -> None:
    image = random_colors(0)
    exact = studio_luma(image, rounded=False)
    assert np.abs(studio_luma(image) - exact).max() <= 0.5
    assert not np.array_equal(studio_luma(image), exact)


def test_the_mean_gray_of_one_colour_is_its_weighted_sum() -> None:
    assert mean_gray(np.full((3, 5, 3), [200, 100, 50], dtype=np.uint8)) == pytest.approx(0.299 * 200 + 58.7 + 5.7)


def test_matched_images_have_the_targets_mean_gray_unless_clipped() -> None:
    image, target = random_colors(1) / 4.0, random_colors(2) / 2.0
    scaled = match_mean_gray(image, target)
    assert mean_gray(scaled) == pytest.approx(mean_gray(target), rel=1e-12)
    assert np.allclose(scaled * mean_gray(image), image * mean_gray(target), rtol=1e-12)
    bright = match_mean_gray(random_colors(1), np.full((24, 20, 3), 250, dtype=np.uint8))
    assert bright.dtype == np.uint8 and bright.max() == 255


def test_a_black_image_stays_black_whatever_the_target() -> None:
    black = np.zeros((4, 4, 3), dtype=np.uint8)
    assert np.array_equal(match_mean_gray(black, random_colors(3)), black)


def test_white_is_100_0_0_and_grays_have_no_colour() -> None:
    grays = np.linspace(0, 1, 256)[:, None].repeat(3, axis=1)
    lab = srgb_to_lab(grays)
    assert lab[-1] == pytest.approx([100, 0, 0], abs=1e-10)
    assert lab[0] == pytest.approx([0, 0, 0], abs=1e-10)
    assert np.abs(lab[:, 1:]).max() < 1e-10
    assert (np.diff(lab[:, 0]) > 0).all()


def test_values_beyond_the_range_count_as_the_nearest_colour() -> None:
    assert np.array_equal(srgb_to_lab(np.array([-0.2, 0.5, 1.3])), srgb_to_lab(np.array([0.0, 0.5, 1.0])))


def test_the_matrix_is_that_of_srgb_adapted_to_d50_by_bradford() -> None:
    def xyz(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1.0, (1 - x - y) / y])

    primaries = np.stack([xyz(0.64, 0.33), xyz(0.30, 0.60), xyz(0.15, 0.06)], axis=1)
    d65, d50 = xyz(0.3127, 0.3290), np.array([0.9642, 1.0, 0.8249])
    matrix = primaries * np.linalg.solve(primaries, d65)
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapted = np.linalg.inv(cones) @ np.diag((cones @ d50) / (cones @ d65)) @ cones @ matrix
    assert np.abs(adapted - np.array(SRGB_TO_XYZ_D50)).max() < 5e-4  # white points of four and five digits


def test_lab_is_that_of_skimage_given_the_adapted_xyz() -> None:
    color = pytest.importorskip("skimage.color")
    colors = random_colors(4)
    encoded = colors / 255.0
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    expected = color.xyz2lab(linear @ np.array(SRGB_TO_XYZ_D50).T, illuminant="D50")
    assert np.abs(srgb_to_lab(encoded) - expected).max() < 3e-3
    # Without adaptation skimage's D50 has a white that is not neutral; its D65 is another, related space.
    assert np.abs(srgb_to_lab(encoded)[..., 0] - color.rgb2lab(encoded, illuminant="D65")[..., 0]).max() < 4


def test_lab_is_that_of_an_icc_colour_engine() -> None:
    """LittleCMS converts by the same profiles as MATLAB's; here it gives 8 bits of L, a and b."""
    colors = random_colors(5, 40, 40)
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        "RGB",
        "LAB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    converted = ImageCms.applyTransform(Image.fromarray(colors), transform)
    assert converted is not None
    coded = np.asarray(converted)
    expected = np.stack(
        [coded[..., 0] * (100 / 255), coded[..., 1].view(np.int8), coded[..., 2].view(np.int8)], axis=-1
    )
    assert np.abs(srgb_to_lab(colors / 255.0) - expected).max() < 1.0
