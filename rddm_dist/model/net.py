"""The RDDM network: one or two U-Nets over the state, the degraded image and the mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from rddm_dist.model.unet import Unet

CONDITIONS = ("none", "input", "input_mask")


class RddmNet(nn.Module):
    """`num_nets` U-Nets `unet0` (residual or x0) and `unet1` (noise) that see the same images.

    `condition` is what they see besides x_t: nothing, x_in, or x_in and the mask. unet0 is told times[0], unet1
    times[1]; a single network times[0], or times[1] with time_of_single="noise".
    """

    def __init__(
        self,
        dim: int,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        *,
        num_nets: int = 2,
        condition: str = "input",
        image_channels: int = 3,
        time_of_single: str = "residual",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if num_nets not in (1, 2):
            raise ConfigError(f"model.num_nets={num_nets} must be 1 or 2")
        if condition not in CONDITIONS:
            raise ConfigError(f"model.condition={condition} is not known; choose one of {', '.join(CONDITIONS)}")
        if time_of_single not in ("residual", "noise"):
            raise ConfigError(f"time_of_single={time_of_single} must be residual or noise")
        self.condition = condition
        self.image_channels = image_channels
        self._time_index = (1,) if num_nets == 1 and time_of_single == "noise" else (0, 1)[:num_nets]
        for i in range(num_nets):
            unet = Unet(
                dim,
                dim_mults=dim_mults,
                in_channels=image_channels * (1 + CONDITIONS.index(condition)),
                out_channels=image_channels,
                activation_checkpointing=activation_checkpointing,
            )
            self.add_module(f"unet{i}", unet)
        self.multiple_of = 2 ** (len(dim_mults) - 1)

    def forward(
        self, x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """One output per U-Net, each (B, image_channels, H, W) in the weights' type.

        x_t, x_in: (B, image_channels, H, W) float32; times: 2 x (B,) float32; mask: (B, 1 or image_channels, H, W)
        float32 in [0, 1]. H and W must be multiples of `multiple_of`. What the condition does not name is ignored.
        """
        images = [x_t]
        if self.condition != "none":
            if x_in is None:
                raise ConfigError(f"model.condition={self.condition} needs the degraded image, but none was given")
            images.append(x_in)
        if self.condition == "input_mask":
            if mask is None:
                raise ConfigError("model.condition=input_mask needs a mask, but the data has none")
            images.append(mask.expand(-1, self.image_channels, -1, -1))
        x = torch.cat(images, dim=1)
        return tuple(unet(x, times[i]) for unet, i in zip(self.children(), self._time_index, strict=True))
