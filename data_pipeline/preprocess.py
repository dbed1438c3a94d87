"""What is done to whole images before anything else, and saved with a model: pad, equalise the histogram, resize."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipeline.errors import ConfigError


def pad_bottom_right(image: np.ndarray, *, min_side: int, multiple: int) -> np.ndarray:
    """Add zeros below and to the right.   image: (H, W, C) uint8  ->  (H', W', C) uint8

    Each side becomes at least min_side, then a multiple of `multiple`; 0 stands for no such wish.
    """
    height, width = image.shape[:2]
    more = [_padded(side, min_side, multiple) - side for side in (height, width)]
    return np.pad(image, ((0, more[0]), (0, more[1]), (0, 0))) if any(more) else image


def equalize(image: np.ndarray) -> np.ndarray:
    """Histogram equalisation, each channel by itself.   image: (H, W, C) uint8  ->  the same

    As OpenCV does it: the darkest level present becomes 0, the others the rounded share of pixels up to them, without
    the darkest, times 255. A channel of one level stays.
    """
    return np.stack([_equalize_channel(image[:, :, channel]) for channel in range(image.shape[2])], axis=2)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize to size x size, bicubic as in Pillow; the aspect ratio is not kept.   image: (H, W, 1 or 3) uint8"""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    resized = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    return resized[:, :, None] if image.shape[2] == 1 else resized


@dataclass(frozen=True)
class Preprocess:
    """Pad, equalise, resize, in this order; the default does nothing.

    pad_to: least side in pixels; pad_multiple: sides become multiples of it; equalize: the input's histogram only,
    targets and masks keep theirs; resize: side of the square every image becomes. 0 stands for off.
    Raises ConfigError for negative numbers.
    """

    pad_to: int = 0
    pad_multiple: int = 0
    equalize: bool = False
    resize: int = 0

    def __post_init__(self) -> None:
        for name in ("pad_to", "pad_multiple", "resize"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"data.preprocess.{name}={getattr(self, name)} must be a number of pixels, or 0 for off"
                )

    @property
    def is_identity(self) -> bool:
        """Whether no image is changed, whatever its size."""
        return not (self.pad_to or self.needs_whole_image) and self.pad_multiple <= 1

    @property
    def needs_whole_image(self) -> bool:
        """Whether a pixel depends on the whole image, so that cutting a window first gives another result."""
        return self.equalize or self.resize > 0

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that an image of this size has afterwards."""
        if self.resize:
            return self.resize, self.resize
        return _padded(height, self.pad_to, self.pad_multiple), _padded(width, self.pad_to, self.pad_multiple)

    def apply(self, image: np.ndarray, *, field: str) -> np.ndarray:
        """Preprocess one image.   image: (H, W, 1 or 3) uint8; field: input, target or mask  ->  uint8"""
        image = pad_bottom_right(image, min_side=self.pad_to, multiple=self.pad_multiple)
        if self.equalize and field == "input":
            image = equalize(image)
        return resize(image, self.resize) if self.resize else image


def _padded(side: int, min_side: int, multiple: int) -> int:
    side = max(side, min_side)
    return -(-side // multiple) * multiple if multiple else side


def _equalize_channel(channel: np.ndarray) -> np.ndarray:
    """(H, W) uint8  ->  the same"""
    counts = np.bincount(channel.ravel(), minlength=256)
    darkest = counts[np.flatnonzero(counts)[0]]
    if darkest == channel.size:
        return channel
    scale = np.float32(255.0) / np.float32(channel.size - darkest)
    table = np.rint((np.cumsum(counts) - darkest).astype(np.float32) * scale)
    return np.clip(table, 0, 255).astype(np.uint8)[channel]
