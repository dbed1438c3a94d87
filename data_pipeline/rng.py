"""Counter-based random numbers: every draw is a function of (seed, purpose, who, where, when), never of a stream.

Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011) in int64 arithmetic.
The same draw comes out whatever the batch, the worker, the tile, the device or the moment it is asked for.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MAX_SIDE = 1 << 16  # rows, columns, steps and channel blocks share 32-bit words in pairs

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def mix_seed(seed: int, *parts: int | str) -> int:
    """A 64-bit key from a seed and what it is for; the same in every process and version (blake2b)."""
    text = "\x1f".join([f"i{int(seed)}", *(f"s{part}" if isinstance(part, str) else f"i{int(part)}" for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def stable_id(text: str) -> int:
    """A 63-bit id of a name, for draws that belong to it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def philox(counter: Words, key: int) -> Words:
    """Philox 4x32-10.   counter: four int64 tensors of 32-bit words, of shapes that broadcast; key: 64 bits
    ->  four int64 tensors of 32-bit words, of the common shape."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(ROUNDS):
        # The product wraps in int64; its low 32 bits are right, and so are bits 32..63 after an unsigned shift.
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def uniform(seed: int, purpose: str, ids: Tensor, *, count: int = 4, step: int = 0) -> Tensor:
    """Uniform numbers.   ids: (B,) int64  ->  (B, count) float64 in [0, 1)."""
    blocks = torch.arange(-(-count // 4), device=ids.device)
    words = philox(_counter(ids[:, None], torch.zeros_like(blocks), (step << 16) | blocks), mix_seed(seed, purpose))
    return torch.stack(words, dim=-1).flatten(1)[:, :count].double() / 2.0**32


def integers(seed: int, purpose: str, ids: Tensor, high: Tensor | int, *, step: int = 0) -> Tensor:
    """Integers.   ids: (B,) int64; high: (B,) int64 or int, up to 2^31  ->  (B,) int64 in [0, high)."""
    zero = torch.zeros((), dtype=torch.int64, device=ids.device)
    word = philox(_counter(ids, zero, zero + (step << 16)), mix_seed(seed, purpose))[0]
    return (word * high) >> 32


def normal_image(
    seed: int,
    purpose: str,
    ids: Tensor,
    *,
    channels: int,
    height: int,
    width: int,
    step: int = 0,
    top: int = 0,
    left: int = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Standard normal images.   ids: (B,) int64  ->  (B, channels, height, width) float32.

    Pixel (row, column) belongs to counter (id low, id high, row << 16 | column, step << 16 | channel block): a window
    at (top, left) equals that window of the whole image. Box-Muller in float64, rounded to float32: the last bits of
    log and cos, which differ between devices, hardly ever show.
    """
    if max(top + height, left + width) > MAX_SIDE or step >= MAX_SIDE:
        raise ValueError(
            f"images up to {MAX_SIDE} pixels a side and steps below {MAX_SIDE}; got {height}x{width}, {step}"
        )
    ids = ids.to(device).view(-1, 1, 1, 1)
    rows = torch.arange(top, top + height, device=device).view(1, 1, -1, 1)
    columns = torch.arange(left, left + width, device=device)
    blocks = torch.arange(-(-channels // 4), device=device).view(1, -1, 1, 1)
    words = philox(_counter(ids, (rows << 16) | columns, (step << 16) | blocks), mix_seed(seed, purpose))
    out = torch.empty((ids.shape[0], blocks.numel(), 4, height, width), dtype=torch.float32, device=device)
    for pair in (0, 1):
        if pair * 2 >= channels:
            break
        # u in (0, 1]: the logarithm is finite.
        radius = ((words[2 * pair] + 1).double() * 2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = words[2 * pair + 1].double().mul_(2.0 * math.pi * 2.0**-32)
        out[:, :, 2 * pair] = radius * angle.cos()
        if pair * 2 + 1 < channels:
            out[:, :, 2 * pair + 1] = radius.mul_(angle.sin_())
    return out.flatten(1, 2)[:, :channels].contiguous()


def permutation(seed: int, count: int, *parts: int | str) -> np.ndarray:
    """A permutation of 0..count-1: the order of `count` counted 64-bit words.   ->  (count,) int64"""
    ids = torch.arange(count)
    zero = torch.zeros((), dtype=torch.int64)
    w0, w1, _, _ = philox(_counter(ids, zero, zero), mix_seed(seed, "permutation", *parts))
    words = (w0.numpy().astype(np.uint64) << np.uint64(32)) | w1.numpy().astype(np.uint64)
    return np.argsort(words, kind="stable")


def _counter(ids: Tensor, pixel: Tensor, step: Tensor) -> Words:
    return ids & MASK, (ids >> 32) & MASK, pixel, step


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch of samples.   ids: (B,) int64, run positions in training, key ids in evaluation."""

    seed: int
    ids: Tensor
    device: str = "cpu"

    def timesteps(self, num_timesteps: int) -> Tensor:
        """(B,) int64, uniform in 1..T."""
        return integers(self.seed, "timestep", self.ids, num_timesteps).to(self.device) + 1

    def self_condition(self) -> Tensor:
        """(B,) bool: whether a sample in training is shown the network's own estimate; probability 1/2."""
        return integers(self.seed, "self_condition", self.ids, 2).to(self.device) == 1

    def noise(self, shape: torch.Size | tuple[int, ...], step: int = 0) -> Tensor:
        """Standard normal noise.   shape: (B, C, H, W)  ->  float32; `step` tells a sampler's draws apart."""
        _, channels, height, width = shape
        return normal_image(
            self.seed,
            "noise",
            self.ids,
            channels=channels,
            height=height,
            width=width,
            step=step,
            device=self.device,
        )
