"""Pure arithmetic: which sample stands at which position of the run.

The order is a function of (shard counts, seed, lanes) alone. Starting at any position reads nothing before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from data_pipeline.errors import ConfigError
from data_pipeline.rng import permutation

SHARDS_PER_LANE = 10
FEW_LANES = 8


def lane_limit(num_shards: int) -> int:
    """The most shards worth reading side by side: num_shards / 10, so that a shard is fetched about once per epoch.

    With few shards up to 8, which mix samples of several shards in a batch; re-reading then costs little.
    """
    return max(num_shards // SHARDS_PER_LANE, min(num_shards, FEW_LANES), 1)


def choose_lanes(num_shards: int, global_batch: int) -> int:
    """Number of shards read side by side: the largest divisor of the global batch within lane_limit.

    The world size plays no part.
    """
    limit = lane_limit(num_shards)
    return max(lanes for lanes in range(1, min(limit, global_batch) + 1) if global_batch % lanes == 0)


def rank_rows(step: int, *, global_batch: int, rank: int, world_size: int) -> np.ndarray:
    """Positions of the rows of global batch `step` (0, 1, ...) that belong to a rank: row j to rank j mod world_size.

    -> (rows,) int64
    """
    return np.arange(step * global_batch + rank, (step + 1) * global_batch, world_size, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Order:
    """The order of the run.   counts: (num_shards,) samples per shard, none of them 0; lanes: see choose_lanes.

    With N samples, position p is place q = p mod N of epoch p div N. Lane l = q mod L walks the samples
    v = l * (N div L) + min(l, N mod L) + q div L of the epoch's sequence of shards, permuted per epoch; samples are
    permuted inside their shard per (epoch, shard). Each sample comes exactly once per epoch.

    Cost with S shards: n positions take O(n log S + n log n) time, besides O(S log S) once per epoch they touch and
    O(c log c) once per shard of c samples, wherever they lie. Kept in memory: 16 S bytes for each of the last 4 epochs,
    and for the last 2 L + 8 shards 1, 2 or 4 bytes per sample (up to 2^8, 2^16, 2^32 samples in the shard).
    """

    counts: Sequence[int] | np.ndarray
    seed: int
    lanes: int
    _epoch_table: Callable[[int], tuple[np.ndarray, np.ndarray]] = field(init=False, repr=False)
    _offsets: Callable[[int, int], np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts, dtype=np.int64)
        if counts.size == 0 or counts.min() < 1:
            raise ConfigError("a dataset needs at least one shard, and every shard at least one sample")
        if self.lanes < 1:
            raise ConfigError(f"data.lanes={self.lanes} must be at least 1")
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "_epoch_table", lru_cache(maxsize=4)(self._make_epoch_table))
        # Every lane keeps one shard open, two where it changes over.
        object.__setattr__(self, "_offsets", lru_cache(maxsize=2 * self.lanes + 8)(self._make_offsets))

    @cached_property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return int(np.sum(self.counts))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where samples lie.   positions: (n,) int64, >= 0  ->  (epoch, shard_index, offset), (n,) int64 each"""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions, self.num_samples)
        shards, offsets = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            shards[rows], offsets[rows] = self._locate_in_epoch(int(epoch), places[rows])
        return epochs, shards, offsets

    def _locate_in_epoch(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        share, rest = divmod(self.num_samples, self.lanes)
        step, lane = np.divmod(places, self.lanes)
        sequence = lane * share + np.minimum(lane, rest) + step
        shard_order, ends = self._epoch_table(epoch)
        slots = np.searchsorted(ends, sequence, side="right")
        shards = shard_order[slots]
        offsets = sequence - np.where(slots > 0, ends[slots - 1], 0)
        by_shard = np.argsort(shards, kind="stable")
        for rows in np.split(by_shard, np.flatnonzero(np.diff(shards[by_shard])) + 1):
            offsets[rows] = self._offsets(epoch, int(shards[rows[0]]))[offsets[rows]]
        return shards, offsets

    def _make_epoch_table(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of the epoch, and where each ends in its sequence of samples."""
        counts = np.asarray(self.counts)
        shard_order = permutation(self.seed, counts.size, "shards", epoch)
        return shard_order, np.cumsum(counts[shard_order])

    def _make_offsets(self, epoch: int, shard_index: int) -> np.ndarray:
        count = int(self.counts[shard_index])
        # Many are kept: the narrowest unsigned integers that hold the offsets.
        return permutation(self.seed, count, "samples", epoch, shard_index).astype(np.min_scalar_type(count - 1))
