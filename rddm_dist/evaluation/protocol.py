"""Protocols: named, complete statements of how a score is computed. Scores of two protocols are never compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from rddm_dist.evaluation.color import match_mean_gray, studio_luma
from rddm_dist.evaluation.metrics import LEAST_SIDE, METRICS, PAIR_METRICS, PLANE_METRICS, lab_mae
from rddm_dist.evaluation.resize import imresize

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]

FORMULAS = {
    "psnr": "10 log10(peak^2 / mean squared error), over all pixels and channels of an image",
    "ssim": "11x11 Gaussian, sigma 1.5, K = (0.01, 0.03), valid region, mean over channels",
    "ms_ssim": "five scales by 2x2 means, weights 0.0448 0.2856 0.3001 0.2363 0.1333; window and K as ssim",
    "mae": "mean absolute difference over all pixels and channels, in 8-bit levels",
    "lab_mae": "mean over pixels of |dL| + |da| + |db| in CIELAB (D50) of the RGB image, whatever the color",
    "lpips": "distance of the named network between the whole RGB images, whatever the color and regions",
    "mean": "mean over images of the per-image values",
}


@dataclass(frozen=True)
class Protocol:
    """How a restored image is compared with its target.

    summary     in a line: what is compared, and whose numbers are of this kind.
    color       rgb: all channels together; y: BT.601 studio luma.
    metrics     computed unless others are asked for; none: the protocol compares no pairs.
    side        of the square that both images are resized to; 0: they are compared at the size they have.
    only_side   of the squares that alone are accepted; 0: any size.
    in_double   psnr, ssim, ms_ssim and mae see images that were resized without rounding.
    regions     parts of the image that are scored apart; more than `all` needs a mask.
    match_gray  the restored image gets the mean gray of the target first.
    rounding    uint8: the 8-bit image that would be written to a file, luma rounded; float: nothing is rounded.
    border      pixels left out at each side, after resizing.
    """

    name: str
    summary: str
    _: KW_ONLY
    color: Literal["rgb", "y"] = "rgb"
    metrics: tuple[str, ...] = ("psnr", "ssim")
    side: int = 0
    only_side: int = 0
    in_double: bool = False
    regions: tuple[str, ...] = ("all",)
    match_gray: bool = False
    rounding: Literal["uint8", "float"] = "uint8"
    border: int = 0

    @property
    def needs_mask(self) -> bool:
        return len(self.regions) > 1

    @property
    def compares_pairs(self) -> bool:
        return bool(self.metrics)

    @property
    def size(self) -> str:
        if self.side:
            return f"resized to {self.side}x{self.side}"
        return f"{self.only_side}x{self.only_side} only" if self.only_side else "native"

    def describe(self) -> dict[str, Any]:
        """Everything about the protocol but the chosen metrics, for report.json."""
        described: dict[str, Any] = {
            "name": self.name,
            "summary": self.summary,
            "color": self.color,
            "rounding": self.rounding,
            "size": self.size,
            "border": self.border,
            "regions": list(self.regions),
            "uses_target": self.match_gray,
        }
        if not self.compares_pairs:
            return described
        return {**described, "procedure": "; ".join(self._procedure()), "peak": 255, **FORMULAS}

    def _procedure(self) -> list[str]:
        """What happens to an image before it is compared, in order, in words."""
        is_exact = self.rounding == "float"
        steps = [
            "the network's output is not rounded"
            if is_exact
            else "the restored image is rounded to 8 bits, as in a file"
        ]
        if self.match_gray:
            steps.append(
                "the restored image is multiplied by mean gray of the target / mean gray of the restored image "
                "(0.299 R + 0.587 G + 0.114 B, over the whole image), clipped to 0..255"
                + ("" if is_exact else " and rounded")
                + ": this looks at the target"
            )
        if self.side:
            steps.append(
                f"images of other sizes are resized to {self.side}x{self.side} as by MATLAB's imresize "
                "(bicubic a = -0.5, antialiased, edges mirrored), "
                + ("without rounding or clipping" if is_exact or self.in_double else "in 8 bits")
                + (", for lab_mae and lpips in 8 bits" if self.in_double and not is_exact else "")
            )
        if self.border:
            steps.append(f"{self.border} pixels are cut off at each side")
        if self.color == "y":
            steps.append(
                "Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255" + ("" if is_exact else ", rounded to integers")
            )
        if self.needs_mask:
            steps.append(
                "shadow is where the mask, resized like an 8-bit image, is not zero; for a region, psnr, ssim, ms_ssim "
                "and mae multiply both images by it and divide by the whole frame; lab_mae is the mean over its pixels"
            )
        return steps


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("rgb", "8-bit RGB at native size, as most restoration papers report", metrics=("psnr", "ssim", "mae")),
        Protocol(
            "y", "luma of the 8-bit image at native size, as deraining and super-resolution papers report", color="y"
        ),
        Protocol(
            "rddm-256",
            "luma at 256x256, as the RDDM paper for raindrops and low light; not comparable with native sizes",
            color="y",
            side=256,
        ),
        Protocol(
            "istd",
            "RGB and LAB at 256x256 in shadow, elsewhere and in all, as the RDDM paper and others for shadow removal",
            metrics=("psnr", "ssim", "lab_mae"),
            side=256,
            in_double=True,
            regions=("all", "shadow", "non_shadow"),
        ),
        Protocol(
            "sidd",
            "8-bit RGB of the 256x256 blocks of SIDD; SSIM is the mean over channels, not MATLAB's",
            only_side=256,
        ),
        Protocol("lol", "8-bit RGB at native size; the brightness is the method's own"),
        Protocol(
            "lol-gtmean",
            "8-bit RGB at native size after the target's mean gray was given to the restored image; "
            "not comparable with lol",
            match_gray=True,
        ),
        Protocol("generation", "no pairs: generated images as a set, by FID, KID and IS", metrics=(), regions=()),
    )
}

_BORDER = re.compile(r"border([1-9]\d{0,3})")


def get_protocol(name: str) -> Protocol:
    """The protocol of that name: BASE, BASE+borderN, BASE+float or BASE+borderN+float; its own name has this order.

    Raises ConfigError naming the known ones.
    """
    base, *modifiers = name.split("+")
    if base not in PROTOCOLS:
        raise ConfigError(f"protocol {name} is not known; choose one of {', '.join(sorted(PROTOCOLS))}")
    protocol = PROTOCOLS[base]
    if modifiers and not protocol.compares_pairs:
        raise ConfigError(f"protocol {base} takes no +{modifiers[0]}: it compares no pairs of images")
    for modifier in modifiers:
        border = _BORDER.fullmatch(modifier)
        if modifier == "float" and protocol.rounding != "float":
            protocol = replace(protocol, rounding="float")
        elif border is not None and not protocol.border:
            protocol = replace(protocol, border=int(border[1]))
        else:
            raise ConfigError(
                f"protocol {name}: +{modifier} is no modifier or comes twice; allowed are +borderN (N from 1 to 9999) "
                "and +float"
            )
    parts = (
        base,
        f"border{protocol.border}" if protocol.border else "",
        "float" if protocol.rounding == "float" else "",
    )
    return replace(protocol, name="+".join(part for part in parts if part))


def check_metrics(protocol: Protocol, metrics: Sequence[str] | None = None, *, has_lpips: bool) -> tuple[str, ...]:
    """The metrics to compute, those of the protocol for None; ConfigError for ones that cannot be."""
    if not protocol.compares_pairs:
        raise ConfigError(f"protocol {protocol.name} compares no pairs of images; choose another one to score pairs")
    names = protocol.metrics if metrics is None else tuple(metrics)
    for name in names:
        if name not in PAIR_METRICS:
            kind = "is of whole sets of images" if name in METRICS else "is not known"
            raise ConfigError(f"metric {name} {kind}; pairs are compared by {', '.join(PAIR_METRICS)}")
    if "lpips" in names and not has_lpips:
        raise ConfigError("metric lpips needs the file of its network; give --lpips FILE")
    return names


def check_sizes(
    protocol: Protocol,
    *,
    restored: tuple[int, int],
    target: tuple[int, int],
    what: str,
    metrics: Sequence[str] | None = None,
) -> None:
    """Raise DataError, which names `what`, for sizes that the protocol or a metric does not take.

    restored, target: (height, width); metrics: to be computed, those of the protocol for None.
    """
    side = protocol.only_side
    if side and not restored == target == (side, side):
        raise DataError(
            f"{what}: protocol {protocol.name} takes {side}x{side} blocks, got {_size(restored)} for {_size(target)}; "
            "cut the images into blocks, or score them by protocol rgb"
        )
    if not protocol.side and restored != target:
        raise DataError(
            f"{what}: protocol {protocol.name} compares images of one size, got {_size(restored)} for a target of "
            f"{_size(target)}; restore at the size of the target"
        )
    compared = (protocol.side, protocol.side) if protocol.side else target
    height, width = (length - 2 * protocol.border for length in compared)
    if min(height, width) < 1:
        raise DataError(
            f"{what}: a border of {protocol.border} pixels leaves nothing of {_size(compared)}; lower +borderN"
        )
    for name in protocol.metrics if metrics is None else metrics:
        least = LEAST_SIDE.get(name, 1)
        if min(height, width) < least:
            raise DataError(
                f"{what}: {METRICS[name].label} needs images of at least {least}x{least} pixels, got {width}x{height}"
                f"{' inside the border' if protocol.border else ''}; leave the metric out"
            )


def score(
    protocol: Protocol,
    restored: np.ndarray,
    target: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    metrics: Sequence[str] | None = None,
    lpips: PerceptualDistance | None = None,
) -> dict[str, float]:
    """Scores of one image, in the order of the metrics, for each region: "psnr", "psnr_shadow", ...

    restored, target: (H, W, 3) uint8; under +float also floating, in [0, 255]. mask: (H, W, 1) uint8, for protocols
    with regions, whose scores come with "pixels_shadow" and so on, the weights of a mean over the pixels of all images.
    metrics: those of the protocol for None. lpips: takes x, y: (B, 3, H, W) float32 in [0, 255], gives (B,).
    PSNR of equal images is inf; LAB MAE of a region without pixels is NaN.
    Raises ConfigError for metrics that cannot be computed, DataError for images that do not fit.
    """
    names = check_metrics(protocol, metrics, has_lpips=lpips is not None)
    _check_pixels(protocol, restored, target)
    check_sizes(protocol, restored=restored.shape[:2], target=target.shape[:2], what="a restored image", metrics=names)
    regions = _regions(protocol, mask)
    if protocol.rounding == "float":
        restored, target = restored.astype(np.float64), target.astype(np.float64)
    if protocol.match_gray:
        restored = match_mean_gray(restored, target)
    scores: dict[str, float] = {}
    if not set(names).isdisjoint(PLANE_METRICS):
        x, y = (_planes(protocol, image) for image in (restored, target))
    if not set(names).isdisjoint(("lab_mae", "lpips")):
        color_x, color_y = (_color_planes(protocol, image) for image in (restored, target))
    for name in names:
        if name == "lpips":
            assert lpips is not None  # check_metrics has seen to it
            scores[name] = float(lpips((color_x * 255.0).float(), (color_y * 255.0).float())[0])
            continue
        for suffix, region in regions.items():
            if name == "lab_mae":
                value = lab_mae(color_x, color_y, region=region)
            else:
                value = PLANE_METRICS[name](*((x, y) if region is None else (x * region, y * region)))
            scores[name + suffix] = value.item()
    counts = {f"pixels{suffix}": float(region.sum()) for suffix, region in regions.items() if region is not None}
    return {**scores, **counts}


def _check_pixels(protocol: Protocol, restored: np.ndarray, target: np.ndarray) -> None:
    for image in (restored, target):
        if protocol.rounding == "uint8" and image.dtype != np.uint8:
            raise DataError(
                f"protocol {protocol.name} compares 8-bit images, got {restored.dtype} and {target.dtype}; "
                "add +float to compare images that are not rounded"
            )
        if image.ndim != 3 or image.shape[2] != 3 or not (image.dtype == np.uint8 or image.dtype.kind == "f"):
            raise DataError(
                f"protocol {protocol.name} compares RGB images in [0, 255], got {image.shape} {image.dtype}"
            )


def _regions(protocol: Protocol, mask: np.ndarray | None) -> dict[str, Tensor | None]:
    """The suffix of each region's scores and the pixels that count, (H, W) bool, None for all."""
    regions: dict[str, Tensor | None] = {"": None}
    if not protocol.needs_mask:
        return regions
    if mask is None:
        raise DataError(f"protocol {protocol.name} needs the mask of every image; the data have none")
    if mask.dtype != np.uint8 or mask.ndim != 3 or mask.shape[2] != 1:
        raise DataError(
            f"protocol {protocol.name} needs masks of one channel and 8 bits, got {mask.shape} {mask.dtype}"
        )
    shadow = torch.from_numpy(_fit(protocol, mask)[..., 0] > 0)
    return {**regions, "_shadow": shadow, "_non_shadow": ~shadow}


def _fit(protocol: Protocol, image: np.ndarray) -> np.ndarray:
    """The image at the protocol's size without its border.   (H, W, C) uint8 -> uint8; float -> float64"""
    if protocol.side:
        image = imresize(image, (protocol.side, protocol.side))
    border = protocol.border
    return image[border : image.shape[0] - border, border : image.shape[1] - border]


def _planes(protocol: Protocol, image: np.ndarray) -> Tensor:
    """(H, W, 3) -> (1, C, H, W) float64 in [0, 1] and, where resized without rounding, a little beyond."""
    fitted = _fit(protocol, image.astype(np.float64) if protocol.in_double else image)
    if protocol.color == "y":
        channels = studio_luma(fitted, rounded=protocol.rounding == "uint8")[..., None]
    else:
        channels = fitted.astype(np.float64)
    return torch.from_numpy(channels / 255.0).permute(2, 0, 1)[None]


def _color_planes(protocol: Protocol, image: np.ndarray) -> Tensor:
    """(H, W, 3) -> (1, 3, H, W) float64 in [0, 1], in steps of 1 / 255 unless nothing is to be rounded."""
    fitted = _fit(protocol, image).astype(np.float64)
    return torch.from_numpy(np.clip(fitted / 255.0, 0.0, 1.0)).permute(2, 0, 1)[None]


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
