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


class PlainLevel(nn.ModuleList):
    """[ResBlock, ResBlock, attention, convolution to the next level] of a decoder without skips."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        block1, block2, attention, grow = self
        return grow(attention(block2(block1(x, time), time)))


def level_widths(dim: int, dim_mults: Sequence[int]) -> list[tuple[int, int]]:
    """Channels (in, out) of each encoder level, the finest first; ConfigError for widths that no network has."""
    if dim < NORM_GROUPS or dim % NORM_GROUPS:
        raise ConfigError(f"model.dim={dim} must be a positive multiple of {NORM_GROUPS}")
    if not dim_mults or min(dim_mults) < 1:
        raise ConfigError(f"model.dim_mults={tuple(dim_mults)} must hold whole numbers of at least 1")
    dims = [dim, *(dim * mult for mult in dim_mults)]
    return list(zip(dims[:-1], dims[1:], strict=True))


def make_time_mlp(dim: int) -> nn.Sequential:
    """From times, (B,) float32, to what every ResBlock is told, (B, 4 dim)."""
    return nn.Sequential(SinusoidalEmbedding(dim), InputLinear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))


def make_encoder(widths: Sequence[tuple[int, int]], *, time_dim: int) -> nn.ModuleList:
    """One EncoderLevel for each of `widths`; all but the last halve the image."""
    levels = nn.ModuleList()
    for i, (narrow, wide) in enumerate(widths):
        is_last = i == len(widths) - 1
        shrink = nn.Conv2d(narrow, wide, 3, padding=1) if is_last else nn.Conv2d(narrow, wide, 4, 2, 1)
        blocks = [ResBlock(narrow, narrow, time_dim=time_dim) for _ in range(2)]
        levels.append(EncoderLevel([*blocks, Residual(PreNorm(narrow, LinearAttention(narrow))), shrink]))
    return levels


def make_decoder(widths: Sequence[tuple[int, int]], *, time_dim: int, has_skips: bool = True) -> nn.ModuleList:
    """One DecoderLevel (PlainLevel without skips) for each of `widths`, from the last; all but the last double."""
    levels = nn.ModuleList()
    for i, (narrow, wide) in reversed(list(enumerate(widths))):
        grow = upsample(wide, narrow) if i > 0 else nn.Conv2d(wide, narrow, 3, padding=1)
        blocks = [ResBlock(wide + narrow * has_skips, wide, time_dim=time_dim) for _ in range(2)]
        parts = [*blocks, Residual(PreNorm(wide, LinearAttention(wide))), grow]
        levels.append(DecoderLevel(parts) if has_skips else PlainLevel(parts))
    return levels


def encode(levels: nn.ModuleList, x: Tensor, time: Tensor, *, recompute: bool) -> tuple[Tensor, list[Any]]:
    """x: (B, C, H, W), time: (B, time_dim)  ->  the deepest features and each level's (early, late) skips."""
    skips = []
    for level in levels:
        x, early, late = run_part(level, x, time, recompute=recompute)
        skips.append((early, late))
    return x, skips


def run_part(part: Callable[..., Any], *tensors: Tensor, recompute: bool) -> Any:
    """Call a part of a network; with `recompute` its insides are computed again in backward instead of kept."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(part, *tensors, use_reentrant=False, preserve_rng_state=False)
    return part(*tensors)


def check_size(x: Tensor, multiple: int) -> None:
    """Refuse images, (B, C, H, W), whose halves do not fit together again."""
    h, w = x.shape[-2:]
    if h % multiple or w % multiple:
        raise ValueError(f"image size {h}x{w} must be a multiple of {multiple}; pad the images")


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
        widths = level_widths(dim, dim_mults)
        self.multiple_of = 2 ** (len(widths) - 1)
        self.activation_checkpointing = activation_checkpointing
        time_dim, deepest = 4 * dim, widths[-1][1]

        self.init_conv = InputConv(in_channels, dim, 7, padding=3)
        self.time_mlp = make_time_mlp(dim)
        self.downs = make_encoder(widths, time_dim=time_dim)
        self.ups = make_decoder(widths, time_dim=time_dim)
        self.mid_block1 = ResBlock(deepest, deepest, time_dim=time_dim)
        self.mid_attn = Residual(PreNorm(deepest, Attention(deepest)))
        self.mid_block2 = ResBlock(deepest, deepest, time_dim=time_dim)
        self.final_res_block = ResBlock(2 * dim, dim, time_dim=time_dim)
        self.final_conv = nn.Conv2d(dim, out_channels, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) float32, t: (B,) float32  ->  (B, out_channels, H, W) in the weights' type."""
        check_size(x, self.multiple_of)
        recompute = self.activation_checkpointing
        time = self.time_mlp(t)
        first = self.init_conv(x)
        x, skips = encode(self.downs, first, time, recompute=recompute)
        x = run_part(self._middle, x, time, recompute=recompute)
        for level in self.ups:
            x = run_part(level, x, time, *skips.pop(), recompute=recompute)
        return run_part(self._finish, x, time, first, recompute=recompute)

    def _middle(self, x: Tensor, time: Tensor) -> Tensor:
        return self.mid_block2(self.mid_attn(self.mid_block1(x, time)), time)

    def _finish(self, x: Tensor, time: Tensor, first: Tensor) -> Tensor:
        return self.final_conv(self.final_res_block(torch.cat([x, first], dim=1), time))
