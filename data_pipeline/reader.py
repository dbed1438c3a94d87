"""A packed dataset, opened: its samples by place, whatever the order."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from data_pipeline import storage
from data_pipeline.cache import NodeCache
from data_pipeline.decode import Window
from data_pipeline.errors import BadSample, DataError, EnvironmentFault
from data_pipeline.index import Entry, ShardIndex, Tile, parse_index
from data_pipeline.manifest import Manifest
from data_pipeline.records import Sample, decode_member, make_key
from data_pipeline.retry import DEFAULT_RETRY, RetryPolicy
from data_pipeline.shards import read_members
from data_pipeline.tiles import assemble

log = logging.getLogger(__name__)

OPEN_INDEXES = 64
INDEX_LOCKS = 64
EVICTIONS = 5

Result = TypeVar("Result")


class Place(NamedTuple):
    """Where a sample lies: shard_index in the manifest, offset in the shard."""

    shard_index: int
    offset: int


class EvalEntry(NamedTuple):
    """A whole image of a dataset: its one place, or those of its tiles. width and height in pixels."""

    key: str
    width: int
    height: int
    places: tuple[Place, ...]


class Dataset:
    """A packed dataset at `uri`. Any number of threads may use it; nothing is read before it is asked for.

    cache: read whole shards through a node's cache; without it, samples come by range reads. retry: of remote reads.
    open_indexes: indexes kept in memory.
    """

    def __init__(
        self,
        uri: str,
        manifest: Manifest | None = None,
        *,
        cache: NodeCache | None = None,
        retry: RetryPolicy = DEFAULT_RETRY,
        open_indexes: int = OPEN_INDEXES,
    ) -> None:
        self.uri, self.manifest = uri, manifest or Manifest.load(uri, retry=retry)
        self._cache, self._retry = cache, retry
        self._index_locks = [threading.Lock() for _ in range(INDEX_LOCKS)]
        self._index = lru_cache(maxsize=open_indexes)(self._load_index)

    @property
    def is_slow(self) -> bool:
        """Whether a read may take a while: over a network, or by way of the cache."""
        return self._cache is not None or not storage.is_local(self.uri)

    def mean_bytes(self, shard_index: int) -> float:
        """Bytes of a sample, on the mean of its shard."""
        shards = self.manifest.shards
        return float(shards.column("bytes")[shard_index] / shards.column("count")[shard_index])

    def worth_caching(self, shard_indexes: Sequence[int]) -> Sequence[int]:
        """The shards, where they fit into the cache side by side with what else is in use; none without a cache."""
        sizes = self.manifest.shards.column("bytes")
        total = sum(sizes[shard_index] for shard_index in shard_indexes)
        return shard_indexes if self._cache is not None and total <= self._cache.limit_bytes // 4 else ()

    def warm(self, shard_index: int) -> None:
        """Bring a shard into the cache."""
        shard = self.manifest.shards[shard_index]
        self._fetch(shard.name, shard.sha256, shard.bytes)

    def index(self, shard_index: int) -> ShardIndex:
        """The index of a shard, checked against manifest and shard. Raises DataError when they do not fit."""
        # Threads that miss the same index at once would each fetch it.
        with self._index_locks[shard_index % len(self._index_locks)]:
            return self._index(shard_index)

    def read(self, shard_index: int, entry: Entry, fields: Collection[str]) -> dict[str, tuple[str, bytes]]:
        """Encoded images of a sample.   -> field -> (extension, bytes)

        Raises BadSample for a sample cut short or altered, DataError when the shard is gone or another one.
        """
        shard = self.manifest.shards[shard_index]
        tar = storage.join(self.uri, shard.name)
        try:
            if self._cache is None:
                return read_members(tar, entry, fields, retry=self._retry)
            try:
                return self._use_copy(
                    shard.name, shard.sha256, shard.bytes, lambda path: read_members(path, entry, fields)
                )
            except BadSample:
                # The copy was right when it came, so it was damaged since: another one may do.
                self._cache.discard(self._fetch(shard.name, shard.sha256, shard.bytes))
                return self._use_copy(
                    shard.name, shard.sha256, shard.bytes, lambda path: read_members(path, entry, fields)
                )
        except OSError as error:
            raise DataError(f"{tar} cannot be read: {error}") from error

    def sample(self, shard_index: int, offset: int) -> Sample:
        """The sample at a place, decoded whole; for a tile, the tile."""
        entry = self.index(shard_index)[offset]
        members = self.read(shard_index, entry, self.manifest.fields)
        shape = (entry.height, entry.width)
        images = {field: decode_member(entry.key, field, member, shape=shape) for field, member in members.items()}
        return Sample(entry.key, entry.name, images.get("input"), images["target"], images.get("mask"))

    def entries(self) -> Iterator[tuple[Place, Entry]]:
        """Every sample in the order of the shards. Reads all indexes, no image."""
        for shard_index in range(len(self.manifest.shards)):
            for offset, entry in enumerate(self._load_index(shard_index)):
                yield Place(shard_index, offset), entry

    def first(self, count: int) -> list[Sample]:
        """The first samples as they are stored, in the order of the shards and by key inside them, to be looked at.

        Those that cannot be read are passed over, with a warning. Reads no more shards than it needs.
        """
        samples: list[Sample] = []
        for shard_index in range(len(self.manifest.shards)):
            index = self.index(shard_index)
            for offset in sorted(range(len(index)), key=index.keys.__getitem__):
                if len(samples) == count:
                    return samples
                try:
                    samples.append(self.sample(shard_index, offset))
                except BadSample as error:
                    log.warning("passed over: %s", error)
        return samples

    def images(self) -> list[EvalEntry]:
        """Every whole image, sorted by key; the tiles of an image make one entry with the key the image would have.

        Reads all indexes, no image.
        """
        if self.manifest.tiling is None:
            return sorted(EvalEntry(entry.key, entry.width, entry.height, (place,)) for place, entry in self.entries())
        tiles: dict[str, list[tuple[Tile, Place]]] = {}
        for place, entry in self.entries():
            assert entry.tile is not None, "a tiled dataset has tiles"
            tiles.setdefault(entry.tile.image, []).append((entry.tile, place))
        return sorted(
            EvalEntry(
                make_key(name), parts[0][0].image_width, parts[0][0].image_height, tuple(sorted(p for _, p in parts))
            )
            for name, parts in tiles.items()
        )

    def whole(self, entry: EvalEntry) -> Sample:
        """A whole image, put together from its tiles where it was cut. Raises BadSample for what cannot be read."""
        if self.manifest.tiling is None:
            return self.sample(*entry.places[0])
        parts = [(self.index(place.shard_index)[place.offset].tile, self.sample(*place)) for place in entry.places]
        images: dict[str, np.ndarray] = {}
        for field in self.manifest.fields:
            images[field] = assemble(
                [(_window(tile, getattr(sample, field), entry), getattr(sample, field)) for tile, sample in parts],
                height=entry.height,
                width=entry.width,
            )
        name = parts[0][0].image if parts[0][0] is not None else parts[0][1].name
        return Sample(entry.key, name, images.get("input"), images["target"], images.get("mask"))

    def _fetch(self, name: str, sha256: str, size: int) -> Path:
        """The node's copy of a file of the dataset."""
        assert self._cache is not None
        uri, fingerprint = storage.join(self.uri, name), self.manifest.fingerprint
        return self._cache.fetch(uri, fingerprint=fingerprint, name=name, sha256=sha256, size=size)

    def _use_copy(self, name: str, sha256: str, size: int, use: Callable[[str], Result]) -> Result:
        """What `use` makes of the path of the node's copy of a file, which may be evicted before it is opened."""
        for _ in range(EVICTIONS):
            path = self._fetch(name, sha256, size)
            with contextlib.suppress(FileNotFoundError):
                return use(str(path))
        raise EnvironmentFault(
            f"{storage.join(self.uri, name)} was evicted from the cache {EVICTIONS} times before it could be read; "
            "raise data.cache_gb"
        )

    def _load_index(self, shard_index: int) -> ShardIndex:
        shard = self.manifest.shards[shard_index]
        source, tar = storage.join(self.uri, shard.index_name), storage.join(self.uri, shard.name)
        try:
            if self._cache is not None:
                data = self._use_copy(shard.index_name, shard.index_sha256, shard.index_bytes, storage.read_bytes)
                shard_bytes = shard.bytes  # the cache checks what it fetches
            else:
                data = storage.read_range(source, 0, shard.index_bytes, retry=self._retry)
                shard_bytes = storage.size(tar, retry=self._retry)
        except OSError as error:
            raise DataError(f"{self.uri} is incomplete: {shard.name} or its index cannot be read ({error})") from error
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            raise DataError(f"{source} is not the index the manifest names (sha256); fetch or pack the dataset again")
        if shard_bytes != shard.bytes:
            raise DataError(f"{tar} has {shard_bytes} bytes instead of {shard.bytes}; fetch or pack the dataset again")
        index = parse_index(
            data, source=source, count=shard.count, shard_bytes=shard.bytes, fields=self.manifest.fields
        )
        sides = (index.widths.min(), index.widths.max(), index.heights.min(), index.heights.max())
        if index.has_tiles != (self.manifest.tiling is not None) or sides != shard[-4:]:
            raise DataError(f"{source} does not fit the manifest (sizes, tiles); fetch or pack the dataset again")
        return index


def _window(tile: Tile | None, pixels: np.ndarray, entry: EvalEntry) -> Window:
    assert tile is not None, "a tiled dataset has tiles"
    window = Window(tile.top, tile.left, *pixels.shape[:2])
    if (tile.image_width, tile.image_height) != (entry.width, entry.height):
        raise BadSample(f"the tiles of {entry.key} say that the image has different sizes")
    return window
