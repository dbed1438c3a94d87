"""Resizing: identities of the kernel and its edges, and Pillow's bicubic as the second opinion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rddm_dist.evaluation.resize import imresize, resize_taps

SIZES = [(12, 8), (64, 48), (100, 30), (30, 31), (5, 23), (1, 1)]


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def matrix(length: int, new_length: int) -> np.ndarray:
    """What each old pixel of a line gives to each new one.   -> (new_length, length)"""
    taps, sources = resize_taps(length, new_length)
    weights = np.zeros((new_length, length))
    np.add.at(weights, (np.arange(new_length)[:, None], sources), taps)
    return weights


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / a + c) * np.cos(y / b) for a, b, c in ((9, 13, 0), (17, 7, 1), (5, 29, 2))]
    return np.rint(127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def pillow_bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bicubic, the side that is reduced most first; it cuts kernels off at the edge. -> (height, width, 3) int

    Pillow starts with the columns, so an image whose rows come first is transposed for it.
    """
    if size[0] / image.shape[0] <= size[1] / image.shape[1]:
        turned = Image.fromarray(image.swapaxes(0, 1)).resize(size, Image.Resampling.BICUBIC)
        return np.asarray(turned).swapaxes(0, 1).astype(int)
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_an_image_of_that_size_stays_as_it_is(dtype: str) -> None:
    image: np.ndarray = noise(0, 20, 33).astype(dtype)
    assert np.array_equal(imresize(image, (20, 33)), image)


@pytest.mark.parametrize("size", SIZES)
def test_the_size_and_type_are_those_asked_for(size: tuple[int, int]) -> None:
    image = noise(1, 30, 31)
    assert imresize(image, size).shape == (*size, 3)
    assert imresize(image, size).dtype == np.uint8
    assert imresize(image.astype(np.float32), size).dtype == np.float64


@pytest.mark.parametrize("size", SIZES)
def test_a_constant_image_stays_constant(size: tuple[int, int]) -> None:
    assert (imresize(np.full((30, 31, 3), 77, dtype=np.uint8), size) == 77).all()
    assert np.abs(imresize(np.full((30, 31, 3), 0.3), size) - 0.3).max() < 1e-14


@pytest.mark.parametrize("lengths", [(640, 256), (480, 256), (100, 256), (7, 3), (3, 7), (2, 1)])
def test_weights_sum_to_one_and_are_symmetric(lengths: tuple[int, int]) -> None:
    weights = matrix(*lengths)
    assert weights.shape == lengths[::-1]
    assert np.abs(weights.sum(axis=1) - 1).max() < 1e-14
    assert np.abs(weights - weights[::-1, ::-1]).max() < 1e-12


@pytest.mark.parametrize("new_length", [40, 64, 100, 150, 333])
def test_a_ramp_stays_a_ramp_away_from_the_edges(new_length: int) -> None:
    """Pixel centres are at half-integers: the value at new centre (i + 0.5) / scale is that of the ramp there."""
    length = 100
    ramp = np.arange(length, dtype=np.float64)[:, None, None]
    scale = new_length / length
    expected = (np.arange(new_length) + 0.5) / scale - 0.5
    inside = slice(int(4 * max(1, scale)), -int(4 * max(1, scale)))
    resized = imresize(ramp, (new_length, 1))[:, 0, 0]
    assert resized[inside] == pytest.approx(expected[inside], abs=0.02)
    if new_length >= length:  # cubic convolution reproduces it exactly; normalised wide kernels nearly
        assert resized[inside] == pytest.approx(expected[inside], abs=1e-10)


def test_doubling_takes_the_weights_of_the_cubic_kernel() -> None:
    """The centre of new pixel 9 is at old pixel 4.25; Keys' kernel with a = -0.5 at 1.25, 0.25, 0.75 and 1.75."""
    expected = [0, 0, 0, -0.0703125, 0.8671875, 0.2265625, -0.0234375, 0, 0, 0]
    assert matrix(10, 20)[9].tolist() == pytest.approx(expected, abs=1e-15)


def test_the_edge_is_continued_by_its_mirror_image() -> None:
    image = noise(2, 24, 18)
    mirrored = np.concatenate([image[::-1], image, image[::-1]])
    mirrored = np.concatenate([mirrored[:, ::-1], mirrored, mirrored[:, ::-1]], axis=1)
    large = imresize(mirrored.astype(np.float64), (3 * 10, 3 * 40))
    assert np.abs(imresize(image.astype(np.float64), (10, 40)) - large[10:20, 40:80]).max() < 1e-10


def test_mirroring_and_transposing_the_image_does_the_same_to_the_result() -> None:
    image = noise(3, 50, 70).astype(np.float64)
    resized = imresize(image, (20, 90))
    assert np.abs(imresize(image[::-1, ::-1], (20, 90))[::-1, ::-1] - resized).max() < 1e-10
    assert np.abs(imresize(image.swapaxes(0, 1), (90, 20)).swapaxes(0, 1) - resized).max() < 1e-10


def test_floats_are_not_clipped_and_8_bit_images_are() -> None:
    image = np.zeros((20, 20, 1), dtype=np.uint8)
    image[:, 10:] = 255
    exact = imresize(image.astype(np.float64), (40, 40))
    assert exact.min() < -1 and exact.max() > 256
    assert np.array_equal(imresize(image, (40, 40)), np.floor(exact.clip(0, 255) + 0.5))


@pytest.mark.parametrize("size", [(64, 48), (100, 110), (37, 91)])
def test_reducing_agrees_with_pillow_away_from_the_edges(size: tuple[int, int]) -> None:
    image = smooth(160, 200)
    expected = pillow_bicubic(image, size)
    inside = (slice(3, -3), slice(3, -3))
    assert np.abs(imresize(image, size).astype(int) - expected)[inside].max() <= 1
    assert np.abs(imresize(image, size).astype(int) - expected).mean() < 0.2


@pytest.mark.parametrize("size", [(256, 256), (200, 300)])
def test_reducing_a_photograph_agrees_with_pillow(size: tuple[int, int], shared_data: Path) -> None:
    photo = np.asarray(Image.open(sorted((shared_data / "kodak24").iterdir())[0]).convert("RGB"))
    difference = np.abs(imresize(photo, size).astype(int) - pillow_bicubic(photo, size))
    assert difference[3:-3, 3:-3].max() <= 1
    assert difference.mean() < 0.1


def test_the_digits_do_not_depend_on_threads() -> None:
    program = (
        "import hashlib, numpy as np; from rddm_dist.evaluation.resize import imresize; "
        "image = np.random.default_rng(0).random((333, 517, 3)); "
        "print(hashlib.sha256(imresize(image, (256, 256)).tobytes()).hexdigest())"
    )
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    digests = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **dict.fromkeys(names, threads)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for threads in ("1", "2")
    ]
    assert digests[0] == digests[1] and len(digests[0]) == 65
