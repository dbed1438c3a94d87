"""The training loader: endless batches in the order of the run, read and decoded ahead by threads."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline import storage
from data_pipeline.batch import Batch, Replaced
from data_pipeline.errors import ConfigError
from data_pipeline.mixture import Mixture, build_mixture
from data_pipeline.reader import Dataset
from data_pipeline.rows import Fetched, Row, RowReader, RowSettings
from data_pipeline.transforms import Augments, crop_at, draw_augments

log = logging.getLogger(__name__)

# Arithmetic and random numbers have a price per call, so they are done for many rows at once: few at first, so that the
# first batch comes soon, then up to about this many.
PLANNED_ROWS = 1024
FIRST_PLANNED_ROWS = 64
CHUNK_ROWS = 16  # rows a thread takes at once, at most
FETCH_THREADS = 16  # reads under way at once where data comes over a network
WARM_THREADS = 2
STALL_S = 20.0  # a wait longer than this is told, again each time it has doubled


@dataclass(frozen=True)
class Pace:
    """How far and how hard the loader works ahead; none of it shows in the batches.

    threads: that decode; batches: waiting or in work at most; bytes: of encoded and decoded images ahead, at most
    (one batch is always allowed).
    """

    threads: int = 2
    batches: int = 4
    bytes: int = 1 << 30


@dataclass(frozen=True)
class Share:
    """This worker's part of every global batch: rows rank, rank + world_size, ...

    rows: rows of every batch it gets; those beyond its part repeat its first row with weight 0.
    """

    rank: int
    world_size: int
    rows: int


def build_train_loader(
    datasets: Sequence[Dataset],
    settings: RowSettings,
    *,
    seed: int,
    global_batch: int,
    lanes: Sequence[int],
    share: Share,
    start_step: int,
    weights: Sequence[float] = (1.0,),
    pace: Pace | None = None,
) -> TrainLoader:
    """A worker's rows of global batches start_step, start_step + 1, ..., without end.

    Rows depend on (manifests, weights, seed, lanes, settings) and the position in the run alone. lanes, weights: one
    per dataset. Raises ConfigError for what does not fit together.
    """
    pace = pace or Pace()
    if not 0 <= share.rank < share.world_size <= global_batch:
        raise ConfigError(
            f"rank {share.rank} of {share.world_size} workers with train.global_batch={global_batch}: there must be a "
            "row for each"
        )
    if len(datasets) == 1 and global_batch % lanes[0]:
        raise ConfigError(f"data.lanes={lanes[0]} does not divide train.global_batch={global_batch}; change one")
    if share.rows < -(-(global_batch - share.rank) // share.world_size):
        raise ConfigError(
            f"{share.rows} rows do not hold rank {share.rank}'s share of train.global_batch={global_batch}"
        )
    if pace.threads < 1 or pace.batches < 1:
        raise ConfigError(f"data.threads={pace.threads} and data.prefetch_batches={pace.batches} must be at least 1")
    settings.check([dataset.uri for dataset in datasets], [dataset.manifest for dataset in datasets])
    counts = [dataset.manifest.counts for dataset in datasets]
    mixture = build_mixture(counts, weights=weights, seed=seed, lanes=lanes, global_batch=global_batch)
    planner = _Planner(mixture, settings, seed=seed, share=share, start_step=start_step)
    return TrainLoader(datasets, RowReader(datasets, mixture, settings, seed=seed), planner, share=share, pace=pace)


class _StepPlan(NamedTuple):
    """A worker's rows of one global batch, before anything is read.   positions: (n,) int64; augments: n rows"""

    step: int
    crop: int
    positions: np.ndarray
    rows: list[Row]
    augments: Augments


class _Planner:
    """Positions, places and random numbers of a worker's rows, for many batches at a time."""

    def __init__(self, mixture: Mixture, settings: RowSettings, *, seed: int, share: Share, start_step: int) -> None:
        self._mixture, self._settings, self._seed = mixture, settings, seed
        self._own = np.arange(share.rank, mixture.global_batch, share.world_size, dtype=np.int64)
        self._rows = FIRST_PLANNED_ROWS
        self._next_step = start_step

    def plan(self) -> list[_StepPlan]:
        """The next few batches."""
        steps = self._next_step + np.arange(max(1, self._rows // len(self._own)))
        self._next_step += len(steps)
        self._rows = min(2 * self._rows, PLANNED_ROWS)
        positions = (steps[:, None] * self._mixture.global_batch + self._own).reshape(-1)
        places = self._mixture.locate(positions)
        augments = draw_augments(self._seed, positions, flip=self._settings.flip, rotate=self._settings.rotate)
        columns = (positions, *(places.dataset, places.shard, places.offset), augments.top, augments.left)
        rows = [Row(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]
        count = len(self._own)
        plans = []
        for number, step in enumerate(steps.tolist()):
            own = slice(number * count, (number + 1) * count)
            own_augments = Augments(*(column[own] for column in augments))
            crop = crop_at(step, self._settings.crop)
            plans.append(_StepPlan(step, crop, positions[own], rows[own], own_augments))
        return plans


@dataclass(frozen=True)
class _Pending:
    """A batch in work: the images that threads fill, and what each chunk of rows yields (keys, bad samples)."""

    plan: _StepPlan
    images: dict[str, Tensor]
    chunks: list[Future[tuple[list[str], list[Replaced]]]]
    bytes: int


class TrainLoader:
    """Endless iterator over Batch. Decoding starts when it is made; close() ends its threads, as leaving `with` does.

    What goes wrong in a thread is raised where the batch is asked for.
    """

    def __init__(
        self, datasets: Sequence[Dataset], reader: RowReader, planner: _Planner, *, share: Share, pace: Pace
    ) -> None:
        self._datasets, self._reader, self._planner = datasets, reader, planner
        self._share, self._pace = share, pace
        self._plans: deque[_StepPlan] = deque()
        self._ahead: list[_StepPlan] = []
        self._pending: deque[_Pending] = deque()
        self._decoders = ThreadPoolExecutor(pace.threads, thread_name_prefix="decode")
        is_slow = any(dataset.is_slow for dataset in datasets)
        self._fetchers = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch") if is_slow else None
        # Apart, so that shards of later batches do not hold up the reads of the next one.
        self._warmers = ThreadPoolExecutor(WARM_THREADS, thread_name_prefix="warm") if is_slow else None
        self._is_closed = False
        self._top_up()

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._is_closed:
            raise StopIteration
        pending = self._pending.popleft()
        try:
            results = [self._wait(chunk, pending.plan.step) for chunk in pending.chunks]
            self._top_up()
        except BaseException:
            self.close()
            raise
        keys = [key for chunk_keys, _ in results for key in chunk_keys]
        replaced = tuple(bad for _, chunk_replaced in results for bad in chunk_replaced)
        return self._finish(pending, keys, replaced)

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what waits and end the threads. May be called twice."""
        self._is_closed = True
        self._pending.clear()
        if self._fetchers is not None:
            # Not waited for: a read that hangs ends with its own deadline.
            self._fetchers.shutdown(wait=False, cancel_futures=True)
        if self._warmers is not None:
            self._warmers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=self._fetchers is None, cancel_futures=True)

    def _wait(self, chunk: Future[tuple[list[str], list[Replaced]]], step: int) -> tuple[list[str], list[Replaced]]:
        """What a chunk yields; a long wait says what it is for."""
        started, patience_s = time.monotonic(), STALL_S
        while True:
            try:
                return chunk.result(timeout=patience_s)
            except TimeoutError:
                if chunk.done():
                    return chunk.result()
                reads = storage.in_flight()
                oldest = f"{reads[0].what} ({time.monotonic() - reads[0].started:.0f} s)" if reads else "decoding"
                log.warning(
                    "batch %d is late by %.0f s: waiting for %s, %d read(s) under way",
                    step,
                    time.monotonic() - started,
                    oldest,
                    len(reads),
                )
                patience_s *= 2

    def _top_up(self) -> None:
        waiting = sum(pending.bytes for pending in self._pending)
        while len(self._pending) < self._pace.batches:
            if not self._plans:
                self._plans.extend(self._ahead or self._planner.plan())
                self._ahead = self._plan_ahead()
            size = self._bytes_of(self._plans[0])
            if self._pending and waiting + size > self._pace.bytes:
                return
            waiting += size
            self._pending.append(self._start(self._plans.popleft(), size))

    def _bytes_of(self, plan: _StepPlan) -> int:
        """About what a batch takes: its encoded images (on the mean of their shards) and its pixels."""
        encoded = 0.0
        for row in plan.rows:
            encoded += self._datasets[row.dataset].mean_bytes(row.shard_index)
        return int(encoded) + self._reader.batch_bytes(self._share.rows, plan.crop)

    def _plan_ahead(self) -> list[_StepPlan]:
        """The batches after the planned ones, whose shards are brought into the node's cache meanwhile.

        A failure shows when the shard is read.
        """
        if self._warmers is None:
            return []
        plans = self._planner.plan()
        coming = {(row.dataset, row.shard_index) for plan in plans for row in plan.rows}
        for number, dataset in enumerate(self._datasets):
            for shard_index in dataset.worth_caching(sorted(shard for owner, shard in coming if owner == number)):
                self._warmers.submit(dataset.warm, shard_index)
        return plans

    def _start(self, plan: _StepPlan, size: int) -> _Pending:
        images = self._reader.allocate(self._share.rows, plan.crop)
        count = len(plan.rows)
        chunk_rows = self._reader.chunk_rows(plan.crop, most=min(CHUNK_ROWS, -(-count // self._pace.threads)))
        chunks = []
        for start in range(0, count, chunk_rows):
            own = slice(start, min(start + chunk_rows, count))
            fetched: list[Future[Fetched]] | None = None
            if self._fetchers is not None:
                fetch, submit = self._reader.fetch, self._fetchers.submit
                fetched = [submit(fetch, row.dataset, row.shard_index, row.offset) for row in plan.rows[own]]
            chunks.append(
                self._decoders.submit(
                    self._reader.fill,
                    {name: tensor[own] for name, tensor in images.items()},
                    plan.rows[own],
                    Augments(*(column[own] for column in plan.augments)),
                    crop=plan.crop,
                    fetched=fetched,
                )
            )
        return _Pending(plan, images, chunks, size)

    def _finish(self, pending: _Pending, keys: list[str], replaced: tuple[Replaced, ...]) -> Batch:
        filler = self._share.rows - len(keys)
        if filler:
            for tensor in pending.images.values():
                tensor[len(keys) :] = tensor[0]
        images = {name: tensor.permute(0, 3, 1, 2) for name, tensor in pending.images.items()}
        positions = torch.from_numpy(pending.plan.positions)
        weight = torch.zeros(self._share.rows, dtype=torch.float32)
        weight[: len(keys)] = 1.0
        return Batch(
            input=images.get("input"),
            target=images["target"],
            mask=images.get("mask"),
            keys=(*keys, *([keys[0]] * filler)),
            positions=torch.cat([positions, positions[:1].expand(filler)]),
            weight=weight,
            step=pending.plan.step,
            replaced=replaced,
        )
