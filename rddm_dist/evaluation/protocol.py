"""Protocols: named, complete statements of how a score is computed. Scores of two protocols are never compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from rddm_dist.evaluation.metrics import psnr, ssim


@dataclass(frozen=True)
class Protocol:
    """How a restored image is compared with its target.

    color     rgb: all channels together; y: BT.601 studio luma of the 8-bit image, rounded to integers.
    rounding  what is compared: uint8, the 8-bit image that would be written to a file.
    size      native: at the size of the target; a restored image of another size is refused.
    border    pixels left out at each side.
    region    which pixels count.
    """

    name: str
    color: Literal["rgb", "y"]
    rounding: Literal["uint8"] = "uint8"
    size: Literal["native"] = "native"
    border: int = 0
    region: Literal["all"] = "all"

    def describe(self) -> dict[str, Any]:
        """Everything about the protocol, for report.json."""
        return {
            **asdict(self),
            "peak": 255,
            "psnr": "10 log10(peak^2 / mean squared error), over all pixels and channels of an image",
            "ssim": "11x11 Gaussian, sigma 1.5, K = (0.01, 0.03), valid region, mean over channels",
            "mean": "mean over images of the per-image values",
        }


PROTOCOLS = {protocol.name: protocol for protocol in (Protocol("rgb", color="rgb"), Protocol("y", color="y"))}


METRICS = {"psnr": psnr, "ssim": ssim}


def get_protocol(name: str) -> Protocol:
    """The protocol of that name; ConfigError naming the known ones."""
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol {name} is not known; choose one of {', '.join(sorted(PROTOCOLS))}")
    return PROTOCOLS[name]


def score(
    protocol: Protocol, restored: np.ndarray, target: np.ndarray, *, metrics: Sequence[str] = tuple(METRICS)
) -> dict[str, float]:
    """PSNR in dB (inf for equal images) and SSIM of one image.   restored, target: (H, W, 3) uint8."""
    if restored.dtype != np.uint8 or target.dtype != np.uint8:
        raise DataError(f"protocol {protocol.name} compares 8-bit images, got {restored.dtype} and {target.dtype}")
    if restored.shape != target.shape:
        raise DataError(
            f"protocol {protocol.name} compares images of one size, got {_size(restored)} and {_size(target)}"
        )
    x, y = _prepare(protocol, restored), _prepare(protocol, target)
    return {name: METRICS[name](x, y).item() for name in metrics}


def studio_luma(image: np.ndarray) -> np.ndarray:
    """BT.601 luma in the studio range.   (H, W, 3) uint8 -> (H, W) float64, integers in 16..235

    Y = round(16 + (65.481 R + 128.553 G + 24.966 B) / 255)
    """
    weighted = image.astype(np.float64) @ np.array([65.481, 128.553, 24.966])
    return np.floor(16.0 + weighted / 255.0 + 0.5)


def _prepare(protocol: Protocol, image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, C, H, W) float64 in [0, 1], of what counts."""
    border = protocol.border
    image = image[border : image.shape[0] - border, border : image.shape[1] - border]
    channels = studio_luma(image)[..., None] if protocol.color == "y" else image.astype(np.float64)
    return torch.from_numpy(channels / 255.0).permute(2, 0, 1)[None]


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
