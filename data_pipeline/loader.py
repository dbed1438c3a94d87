"""The training loader: endless batches in the order of the run, decoded ahead by threads. Also the door to single
samples (read_sample, eval_index)."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from data_pipeline.batch import Batch
from data_pipeline.errors import BadSample, ConfigError, DataError
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order, rank_rows
from data_pipeline.reader import EvalEntry, eval_index, load_index, read_images, read_sample
from data_pipeline.records import Sample
from data_pipeline.shards import Entry
from data_pipeline.transforms import Augment, cut, draw_augments

__all__ = ["EvalEntry", "Sample", "TrainLoader", "build_train_loader", "eval_index", "read_sample"]

log = logging.getLogger(__name__)

# A bad sample at position p is replaced by the one at p + 7919, p + 2 * 7919, ...: a function of the position alone.
SUBSTITUTE_STRIDE = 7919
MAX_SUBSTITUTES = 16


def build_train_loader(
    uri: str,
    manifest: Manifest,
    *,
    seed: int,
    global_batch: int,
    lanes: int,
    rank: int,
    world_size: int,
    rows_per_rank: int,
    start_step: int,
    crop: int,
    flip: bool,
    threads: int = 2,
    prefetch_batches: int = 4,
) -> TrainLoader:
    """This rank's rows of global batches start_step, start_step + 1, ..., without end.

    Rows, crops and mirror images depend on (manifest, seed, lanes, crop, flip) and the position alone. rows_per_rank:
    rows of every batch; those beyond the rank's share repeat its first row with weight 0. crop: side of the random
    window in pixels, 0 for whole images, all of one size. At most prefetch_batches batches wait decoded or in work.
    """
    if not 0 <= rank < world_size <= global_batch:
        raise ConfigError(
            f"rank {rank} of {world_size} workers with train.global_batch={global_batch}: there must be a row for each"
        )
    if global_batch % lanes:
        raise ConfigError(f"data.lanes={lanes} does not divide train.global_batch={global_batch}; change one")
    if rows_per_rank < -(-(global_batch - rank) // world_size):
        raise ConfigError(f"{rows_per_rank} rows do not hold rank {rank}'s share of train.global_batch={global_batch}")
    if threads < 1 or prefetch_batches < 1:
        raise ConfigError(f"data.threads={threads} and data.prefetch_batches={prefetch_batches} must be at least 1")
    rows = _Rows(
        uri=uri,
        manifest=manifest,
        order=Order(manifest.counts, seed, lanes),
        shape=_image_shape(uri, manifest, crop),
        crop=crop,
    )

    def positions_of(step: int) -> np.ndarray:
        return rank_rows(step, global_batch=global_batch, rank=rank, world_size=world_size)

    return TrainLoader(
        rows,
        positions_of,
        augments_of=lambda positions: draw_augments(seed, positions, flip=flip),
        rows_per_rank=rows_per_rank,
        start_step=start_step,
        threads=threads,
        prefetch_batches=prefetch_batches,
    )


def _image_shape(uri: str, manifest: Manifest, crop: int) -> tuple[int, int]:
    """Height and width of the batches' images."""
    smallest = min(manifest.min_width, manifest.min_height)
    sizes = f"{manifest.min_width}x{manifest.min_height} to {manifest.max_width}x{manifest.max_height}"
    if crop < 0 or crop > smallest:
        raise ConfigError(f"data.crop={crop}: {uri} holds images of {sizes}; set data.crop to 0 or 1..{smallest}")
    if crop:
        return crop, crop
    if (manifest.min_width, manifest.min_height) != (manifest.max_width, manifest.max_height):
        raise ConfigError(f"data.crop=0 needs images of one size, {uri} holds {sizes}; set data.crop to 1..{smallest}")
    return manifest.min_height, manifest.min_width


class _Rows:
    """Decodes rows into the arrays of a batch; any number of threads may call it."""

    def __init__(self, *, uri: str, manifest: Manifest, order: Order, shape: tuple[int, int], crop: int) -> None:
        self._uri, self._manifest, self._crop = uri, manifest, crop
        self.order, self.shape, self.has_mask = order, shape, manifest.has_mask
        self._index: Callable[[int], tuple[Entry, ...]] = lru_cache(maxsize=2 * order.lanes + 8)(self._load_index)
        self._reported: set[str] = set()
        self._lock = threading.Lock()

    def decode_into(
        self, arrays: dict[str, np.ndarray], row: int, place: tuple[int, int, int], augment: Augment
    ) -> str:
        """Fill row `row` of the arrays with the sample at place (position, shard_index, offset).   -> its key"""
        position, shard_index, offset = place
        reason = ""
        for attempt in range(1 + MAX_SUBSTITUTES):
            if attempt:
                elsewhere = np.array([position + attempt * SUBSTITUTE_STRIDE])
                _, shards, offsets = self.order.locate(elsewhere)
                shard_index, offset = int(shards[0]), int(offsets[0])
            entry = self._index(shard_index)[offset]
            try:
                self._fill(arrays, row, entry, shard_index, augment)
                return entry.key
            except BadSample as error:
                reason = str(error)
                self._report(entry.key, reason)
        raise DataError(f"{self._uri}: {1 + MAX_SUBSTITUTES} samples in a row cannot be read, the last: {reason}")

    def _fill(self, arrays: dict[str, np.ndarray], row: int, entry: Entry, shard_index: int, augment: Augment) -> None:
        size = (entry.height, entry.width)
        if min(size) < self._crop or (not self._crop and size != self.shape):
            raise BadSample(
                f"{entry.key} is {entry.width}x{entry.height}, which the manifest's range of sizes excludes"
            )
        for field, image in read_images(self._uri, self._manifest.shards[shard_index], entry):
            arrays[field][row] = cut(image, augment, crop=self._crop).transpose(2, 0, 1)
            del image  # before the next one is decoded: see decode_images

    def _load_index(self, shard_index: int) -> tuple[Entry, ...]:
        return load_index(self._uri, self._manifest.shards[shard_index], has_mask=self._manifest.has_mask)

    def _report(self, key: str, reason: str) -> None:
        with self._lock:
            is_new = key not in self._reported
            self._reported.add(key)
        if is_new:
            log.warning("bad sample, another one takes its place: %s", reason)


@dataclass(frozen=True)
class _Pending:
    """A batch in work: the arrays that threads fill, and what each row's thread returns (its key)."""

    step: int
    positions: np.ndarray
    arrays: dict[str, np.ndarray]
    keys: list[Future[str]]


class TrainLoader:
    """Endless iterator over Batch. Decoding starts when it is made; close() ends its threads, as leaving `with` does.

    What goes wrong in a thread is raised where the batch is asked for.
    """

    def __init__(
        self,
        rows: _Rows,
        positions_of: Callable[[int], np.ndarray],
        *,
        augments_of: Callable[[np.ndarray], list[Augment]],
        rows_per_rank: int,
        start_step: int,
        threads: int,
        prefetch_batches: int,
    ) -> None:
        self._rows, self._positions_of, self._augments_of = rows, positions_of, augments_of
        self._rows_per_rank = rows_per_rank
        self._next_step = start_step
        self._prefetch_batches = prefetch_batches
        self._pending: deque[_Pending] = deque()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._is_closed = False
        self._top_up()

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._is_closed:
            raise StopIteration
        pending = self._pending.popleft()
        try:
            keys = [future.result() for future in pending.keys]
            self._top_up()
        except BaseException:
            self.close()
            raise
        return self._finish(pending, keys)

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what waits and end the threads. May be called twice."""
        self._is_closed = True
        self._pending.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _top_up(self) -> None:
        while len(self._pending) < self._prefetch_batches:
            self._pending.append(self._start(self._next_step))
            self._next_step += 1

    def _start(self, step: int) -> _Pending:
        positions = self._positions_of(step)
        augments = self._augments_of(positions)
        _, shards, offsets = self._rows.order.locate(positions)
        channels = {"input": 3, "target": 3, **({"mask": 1} if self._rows.has_mask else {})}
        arrays = {
            field: np.empty((self._rows_per_rank, count, *self._rows.shape), np.uint8)
            for field, count in channels.items()
        }
        places = zip(positions.tolist(), shards.tolist(), offsets.tolist(), strict=True)
        keys = [
            self._executor.submit(self._rows.decode_into, arrays, row, place, augment)
            for row, (place, augment) in enumerate(zip(places, augments, strict=True))
        ]
        return _Pending(step, positions, arrays, keys)

    def _finish(self, pending: _Pending, keys: list[str]) -> Batch:
        filler = self._rows_per_rank - len(keys)
        for array in pending.arrays.values():
            array[len(keys) :] = array[0]
        images = {field: torch.from_numpy(array) for field, array in pending.arrays.items()}
        positions = np.concatenate([pending.positions, np.repeat(pending.positions[:1], filler)])
        weight = torch.zeros(self._rows_per_rank, dtype=torch.float32)
        weight[: len(keys)] = 1.0
        return Batch(
            input=images["input"],
            target=images["target"],
            mask=images.get("mask"),
            keys=(*keys, *([keys[0]] * filler)),
            positions=torch.from_numpy(positions),
            weight=weight,
            step=pending.step,
        )
