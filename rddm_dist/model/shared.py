"""The shared-encoder network: one encoder, a decoder without skips for the residual, one with skips for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rddm_dist.model.blocks import Attention, InputConv, PreNorm, ResBlock, Residual
from rddm_dist.model.inputs import Inputs
from rddm_dist.model.unet import (
    check_size,
    encode,
    level_widths,
    make_decoder,
    make_encoder,
    make_time_mlp,
    run_part,
)


class SharedEncoderNet(nn.Module):
    """Two outputs from one encoder, meant for pred_res_add_noise; state-dict keys, in order, as published.

    Output 0 (residual) comes through `ups_no_skip`, which sees nothing but the middle of the network; output 1 through
    `ups`, a U-Net's decoder. Both are told times[0]. `condition` and `self_condition` are as in `Inputs`.
    """

    num_outputs = 2

    def __init__(
        self,
        dim: int,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        *,
        condition: str = "input",
        self_condition: bool = False,
        image_channels: int = 3,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.condition, self.self_condition, self.image_channels = condition, self_condition, image_channels
        self._inputs = Inputs(condition, self_condition, image_channels)
        self.activation_checkpointing = activation_checkpointing
        widths = level_widths(dim, dim_mults)
        self.multiple_of = 2 ** (len(widths) - 1)
        time_dim, deepest = 4 * dim, widths[-1][1]

        self.init_conv = InputConv(self._inputs.channels, dim, 7, padding=3)
        self.time_mlp = make_time_mlp(dim)
        self.downs = make_encoder(widths, time_dim=time_dim)
        self.ups = make_decoder(widths, time_dim=time_dim)
        self.ups_no_skip = make_decoder(widths, time_dim=time_dim, has_skips=False)
        self.mid_block1 = ResBlock(deepest, deepest, time_dim=time_dim)
        self.mid_attn = Residual(PreNorm(deepest, Attention(deepest)))
        self.mid_block2 = ResBlock(deepest, deepest, time_dim=time_dim)
        self.final_res_block_1 = ResBlock(dim, dim, time_dim=time_dim)
        self.final_conv_1 = nn.Conv2d(dim, image_channels, 1)
        self.final_res_block_2 = ResBlock(2 * dim, dim, time_dim=time_dim)
        self.final_conv_2 = nn.Conv2d(dim, image_channels, 1)

    def forward(
        self,
        x_t: Tensor,
        times: tuple[Tensor, Tensor],
        x_in: Tensor | None = None,
        mask: Tensor | None = None,
        x_self: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Two outputs, each (B, image_channels, H, W) in the weights' type; the arguments are those of RddmNet."""
        x = self._inputs.stack(x_t, x_in, mask, x_self)
        check_size(x, self.multiple_of)
        recompute = self.activation_checkpointing
        time = self.time_mlp(times[0])
        first = self.init_conv(x)
        x, skips = encode(self.downs, first, time, recompute=recompute)
        middle = run_part(self._middle, x, time, recompute=recompute)
        x = middle
        for level in self.ups_no_skip:
            x = run_part(level, x, time, recompute=recompute)
        residual = run_part(self._finish_1, x, time, recompute=recompute)
        x = middle
        for level in self.ups:
            x = run_part(level, x, time, *skips.pop(), recompute=recompute)
        return residual, run_part(self._finish_2, x, time, first, recompute=recompute)

    def _middle(self, x: Tensor, time: Tensor) -> Tensor:
        return self.mid_block2(self.mid_attn(self.mid_block1(x, time)), time)

    def _finish_1(self, x: Tensor, time: Tensor) -> Tensor:
        return self.final_conv_1(self.final_res_block_1(x, time))

    def _finish_2(self, x: Tensor, time: Tensor, first: Tensor) -> Tensor:
        return self.final_conv_2(self.final_res_block_2(torch.cat([x, first], dim=1), time))
