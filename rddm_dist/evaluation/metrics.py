"""Image metrics in float64, one value per image, and what is known of each: label, unit, which way is better."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from rddm_dist.evaluation.color import srgb_to_lab

# Wang, Bovik, Sheikh, Simoncelli: Image quality assessment, IEEE TIP 2004: the classic index.
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
# Wang, Simoncelli, Bovik: Multi-scale structural similarity, Asilomar 2003, from the finest scale to the coarsest.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


@dataclass(frozen=True)
class MetricInfo:
    """How a score is shown: its label and unit, which way is better, and the digits after the point."""

    label: str
    unit: str
    better: Literal["higher", "lower"]
    digits: int


PAIR_METRICS = ("psnr", "ssim", "ms_ssim", "mae", "lab_mae", "lpips")

METRICS = {
    "psnr": MetricInfo("PSNR", "dB", "higher", 3),
    "ssim": MetricInfo("SSIM", "", "higher", 4),
    "ms_ssim": MetricInfo("MS-SSIM", "", "higher", 4),
    "mae": MetricInfo("MAE", "levels", "lower", 3),
    "lab_mae": MetricInfo("LAB MAE", "", "lower", 3),
    "lpips": MetricInfo("LPIPS", "", "lower", 4),
    "fid": MetricInfo("FID", "", "lower", 3),
    "kid": MetricInfo("KID", "", "lower", 5),
    "is": MetricInfo("IS", "", "higher", 3),
}

_OTHER_SCORES = {
    "gain_db": MetricInfo("PSNR gain", "dB", "higher", 3),
    "spread": MetricInfo("Spread of samples", "levels", "lower", 3),
    "pixels_shadow": MetricInfo("Pixels (shadow)", "", "higher", 0),
    "pixels_non_shadow": MetricInfo("Pixels (non-shadow)", "", "higher", 0),
}

_DERIVED = re.compile(
    rf"(?:(?P<input>input)_|mean(?P<samples>[1-9]\d*)_)?(?P<metric>{'|'.join(PAIR_METRICS)})"
    r"(?:_(?P<region>shadow|non_shadow))?"
)

# The least height and width of an image; metrics that are not here take any.
LEAST_SIDE = {"ssim": SSIM_WINDOW, "ms_ssim": SSIM_WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)}


def metric_info(name: str) -> MetricInfo:
    """Of a metric, or of a score derived from one: input_psnr, psnr_shadow, mean4_psnr, gain_db, spread.

    Raises ConfigError for a name that is neither.
    """
    known = METRICS.get(name) or _OTHER_SCORES.get(name)
    if known is not None:
        return known
    match = _DERIVED.fullmatch(name)
    if match is None:
        raise ConfigError(f"score {name} is not known; the metrics are {', '.join(METRICS)}")
    info = METRICS[match["metric"]]
    label = info.label
    if match["region"]:
        label = f"{label} ({match['region'].replace('_', '-')})"
    if match["input"]:
        label = f"{label} of the input"
    if match["samples"]:
        label = f"{label} of the mean of {match['samples']}"
    return replace(info, label=label)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over all channels, per image; inf where the images are equal.

    10 log10(1 / mean((x - y)^2)).   x, y: (B, C, H, W) float in [0, 1]  ->  (B,) float64.
    """
    _check_shapes(x, y)
    error = (x.double() - y.double()).square().flatten(1).mean(dim=1)
    return -10.0 * torch.log10(error)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity, per image: mean over channels and the valid region of an 11x11 Gaussian of sigma 1.5.

    x, y: (B, C, H, W) float in [0, 1], H and W at least 11  ->  (B,) float64.
    The window is separable, so this takes two passes of 11 taps: on one core 45 times faster in float64 than a
    two-dimensional convolution, with the same value to 1e-12.
    """
    _check_shapes(x, y)
    _check_side("ssim", *x.shape[-2:])
    mean_x, mean_y, variances, covariance = _window_statistics(x, y)
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (variances + c2)
    return (numerator / denominator).flatten(1).mean(dim=1)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity, per image: contrast and structure at five scales, luminance at the coarsest.

    prod_j cs_j^b_j * ssim_5^b_5 with b = 0.0448, 0.2856, 0.3001, 0.2363, 0.1333; each factor is the mean over channels
    and the valid region, and 0 where that is negative; the next scale is the mean of 2x2 pixels, an odd last row or
    column left out.   x, y: (B, C, H, W) float in [0, 1], H and W at least 176  ->  (B,) float64.

    torchmetrics' multiscale_structural_similarity_index_measure (normalize="relu") has the same factors but for the
    last one, for which it includes a frame of 5 pixels whose windows reach into a reflected border.
    """
    _check_shapes(x, y)
    _check_side("ms_ssim", *x.shape[-2:])
    x, y = x.double(), y.double()
    product = torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    for weight in MS_SSIM_WEIGHTS[:-1]:
        _, _, variances, covariance = _window_statistics(x, y)
        contrast = (2 * covariance + SSIM_K2**2) / (variances + SSIM_K2**2)
        product *= contrast.flatten(1).mean(dim=1).clamp(min=0.0) ** weight
        x, y = torch.nn.functional.avg_pool2d(x, 2), torch.nn.functional.avg_pool2d(y, 2)
    return product * ssim(x, y).clamp(min=0.0) ** MS_SSIM_WEIGHTS[-1]


def mae(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error over all channels in levels of 8 bits, per image: 255 mean(|x - y|).

    x, y: (B, C, H, W) float in [0, 1]  ->  (B,) float64 in [0, 255].
    """
    _check_shapes(x, y)
    return 255.0 * (x.double() - y.double()).abs().flatten(1).mean(dim=1)


def lab_mae(x: Tensor, y: Tensor, *, region: Tensor | None = None) -> Tensor:
    """Mean over pixels of |dL| + |da| + |db| in CIELAB (D50), per image; what shadow removal papers call RMSE.

    x, y: (B, 3, H, W) float sRGB in [0, 1]; region: (H, W) bool, the pixels that count  ->  (B,) float64, NaN for a
    region without pixels.
    """
    _check_shapes(x, y)
    lab_x, lab_y = (srgb_to_lab(image.movedim(1, -1).cpu().numpy()) for image in (x, y))
    difference = torch.from_numpy(abs(lab_x - lab_y).sum(axis=-1))  # (B, H, W)
    return (difference.flatten(1) if region is None else difference[:, region]).mean(dim=1)


# Metrics of images of any number of channels.
PLANE_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "psnr": psnr,
    "ssim": ssim,
    "ms_ssim": ms_ssim,
    "mae": mae,
}


def _window_statistics(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of x and of y, the sum of their variances, and their covariance under each window of the valid region."""
    x, y = x.double(), y.double()
    maps = torch.stack([x, y, x * x, y * y, x * y])  # (5, B, C, H, W)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _gaussian_filter(maps)
    var_x, var_y, covariance = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    return mean_x, mean_y, var_x + var_y, covariance


def _gaussian_filter(maps: Tensor) -> Tensor:
    """Weighted means under the window wherever it fits.   (..., H, W) float64 -> (..., H - 10, W - 10)"""
    distance = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (distance / SSIM_SIGMA) ** 2)
    taps = (weights / weights.sum()).tolist()
    for dim in (-2, -1):
        size = maps.shape[dim] - SSIM_WINDOW + 1
        filtered = taps[0] * maps.narrow(dim, 0, size)
        for i, tap in enumerate(taps[1:], start=1):
            filtered.add_(maps.narrow(dim, i, size), alpha=tap)
        maps = filtered
    return maps


def _check_shapes(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise DataError(f"images of different shapes cannot be compared: {tuple(x.shape)} and {tuple(y.shape)}")


def _check_side(name: str, height: int, width: int) -> None:
    least = LEAST_SIDE[name]
    if min(height, width) < least:
        raise DataError(f"{METRICS[name].label} needs images of at least {least}x{least} pixels, got {width}x{height}")
