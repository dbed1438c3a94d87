"""Bicubic resizing with the conventions of MATLAB's imresize."""

from __future__ import annotations

import numpy as np

SUPPORT = 4.0  # pixels that the cubic kernel spans where nothing is reduced


def imresize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize by Keys' cubic convolution (a = -0.5), widened against aliasing where a side is reduced.

    image: (H, W, C) uint8 or float; size: (height, width), each at least 1  ->  (height, width, C). uint8 gives uint8,
    clipped and rounded, halves up, after each of the two passes, as an array of that type is between the passes of the
    original. Float gives float64, and near edges the values may leave the range of the image.

    Pixel centres are at half-integers, the image goes on beyond its edges as its mirror image, edge pixels repeated;
    the pass that reduces most comes first, rows before columns when equal. A side that keeps its length is untouched.
    """
    is_integer = image.dtype == np.uint8
    order = sorted((0, 1), key=lambda axis: size[axis] / image.shape[axis])
    for axis in order:
        if size[axis] == image.shape[axis]:
            continue
        taps, sources = resize_taps(image.shape[axis], size[axis])
        lines = np.moveaxis(image.astype(np.float64), axis, 0)
        # One tap after the other: the digits of a matrix product depend on its library and threads.
        resized = np.zeros((size[axis], *lines.shape[1:]))
        for tap, source in zip(taps.T, sources.T, strict=True):
            resized += tap[:, None, None] * lines[source]
        resized = np.moveaxis(resized, 0, axis)
        image = np.floor(np.clip(resized, 0.0, 255.0) + 0.5).astype(np.uint8) if is_integer else resized
    return image if is_integer else image.astype(np.float64)


def resize_taps(length: int, new_length: int) -> tuple[np.ndarray, np.ndarray]:
    """What each new pixel of a line is made of.   -> weights (new_length, taps) float64, whose rows sum to 1, and the
    places of the old pixels they are for, (new_length, taps) int64, which may repeat"""
    scale = new_length / length
    stretch = max(1.0, 1.0 / scale)
    width = SUPPORT * stretch
    # New pixel i has its centre at (i + 0.5) / scale; old pixel j at j + 0.5.
    centers = (np.arange(new_length) + 0.5) / scale - 0.5
    first = np.floor(centers - width / 2).astype(np.int64)
    positions = first[:, None] + np.arange(int(np.ceil(width)) + 2)  # (new_length, taps)
    taps = _cubic((centers[:, None] - positions) / stretch)
    taps /= taps.sum(axis=1, keepdims=True)
    folded = positions % (2 * length)  # 0 .. length - 1, then the mirror image length .. 2 length - 1
    return taps, np.where(folded < length, folded, 2 * length - 1 - folded)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys, Cubic convolution interpolation, IEEE TASSP 1981, a = -0.5; zero from distance 2 on."""
    d = np.abs(distance)
    near = (1.5 * d - 2.5) * d * d + 1.0
    far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
    return np.where(d <= 1.0, near, np.where(d < 2.0, far, 0.0))
