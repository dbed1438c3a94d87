"""Building blocks of the U-Net; attribute names give the state-dict keys of the published layout."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_DIM = 4, 32
NORM_GROUPS = 8

# Of weight standardisation and LayerNormC. The authors raise it to 1e-3 for any type but float32. Half-precision sums
# are float32 inside layer_norm, so one value does, and a network means the same in every precision (bfloat16 outputs
# then differ from float32 ones by about 1 % instead of 7 %).
EPS = 1e-5


class InputConv(nn.Conv2d):
    """A convolution that takes float32 images whatever type its weights have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class InputLinear(nn.Linear):
    """A linear layer that takes float32 features whatever type its weights have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class WSConv2d(nn.Conv2d):
    """3x3 convolution whose filters are standardised: (w - mean) / sqrt(var + eps), biased variance per filter."""

    def standardised(self) -> Tensor:
        """The filters it convolves with, (out, in, k, k) in the weights' type."""
        flat = self.weight.flatten(1)  # (out, in * k * k)
        return F.layer_norm(flat, flat.shape[1:], eps=EPS).view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        # Images come channels last, filters do not, and a CPU convolution wants both alike: turn the smaller one.
        if x.device.type == "cpu" and x.numel() < self.weight.numel():
            x = x.contiguous()
        return F.conv2d(x, self.standardised().to(x.dtype), self.bias, padding=self.padding)


class PixelConv2d(nn.Conv2d):
    """1x1 convolution computed as a matrix product over channels-last pixels, faster than a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class LayerNormC(nn.Module):
    """Normalises each pixel over its channels (biased variance); gain g, no bias.   (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        return F.layer_norm(pixels, pixels.shape[-1:], self.g.flatten(), eps=EPS).permute(0, 3, 1, 2)


class SinusoidalEmbedding(nn.Module):
    """[sin(t f), cos(t f)], f_k = 10000^(-k / (dim/2 - 1)).   t: (B,) float32, any real  ->  (B, dim) float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(k * (-math.log(10000) / (half - 1)))  # (B, dim / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class ConvBlock(nn.Module):
    """WSConv -> GroupNorm -> optional x * (scale + 1) + shift -> SiLU."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = WSConv2d(dim_in, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(NORM_GROUPS, dim_out)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = torch.addcmul(shift, x, scale + 1)
        return F.silu(x)


class ResBlock(nn.Module):
    """Two ConvBlocks, the first modulated by time, plus the (projected) input."""

    def __init__(self, dim_in: int, dim_out: int, *, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim_out))
        self.block1 = ConvBlock(dim_in, dim_out)
        self.block2 = ConvBlock(dim_out, dim_out)
        self.res_conv = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (B, dim_in, H, W), time: (B, time_dim)  ->  (B, dim_out, H, W)."""
        scale, shift = self.mlp(time)[:, :, None, None].chunk(2, dim=1)  # 2 x (B, dim_out, 1, 1)
        return self.block2(self.block1(x, (scale, shift))) + self.res_conv(x)


class LinearContext(nn.Conv2d):
    """The 1x1 convolution to q, k, v of linear attention, which gives q and the context, but never v itself.

    context[d, e] = sum_n k[d, n] v[e, n] with v = W_v x is (k x^T) W_v^T: cheaper than making v for every pixel.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x: (B, C, H, W)  ->  q (B, HW, heads * 32), context (B, heads, 32 of k, 32 of v)."""
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C)
        weight_qk, weight_v = self.weight.flatten(1).split([2 * HEADS * HEAD_DIM, HEADS * HEAD_DIM])
        q, k = F.linear(pixels, weight_qk).chunk(2, dim=-1)  # 2 x (B, HW, heads * 32)
        q = q.unflatten(-1, (HEADS, HEAD_DIM)).softmax(dim=-1).flatten(2)
        k = k.softmax(dim=1)
        gathered = (k.transpose(1, 2) @ pixels).unflatten(1, (HEADS, HEAD_DIM))  # (B, heads, 32, C)
        context = gathered @ weight_v.unflatten(0, (HEADS, HEAD_DIM)).transpose(1, 2)
        return q, context * (HEAD_DIM**-0.5 / pixels.shape[1])


class LinearReadout(nn.Conv2d):
    """The 1x1 convolution after linear attention, with the context folded into its weights: W_out context^T q."""

    def forward(self, q: Tensor, context: Tensor, size: torch.Size) -> Tensor:  # type: ignore[override]
        """q: (B, HW, heads * 32), context: (B, heads, 32, 32), size: (H, W)  ->  (B, C, H, W)."""
        weight = self.weight.flatten(1).unflatten(1, (HEADS, HEAD_DIM)).transpose(0, 1)  # (heads, C, 32 of v)
        folded = (context @ weight.transpose(1, 2)).flatten(1, 2)  # (B, heads * 32 of k, C)
        pixels = q @ folded + self.bias  # (B, HW, C)
        return pixels.unflatten(1, size).permute(0, 3, 1, 2)


class LinearAttention(nn.Module):
    """Attention whose cost is linear in the number of pixels: softmax over channels for q, over pixels for k.

    out = W_out context^T q * 32^-0.5 / HW, then LayerNormC.   (B, C, H, W) -> the same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_qkv = LinearContext(dim, 3 * HEADS * HEAD_DIM, 1, bias=False)
        self.to_out = nn.ModuleList([LinearReadout(HEADS * HEAD_DIM, dim, 1), LayerNormC(dim)])

    def forward(self, x: Tensor) -> Tensor:
        readout, norm = self.to_out
        return norm(readout(*self.to_qkv(x), x.shape[-2:]))


class Attention(nn.Module):
    """Softmax attention between all pixels.   (B, C, H, W) -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_qkv = PixelConv2d(dim, 3 * HEADS * HEAD_DIM, 1, bias=False)
        self.to_out = PixelConv2d(HEADS * HEAD_DIM, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.to_qkv(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, 3 * heads * 32)
        q, k, v = pixels.unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, HW, 32)
        out = F.scaled_dot_product_attention(q, k, v)
        pixels = out.transpose(1, 2).flatten(2)  # (B, HW, heads * 32)
        return self.to_out(pixels.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2))


class PreNorm(nn.Module):
    """LayerNormC before a module."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = LayerNormC(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Residual(nn.Module):
    """Adds a module's input to its output."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def upsample(dim_in: int, dim_out: int) -> nn.Sequential:
    """Nearest-neighbour doubling, then a 3x3 convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim_in, dim_out, 3, padding=1))
