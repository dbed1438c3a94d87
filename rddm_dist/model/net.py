"""The RDDM networks: one or two U-Nets over the state, the degraded image and the mask, or one with two decoders."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from rddm_dist.model.inputs import Inputs
from rddm_dist.model.shared import SharedEncoderNet
from rddm_dist.model.unet import Unet

KINDS = ("unet", "shared_encoder")


class RddmNet(nn.Module):
    """`num_nets` U-Nets `unet0` (residual or x0) and `unet1` (noise) that see the same images.

    `condition` and `self_condition` say which images those are, see `Inputs`. unet0 is told times[0], unet1 times[1]; a
    single network times[0], or times[1] with time_of_single="noise".
    """

    def __init__(
        self,
        dim: int,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        *,
        num_nets: int = 2,
        condition: str = "input",
        self_condition: bool = False,
        image_channels: int = 3,
        time_of_single: str = "residual",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if num_nets not in (1, 2):
            raise ConfigError(f"model.num_nets={num_nets} must be 1 or 2")
        if time_of_single not in ("residual", "noise"):
            raise ConfigError(f"time_of_single={time_of_single} must be residual or noise")
        self.condition, self.self_condition, self.image_channels = condition, self_condition, image_channels
        self.num_outputs = num_nets
        self._inputs = Inputs(condition, self_condition, image_channels)
        self._time_index = (1,) if num_nets == 1 and time_of_single == "noise" else (0, 1)[:num_nets]
        for i in range(num_nets):
            unet = Unet(
                dim,
                dim_mults=dim_mults,
                in_channels=self._inputs.channels,
                out_channels=image_channels,
                activation_checkpointing=activation_checkpointing,
            )
            self.add_module(f"unet{i}", unet)
        self.multiple_of = 2 ** (len(dim_mults) - 1)

    def forward(
        self,
        x_t: Tensor,
        times: tuple[Tensor, Tensor],
        x_in: Tensor | None = None,
        mask: Tensor | None = None,
        x_self: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One output per U-Net, each (B, image_channels, H, W) in the weights' type.

        x_t, x_in, x_self: (B, image_channels, H, W) float32; times: 2 x (B,) float32; mask: (B, 1 or image_channels, H,
        W) float32 in [0, 1]. H and W must be multiples of `multiple_of`. What the network was not built for is ignored;
        without x_self a self-conditioned network sees zeros.
        """
        x = self._inputs.stack(x_t, x_in, mask, x_self)
        return tuple(unet(x, times[i]) for unet, i in zip(self.children(), self._time_index, strict=True))


# The networks that are trained here; both are called alike and name themselves by the same attributes.
Network = RddmNet | SharedEncoderNet


def build_net(
    *,
    kind: str = "unet",
    dim: int,
    dim_mults: Sequence[int] = (1, 2, 4, 8),
    num_nets: int = 2,
    condition: str = "input",
    self_condition: bool = False,
    image_channels: int = 3,
    time_of_single: str = "residual",
    activation_checkpointing: bool = False,
) -> Network:
    """The network of these settings with freshly drawn weights; `num_nets` and `time_of_single` are of kind unet.

    Raises ConfigError in one line for settings that no network has.
    """
    if kind not in KINDS:
        raise ConfigError(f"model.kind={kind} is not known; choose one of {', '.join(KINDS)}")
    if kind == "shared_encoder":
        return SharedEncoderNet(
            dim,
            dim_mults,
            condition=condition,
            self_condition=self_condition,
            image_channels=image_channels,
            activation_checkpointing=activation_checkpointing,
        )
    return RddmNet(
        dim,
        dim_mults,
        num_nets=num_nets,
        condition=condition,
        self_condition=self_condition,
        image_channels=image_channels,
        time_of_single=time_of_single,
        activation_checkpointing=activation_checkpointing,
    )
