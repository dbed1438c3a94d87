"""What a network sees: self-conditioning image, state, degraded image and mask, stacked in the published order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError

CONDITIONS = ("none", "input", "input_mask")


@dataclass(frozen=True)
class Inputs:
    """The images of a first convolution, in the order [x_self | x_t | x_in | mask].

    `condition` is what a network sees besides x_t: nothing (generation, translation, inpainting), x_in, or x_in and the
    mask; with `self_condition` its own last estimate of x0 as well. Raises ConfigError for an unknown condition.
    """

    condition: str = "none"
    self_condition: bool = False
    image_channels: int = 3

    def __post_init__(self) -> None:
        if self.condition not in CONDITIONS:
            raise ConfigError(f"model.condition={self.condition} is not known; choose one of {', '.join(CONDITIONS)}")

    @property
    def channels(self) -> int:
        """Channels of the stacked images."""
        return self.image_channels * (1 + CONDITIONS.index(self.condition) + self.self_condition)

    def stack(self, x_t: Tensor, x_in: Tensor | None, mask: Tensor | None, x_self: Tensor | None) -> Tensor:
        """Put the images together; what the condition does not name is ignored, a missing x_self is zero.

        x_t, x_in, x_self: (B, image_channels, H, W) float in [-1, 1]; mask: (B, 1 or image_channels, H, W) float in
        [0, 1]  ->  (B, channels, H, W). Raises ConfigError where an image that the condition names is not given.
        """
        images = [x_t]
        if self.self_condition:
            images.insert(0, torch.zeros_like(x_t) if x_self is None else x_self)
        if self.condition != "none":
            if x_in is None:
                raise ConfigError(f"model.condition={self.condition} needs the degraded image, but none was given")
            images.append(x_in)
        if self.condition == "input_mask":
            if mask is None:
                raise ConfigError("model.condition=input_mask needs a mask, but the data has none")
            images.append(mask.expand(-1, self.image_channels, -1, -1))
        return torch.cat(images, dim=1)


def check_mask(condition: str, *, given: bool) -> None:
    """Raise ConfigError where a mask that somebody gives on purpose does not fit a network's condition.

    Networks themselves ignore masks they were not built for: datasets carry them for scoring, too.
    """
    if given and condition != "input_mask":
        raise ConfigError(
            f"a mask was given, but this network has model.condition={condition} and would not see it; leave the mask "
            "out, or take a model trained with model.condition=input_mask"
        )
    if not given and condition == "input_mask":
        raise ConfigError(
            "this network has model.condition=input_mask and needs a mask for every image; give masks (--mask)"
        )
