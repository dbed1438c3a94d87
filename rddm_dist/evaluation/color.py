"""Colour as scores need it: BT.601 luma and gray, and CIELAB under D50."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# ITU-R BT.601, studio range: black is 16, white 235.
STUDIO_WEIGHTS = (65.481, 128.553, 24.966)
# ITU-R BT.601, full range.
GRAY_WEIGHTS = (0.299, 0.587, 0.114)

# Linear sRGB to XYZ under D50, the connection space of ICC profiles: the matrix of IEC 61966-2-1, adapted from D65 by
# Bradford's method. The row sums are the white point.
SRGB_TO_XYZ_D50 = (
    (0.4360747, 0.3850649, 0.1430804),
    (0.2225045, 0.7168786, 0.0606169),
    (0.0139322, 0.0971045, 0.7141733),
)


def studio_luma(image: np.ndarray, *, rounded: bool = True) -> np.ndarray:
    """BT.601 luma in the studio range.   (H, W, 3) uint8, or float in [0, 255]  ->  (H, W) float64 in [16, 235]

    Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, rounded to integers, halves up, unless `rounded` is False.
    """
    luma = 16.0 + _weighted(image.astype(np.float64), STUDIO_WEIGHTS) / 255.0
    return np.floor(luma + 0.5) if rounded else luma


def mean_gray(image: np.ndarray) -> float:
    """Mean of the full-range gray 0.299 R + 0.587 G + 0.114 B, not rounded.   (H, W, 3) in [0, 255]  ->  in [0, 255]"""
    return float(_weighted(image.reshape(-1, 3).mean(axis=0, dtype=np.float64), GRAY_WEIGHTS))


def match_mean_gray(image: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The image times mean_gray(target) / mean_gray(image), clipped to [0, 255]; a black image stays black.

    image, target: (H, W, 3) in [0, 255]. uint8 images are rounded to uint8 again, halves up; float ones give float64.
    """
    mean = mean_gray(image)
    matched = np.clip(image.astype(np.float64) * (mean_gray(target) / mean if mean else 1.0), 0.0, 255.0)
    return np.floor(matched + 0.5).astype(np.uint8) if image.dtype == np.uint8 else matched


def srgb_to_lab(image: np.ndarray) -> np.ndarray:
    """CIELAB relative to D50, as MATLAB's makecform('srgb2lab') on doubles: white is (100, 0, 0), grays have a = b = 0.

    image: (..., 3) float sRGB; values outside [0, 1] are clipped first  ->  (..., 3) float64, L in [0, 100].
    The curve of IEC 61966-2-1, the matrix above, then CIE 15: L = 116 f(Y) - 16, a = 500 (f(X) - f(Y)),
    b = 200 (f(Y) - f(Z)), each of X, Y, Z relative to white.
    """
    encoded = np.clip(image.astype(np.float64), 0.0, 1.0)
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    matrix = np.array(SRGB_TO_XYZ_D50)
    # Rows that sum to 1: a gray has X = Y = Z up to rounding.
    rows = matrix / matrix.sum(axis=1, keepdims=True)
    xyz = np.stack([_weighted(linear, row) for row in rows], axis=-1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _weighted(image: np.ndarray, weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """The weighted sum of the channels, added in their order: the digits of a matrix product depend on its threads.

    image: (..., 3) float64  ->  (...) float64
    """
    return image[..., 0] * weights[0] + image[..., 1] * weights[1] + image[..., 2] * weights[2]
