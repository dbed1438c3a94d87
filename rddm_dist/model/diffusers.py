"""A noise-predicting U-Net in the UNet2DModel layout (google/ddpm-celebahq-256, ddpm-cifar10-32), and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data_pipeline.errors import ModelError
from rddm_dist.model.unet import check_size

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
DOWN_TYPES, UP_TYPES = ("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")

# Settings of other variants of this architecture, and the only values known here; absent keys have them.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "add_attention": (True,),
    "attn_norm_num_groups": (None,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_type": ("conv", None),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D",),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "upsample_type": ("conv", None),
}
# Attention weights are called so in files of older versions.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class UNet2DConfig:
    """The settings of config.json that change the network; the defaults are those of the format.

    attention_head_dim: channels of one attention head, None for a single head.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    layers_per_block: int = 2
    downsample_padding: int = 1
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if not levels or len(self.down_block_types) != levels or len(self.up_block_types) != levels:
            raise ModelError(
                f"block_out_channels has {levels} entries, down_block_types {len(self.down_block_types)} and "
                f"up_block_types {len(self.up_block_types)}; give as many of each"
            )
        for name, allowed in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
            unknown = [kind for kind in getattr(self, name) if kind not in allowed]
            if unknown:
                raise ModelError(f"{name} has {unknown[0]}; known are {', '.join(allowed)}")
        if self.downsample_padding not in (0, 1):
            raise ModelError(f"downsample_padding={self.downsample_padding} must be 0 or 1")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups or channels % (self.attention_head_dim or channels):
                raise ModelError(
                    f"block_out_channels has {channels}, not a multiple of norm_num_groups={self.norm_num_groups} and "
                    f"attention_head_dim={self.attention_head_dim}"
                )


class _Embedding(nn.Module):
    """Sines and cosines of t / 10000^(k / (half - freq_shift)), k < half = dim/2, and two linear layers."""

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        self._dim = config.block_out_channels[0]
        self._shift, self._cos_first = config.freq_shift, config.flip_sin_to_cos
        self.linear_1 = nn.Linear(self._dim, 4 * self._dim)
        self.linear_2 = nn.Linear(4 * self._dim, 4 * self._dim)

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,) float32  ->  (B, 4 dim) in the weights' type."""
        half = self._dim // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(k * (-math.log(10000) / (half - self._shift)))  # (B, dim / 2)
        waves = (angles.cos(), angles.sin()) if self._cos_first else (angles.sin(), angles.cos())
        return self.linear_2(F.silu(self.linear_1(torch.cat(waves, dim=1).to(self.linear_1.weight.dtype))))


class _ResBlock(nn.Module):
    """conv2(silu(norm2(conv1(silu(norm1(x))) + time))) plus the (projected) input."""

    def __init__(self, dim_in: int, dim_out: int, config: UNet2DConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, dim_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], dim_out)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, dim_out, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (B, dim_in, H, W), time: (B, 4 dim)  ->  (B, dim_out, H, W)."""
        y = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.conv_shortcut(x)


class _Attention(nn.Module):
    """Softmax attention between all pixels, after a GroupNorm, plus its input.   (B, C, H, W) -> the same"""

    def __init__(self, dim: int, config: UNet2DConfig) -> None:
        super().__init__()
        self._heads = dim // (config.attention_head_dim or dim)
        self.group_norm = nn.GroupNorm(config.norm_num_groups, dim, eps=config.norm_eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (
            layer(pixels).unflatten(2, (self._heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )  # each (B, heads, HW, C / heads)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, HW, C)
        return x + self.to_out[0](out).transpose(1, 2).unflatten(2, x.shape[2:])


class _Resize(nn.Module):
    """Halves (a convolution of stride 2) or doubles (nearest neighbours, then a convolution) an image."""

    def __init__(self, dim: int, *, halves: bool, padding: int = 1) -> None:
        super().__init__()
        self.halves, self._pads_after = halves, halves and padding == 0
        self.conv = nn.Conv2d(dim, dim, 3, stride=2 if halves else 1, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if not self.halves:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self._pads_after:
            x = F.pad(x, (0, 1, 0, 1))  # without padding of its own, the convolution needs a row and a column more
        return self.conv(x)


class _DownLevel(nn.Module):
    """ResBlocks of these widths (in, out), each with attention or without, then at most one _Resize."""

    def __init__(
        self, widths: list[tuple[int, int]], config: UNet2DConfig, *, attends: bool, resizes: list[_Resize]
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(_Attention(wide, config) if attends else nn.Identity() for _, wide in widths)
        self.resnets = nn.ModuleList(_ResBlock(dim_in, dim_out, config) for dim_in, dim_out in widths)
        self.downsamplers = nn.ModuleList(resizes)

    def forward(self, x: Tensor, time: Tensor) -> list[Tensor]:
        """What each part gives, in order; all of them are skips, the last goes on."""
        features = [x]
        for block, attention in zip(self.resnets, self.attentions, strict=True):
            features.append(attention(block(features[-1], time)))
        for halve in self.downsamplers:
            features.append(halve(features[-1]))
        return features[1:]


class _UpLevel(nn.Module):
    """As _DownLevel, for ResBlocks that each see one more skip."""

    def __init__(
        self, widths: list[tuple[int, int]], config: UNet2DConfig, *, attends: bool, resizes: list[_Resize]
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(_Attention(wide, config) if attends else nn.Identity() for _, wide in widths)
        self.resnets = nn.ModuleList(_ResBlock(dim_in, dim_out, config) for dim_in, dim_out in widths)
        self.upsamplers = nn.ModuleList(resizes)

    def forward(self, x: Tensor, time: Tensor, skips: list[Tensor]) -> Tensor:
        """Takes what it needs from the end of `skips`."""
        for block, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(block(torch.cat([x, skips.pop()], dim=1), time))
        for double in self.upsamplers:
            x = double(x)
        return x


class _Middle(nn.Module):
    """ResBlock, attention, ResBlock.   x: (B, C, H, W), time: (B, 4 dim) -> (B, C, H, W)"""

    def __init__(self, dim: int, config: UNet2DConfig) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([_Attention(dim, config)])
        self.resnets = nn.ModuleList(_ResBlock(dim, dim, config) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        before, after = self.resnets
        return after(self.attentions[0](before(x, time)), time)


class UNet2D(nn.Module):
    """Predicts the noise in x_t; called like the networks trained here, with one output.

    Height and width must be multiples of `multiple_of`. It is told times[1], the index 0..T-1 of the DDPM it was
    trained as; x_in, mask and x_self are ignored.
    """

    condition, self_condition, num_outputs = "none", False, 1

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.config, self.image_channels = config, config.in_channels
        self.multiple_of = 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = _Embedding(config)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, width, last = [widths[0]], widths[0], len(widths) - 1
        for i, kind in enumerate(config.down_block_types):
            pairs = [(width if j == 0 else widths[i], widths[i]) for j in range(config.layers_per_block)]
            width = widths[i]
            resizes = [_Resize(width, halves=True, padding=config.downsample_padding)] if i < last else []
            self.down_blocks.append(_DownLevel(pairs, config, attends=kind == "AttnDownBlock2D", resizes=resizes))
            skips += [width] * (config.layers_per_block + (i < last))
        self.mid_block = _Middle(width, config)
        for i, kind in enumerate(config.up_block_types):
            pairs = []
            for _ in range(config.layers_per_block + 1):
                pairs.append((width + skips.pop(), widths[last - i]))
                width = widths[last - i]
            resizes = [_Resize(width, halves=False)] if i < last else []
            self.up_blocks.append(_UpLevel(pairs, config, attends=kind == "AttnUpBlock2D", resizes=resizes))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x_t: Tensor,
        times: tuple[Tensor, Tensor],
        x_in: Tensor | None = None,
        mask: Tensor | None = None,
        x_self: Tensor | None = None,
    ) -> tuple[Tensor]:
        """x_t: (B, in_channels, H, W), times: 2 x (B,) float32  ->  the noise, (B, out_channels, H, W)."""
        check_size(x_t, self.multiple_of)
        time = self.time_embedding(times[1])
        skips = [self.conv_in(x_t.to(self.conv_in.weight.dtype))]
        for level in self.down_blocks:
            skips += level(skips[-1], time)
        x = self.mid_block(skips[-1], time)
        for level in self.up_blocks:
            x = level(x, time, skips)
        return (self.conv_out(F.silu(self.conv_norm_out(x))),)


def load_unet2d(folder: str | Path) -> UNet2D:
    """The network of a folder with config.json and diffusion_pytorch_model.safetensors, in evaluation mode on the CPU.

    Attention weights may have their old or their new names. Raises ModelError in one line for another architecture or
    for weights that do not fit the configuration.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ModelError(f"weights {path} do not exist; only safetensors are read")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"weights {path} cannot be read ({error}): not a safetensors file, or cut short") from error
    with torch.device("meta"):
        net = UNet2D(config)
    net.load_state_dict(_fit(found, net.state_dict(), source=str(path)), assign=True)
    return net.eval().requires_grad_(False)


def parse_config(values: Mapping[str, Any], *, source: str) -> UNet2DConfig:
    """The configuration of these values of config.json; ModelError in one line for another architecture."""
    for name, allowed in FIXED.items():
        if name in values and values[name] not in allowed:
            raise ModelError(f"{source}: {name}={values[name]} is not known; only {allowed[0]} is")
    try:
        known: dict[str, Any] = {f.name: values[f.name] for f in fields(UNet2DConfig) if f.name in values}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return UNet2DConfig(**known)
    except (TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{source}: a setting has the wrong type or is 0 ({error})") from error
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error


def _read_config(path: Path) -> UNet2DConfig:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist; give the folder of a UNet2DModel") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON") from error
    name = values.get("_class_name", "UNet2DModel") if isinstance(values, dict) else None
    if name != "UNet2DModel":
        raise ModelError(f"{path} describes {name or 'nothing'}; only UNet2DModel can be read")
    return parse_config(values, source=str(path))


def _fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The tensors under their new names, as float32; ModelError unless they are exactly those of the network."""
    state: dict[str, Tensor] = {}
    for name, tensor in found.items():
        stem, _, kind = name.rpartition(".")
        parent, _, layer = stem.rpartition(".")
        if layer in OLD_NAMES and ".attentions." in name:
            name = f"{parent}.{OLD_NAMES[layer]}.{kind}"
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor  # some were 1x1 convolutions
        state[name] = tensor.float()
    wrong = sorted(set(expected) ^ set(state))
    wrong += [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if wrong:
        what = "missing" if wrong[0] not in state else "unknown" if wrong[0] not in expected else "of another shape"
        raise ModelError(f"{source} does not fit its {CONFIG_FILE}: {wrong[0]} is {what} ({len(wrong)} in all)")
    return state
