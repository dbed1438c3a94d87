"""What the training loader hands out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Replaced:
    """A sample that could not be read, and the row it should have filled.

    position: of the row in the run; dataset: index among the run's datasets; shard_index, offset: its place in it.
    """

    position: int
    dataset: int
    shard_index: int
    offset: int
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch.

    input, target: (B, 3, H, W) uint8, channels last in memory, input None where only targets are read; mask: (B, 1, H,
    W) uint8, None without masks.
    keys: sample keys. positions: (B,) int64, each row's position in the run, from which its random numbers come.
    weight: (B,) float32, 1 for rows of the global batch, 0 for rows that only fill up the rank's share.
    step: index of the global batch, 0 for the first of the run. replaced: bad samples another one stands in for.
    """

    input: Tensor | None
    target: Tensor
    mask: Tensor | None
    keys: tuple[str, ...]
    positions: Tensor
    weight: Tensor
    step: int
    replaced: tuple[Replaced, ...] = ()
