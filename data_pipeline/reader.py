"""One sample by its place: shard and offset, whatever the order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipeline import storage
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.records import Sample, decode_images
from data_pipeline.shards import Entry, parse_index, read_members


class EvalEntry(NamedTuple):
    """A sample of a dataset and where it lies; width and height in pixels."""

    key: str
    shard_index: int
    offset: int
    width: int
    height: int


def load_index(uri: str, shard: ShardInfo, *, has_mask: bool) -> tuple[Entry, ...]:
    """The index of a shard, checked against manifest and shard. Raises DataError when they do not fit."""
    source, tar = storage.join(uri, shard.index_name), storage.join(uri, shard.name)
    try:
        data, shard_bytes = storage.read_bytes(source), storage.size(tar)
    except OSError as error:
        raise DataError(f"{uri} is incomplete: {shard.name} or its index cannot be read ({error})") from error
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DataError(f"{source} is not the index the manifest names (sha256); fetch or pack the dataset again")
    if shard_bytes != shard.bytes:
        raise DataError(f"{tar} has {shard_bytes} bytes instead of {shard.bytes}; fetch or pack the dataset again")
    return parse_index(data, source=source, count=shard.count, shard_bytes=shard.bytes, has_mask=has_mask)


def read_images(uri: str, shard: ShardInfo, entry: Entry) -> Iterator[tuple[str, np.ndarray]]:
    """(field, pixels) of a sample's images, (H, W, 3) or for masks (H, W, 1) uint8, decoded one after the other.

    Raises BadSample when its bytes are no images, DataError when the shard is gone.
    """
    tar = storage.join(uri, shard.name)
    try:
        members = read_members(tar, entry)
    except OSError as error:
        raise DataError(f"{tar} cannot be read: {error}") from error
    return decode_images(entry.key, members, width=entry.width, height=entry.height)


def read_sample(uri: str, manifest: Manifest, shard_index: int, offset: int) -> Sample:
    """The sample at a place, whole."""
    shard = manifest.shards[shard_index]
    entry = _recent_index(uri, shard, manifest.has_mask)[offset]
    images = dict(read_images(uri, shard, entry))
    return Sample(entry.key, entry.name, images["input"], images["target"], images.get("mask"))


def eval_index(uri: str, manifest: Manifest) -> list[EvalEntry]:
    """Every sample of a dataset, sorted by key. Reads indexes only, no image."""
    return sorted(
        EvalEntry(entry.key, shard_index, offset, entry.width, entry.height)
        for shard_index, shard in enumerate(manifest.shards)
        for offset, entry in enumerate(load_index(uri, shard, has_mask=manifest.has_mask))
    )


@lru_cache(maxsize=16)
def _recent_index(uri: str, shard: ShardInfo, has_mask: bool) -> tuple[Entry, ...]:
    return load_index(uri, shard, has_mask=has_mask)
