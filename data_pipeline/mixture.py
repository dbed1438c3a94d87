"""Several datasets in one run: which sample of which dataset stands at which position.

The run goes in windows of 64 global batches. A window holds a fixed number of rows of each dataset, and each of its
batches the even share of that rounded down or up, so that no batch strays and no remainder is lost. Each dataset is
read in its own order and has its own epochs: its k-th row of the run is place k of that order. All of it is a function
of (counts, seed, lanes, weights, global batch) and the position; starting at any position reads nothing before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import ConfigError
from data_pipeline.order import Order, choose_lanes, lane_limit
from data_pipeline.rng import mix_seed

WINDOW_BATCHES = 64
# Coprime to the window and near its golden section: n multiples in a row, modulo the window, lie evenly in it whatever
# n and the first. At any point of a window a dataset is less than 2.1 rows off its share.
SPREAD = 39


class Places(NamedTuple):
    """Where samples lie: (n,) int64 each. dataset: 0, 1, ...; epoch: of that dataset; shard and offset: in it."""

    dataset: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    offset: np.ndarray


def share_window(weights: Sequence[float], global_batch: int) -> np.ndarray:
    """Rows of each dataset in a window of 64 batches, by largest remainder.   ->  (D,) int64, sum 64 * global_batch

    Weights are taken as the decimal numbers they are written as, and need not sum to 1. Raises ConfigError where one
    is not a positive number, or too small for a single row.
    """
    if not weights:
        raise ConfigError("data.uri names no dataset; give at least one")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"data.weights={list(weights)}: weights are numbers above 0")
    exact = [Fraction(str(weight)) for weight in weights]
    total_rows = WINDOW_BATCHES * global_batch
    ideal = [total_rows * weight / sum(exact) for weight in exact]
    rows = [math.floor(share) for share in ideal]
    by_remainder = sorted(range(len(rows)), key=lambda dataset: (rows[dataset] - ideal[dataset], dataset))
    for dataset in by_remainder[: total_rows - sum(rows)]:
        rows[dataset] += 1
    for dataset, count in enumerate(rows):
        if count == 0:
            raise ConfigError(
                f"data.weights: {weights[dataset]} for dataset {dataset} is less than one row in {WINDOW_BATCHES} "
                f"batches of train.global_batch={global_batch}; raise the weight or leave the dataset out"
            )
    return np.array(rows, dtype=np.int64)


def deal_batches(rows_per_window: np.ndarray) -> np.ndarray:
    """Rows of each dataset in each batch of a window.   rows_per_window: (D,) int64, sum 64 B  ->  (64, D) int64

    Rows of the table sum to B, columns to rows_per_window, and every entry is its column's mean rounded down or up.
    """
    rows_per_window = np.asarray(rows_per_window, dtype=np.int64)
    whole, rest = np.divmod(rows_per_window, WINDOW_BATCHES)
    table = np.tile(whole, (WINDOW_BATCHES, 1))
    # The rests sum to a multiple of 64. Dealt round and round over the batches, dataset after dataset, they give every
    # batch the same number and, as each rest is less than 64, no batch two of one dataset.
    owner = np.repeat(np.arange(len(rest)), rest)
    table[np.arange(len(owner)) * SPREAD % WINDOW_BATCHES, owner] += 1
    return table


def choose_mixture_lanes(num_shards: Sequence[int], *, weights: Sequence[float], global_batch: int) -> tuple[int, ...]:
    """Lanes of each dataset from its number of shards and its rows per batch; the world size plays no part.

    Where a dataset has the same number of rows in every batch its lanes divide it, as choose_lanes has it: ranks then
    keep their shards. Elsewhere lanes wander over the ranks, each of which comes to read most shards in part (by range,
    or from the node's cache); there is nothing to divide, and only the limit counts.
    """
    _check_lengths(len(num_shards), weights)
    lanes = []
    for shards, in_window in zip(num_shards, share_window(weights, global_batch).tolist(), strict=True):
        rows, rest = divmod(in_window, WINDOW_BATCHES)
        lanes.append(min(lane_limit(shards), max(rows, 1)) if rest else choose_lanes(shards, rows))
    return tuple(lanes)


def build_mixture(
    counts: Sequence[Sequence[int] | np.ndarray],
    *,
    weights: Sequence[float],
    seed: int,
    lanes: Sequence[int],
    global_batch: int,
) -> Mixture:
    """The mixture of datasets of `counts`, one (num_shards,) each; lanes: one each, see choose_mixture_lanes.

    A dataset alone is read in the order of Order(counts, seed, lanes); among several each has a seed of its own, so
    that two equal datasets do not run in step. Raises ConfigError for weights, counts or lanes that do not fit.
    """
    _check_lengths(len(counts), weights)
    if len(lanes) != len(counts):
        raise ConfigError(f"data.lanes has {len(lanes)} values for {len(counts)} datasets; give one for each")
    seeds = [seed] if len(counts) == 1 else [mix_seed(seed, "dataset", dataset) for dataset in range(len(counts))]
    orders = [Order(own, own_seed, own_lanes) for own, own_seed, own_lanes in zip(counts, seeds, lanes, strict=True)]
    return Mixture(tuple(orders), tuple(weights), global_batch)


@dataclass(frozen=True, eq=False)
class Mixture:
    """The run over several datasets.   orders and weights: one per dataset; global_batch: rows of a batch.

    The rows of a batch lie in blocks, one per dataset, in the order of the datasets. Of one dataset it is its Order.
    A position costs O(D) for D datasets, besides what Order takes; memory is 64 D numbers, besides the orders.
    """

    orders: tuple[Order, ...]
    weights: tuple[float, ...]
    global_batch: int
    _rows: np.ndarray = field(init=False, repr=False)  # (D,) in a window
    _ends: np.ndarray = field(init=False, repr=False)  # (64, D) row of the batch where each dataset's block ends
    _shifts: np.ndarray = field(init=False, repr=False)  # (64, D) place of a row in its dataset, minus the row

    def __post_init__(self) -> None:
        _check_lengths(len(self.orders), self.weights)
        if self.global_batch < 1:
            raise ConfigError(f"train.global_batch={self.global_batch} must be at least 1")
        rows = share_window(self.weights, self.global_batch)
        table = deal_batches(rows)
        ends = np.cumsum(table, axis=1)
        places = np.cumsum(table, axis=0) - table
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_ends", ends)
        object.__setattr__(self, "_shifts", places - (ends - table))

    @property
    def rows_per_window(self) -> np.ndarray:
        """(D,) int64 rows of each dataset in every window of 64 batches."""
        return self._rows.copy()

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whose row it is, and which.   positions: (n,) int64, >= 0  ->  (dataset, place in its run), (n,) int64"""
        positions = np.asarray(positions, dtype=np.int64)
        batches, rows = np.divmod(positions, self.global_batch)
        windows, batches = np.divmod(batches, WINDOW_BATCHES)
        datasets = np.count_nonzero(rows[:, None] >= self._ends[batches], axis=1)  # (n, D) -> (n,)
        return datasets, windows * self._rows[datasets] + rows + self._shifts[batches, datasets]

    def locate(self, positions: np.ndarray) -> Places:
        """Where samples lie.   positions: (n,) int64, >= 0, rows of the run"""
        datasets, own = self.split(positions)
        found = Places(datasets, *(np.empty_like(own) for _ in range(3)))
        for dataset, order in enumerate(self.orders):
            rows = np.flatnonzero(datasets == dataset)
            found.epoch[rows], found.shard[rows], found.offset[rows] = order.locate(own[rows])
        return found

    def locate_in(self, dataset: int, positions: np.ndarray) -> Places:
        """Where samples of one dataset lie.   positions: (n,) int64, >= 0, places in the run of that dataset (split)

        Where row p cannot be read: `dataset, own = mixture.split(p)`, then other places of that dataset near `own`.
        """
        positions = np.asarray(positions, dtype=np.int64)
        return Places(np.full_like(positions, dataset), *self.orders[dataset].locate(positions))

    def describe(self, names: Sequence[str] = ()) -> str:
        """For the plan: what each dataset gets, and what was asked for.   names: one per dataset (0, 1, ...)"""
        total_rows, total_weight = WINDOW_BATCHES * self.global_batch, math.fsum(self.weights)
        names = names or [f"dataset {dataset}" for dataset in range(len(self.orders))]
        parts = []
        for name, order, weight, rows in zip(names, self.orders, self.weights, self._rows.tolist(), strict=True):
            parts.append(
                f"{name} {rows} of {total_rows} rows = {rows / total_rows:.3%} (asked {weight / total_weight:.3%}), "
                f"{order.lanes} lane(s), an epoch in {order.num_samples * WINDOW_BATCHES / rows:.1f} batches"
            )
        return "; ".join(parts)


def _check_lengths(num_datasets: int, weights: Sequence[float]) -> None:
    if len(weights) != num_datasets:
        raise ConfigError(f"data.weights has {len(weights)} values for {num_datasets} datasets; give one for each")
