"""The U-Net: encoder and decoder levels of residual blocks with linear attention, full attention in the middle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.errors import ConfigError
from rddm_dist.model.blocks import (
    NORM_GROUPS,
    Attention,
    InputConv,
    InputLinear,
    LinearAttention,
    PreNorm,
    ResBlock,
    Residual,
    SinusoidalEmbedding,
    upsample,
)


class EncoderLevel(nn.ModuleList):
    """[ResBlock, ResBlock, attention, convolution to the next level]; gives the level's two skips as well."""

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block1, block2, attention, shrink = self
        early = block1(x, time)
        late = attention(block2(early, time))
        return shrink(late), early, late


class DecoderLevel(nn.ModuleList):
    """[ResBlock, ResBlock, attention, convolution to the next level], fed the encoder's skips, the later one first."""

    def forward(self, x: Tensor, time: Tensor, early: Tensor, late: Tensor) -> Tensor:
        block1, block2, attention, grow = self
        x = block1(torch.cat([x, late], dim=1), time)
        x = block2(torch.cat([x, early], dim=1), time)
        return grow(attention(x))


class Unet(nn.Module):
    """One U-Net with the state-dict keys, in order, of the published checkpoints.

    Height and width of its input must be multiples of `multiple_of`.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        in_channels: int = 3,
        out_channels: int = 3,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if dim < NORM_GROUPS or dim % NORM_GROUPS:
            raise ConfigError(f"model.dim={dim} must be a positive multiple of {NORM_GROUPS}")
        if not dim_mults or min(dim_mults) < 1:
            raise ConfigError(f"model.dim_mults={tuple(dim_mults)} must hold whole numbers of at least 1")
        self.multiple_of = 2 ** (len(dim_mults) - 1)
        self.activation_checkpointing = activation_checkpointing
        time_dim = 4 * dim
        dims = [dim, *(dim * mult for mult in dim_mults)]
        levels = list(zip(dims[:-1], dims[1:], strict=True))
        last = len(levels) - 1

        self.init_conv = InputConv(in_channels, dim, 7, padding=3)
        self.time_mlp = nn.Sequential(
            SinusoidalEmbedding(dim), InputLinear(dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim)
        )
        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()
        for i, (narrow, wide) in enumerate(levels):
            shrink = nn.Conv2d(narrow, wide, 4, 2, 1) if i < last else nn.Conv2d(narrow, wide, 3, padding=1)
            blocks = [ResBlock(narrow, narrow, time_dim=time_dim) for _ in range(2)]
            self.downs.append(EncoderLevel([*blocks, Residual(PreNorm(narrow, LinearAttention(narrow))), shrink]))
        for i, (narrow, wide) in reversed(list(enumerate(levels))):
            grow = upsample(wide, narrow) if i > 0 else nn.Conv2d(wide, narrow, 3, padding=1)
            blocks = [ResBlock(wide + narrow, wide, time_dim=time_dim) for _ in range(2)]
            self.ups.append(DecoderLevel([*blocks, Residual(PreNorm(wide, LinearAttention(wide))), grow]))
        self.mid_block1 = ResBlock(dims[-1], dims[-1], time_dim=time_dim)
        self.mid_attn = Residual(PreNorm(dims[-1], Attention(dims[-1])))
        self.mid_block2 = ResBlock(dims[-1], dims[-1], time_dim=time_dim)
        self.final_res_block = ResBlock(2 * dim, dim, time_dim=time_dim)
        self.final_conv = nn.Conv2d(dim, out_channels, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) float32, t: (B,) float32  ->  (B, out_channels, H, W) in the weights' type."""
        h, w = x.shape[-2:]
        if h % self.multiple_of or w % self.multiple_of:
            raise ValueError(f"image size {h}x{w} must be a multiple of {self.multiple_of}; pad the images")
        time = self.time_mlp(t)
        x = first = self.init_conv(x)
        skips: list[tuple[Tensor, Tensor]] = []
        for level in self.downs:
            x, early, late = self._run(level, x, time)
            skips.append((early, late))
        x = self._run(self._middle, x, time)
        for level in self.ups:
            x = self._run(level, x, time, *skips.pop())
        return self._run(self._finish, x, time, first)

    def _middle(self, x: Tensor, time: Tensor) -> Tensor:
        return self.mid_block2(self.mid_attn(self.mid_block1(x, time)), time)

    def _finish(self, x: Tensor, time: Tensor, first: Tensor) -> Tensor:
        return self.final_conv(self.final_res_block(torch.cat([x, first], dim=1), time))

    def _run(self, part: Callable[..., Any], *tensors: Tensor) -> Any:
        """Call a part of the network; with activation checkpointing its insides are computed again in backward."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *tensors, use_reentrant=False, preserve_rng_state=False)
        return part(*tensors)
