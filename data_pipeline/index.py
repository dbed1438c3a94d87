"""The index of one shard: where every image of its samples lies, in columns, so that ten thousand samples open at once.

An index may come from anywhere: everything in it is checked before it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.decode import MAX_PIXELS, MAX_SIDE
from data_pipeline.errors import DataError
from data_pipeline.records import FIELDS, KEY_PATTERN

INDEX_VERSION = 2
MAX_MEMBER_BYTES = 1 << 30
EXTENSION_PATTERN = re.compile(r"[A-Za-z0-9]{1,8}")
TILE_COLUMNS = ("image", "left", "top", "image_width", "image_height")


class Member(NamedTuple):
    """An image of a sample: which one, its extension, where it lies in the shard (bytes), CRC-32 of its bytes."""

    field: str
    extension: str
    start: int
    size: int
    crc32: int


class Tile(NamedTuple):
    """Where a tile lies in the image it was cut from; `image` is the name of that image, the rest pixels."""

    image: str
    left: int
    top: int
    image_width: int
    image_height: int


class Entry(NamedTuple):
    """A sample in a shard's index; width and height in pixels, as the images are read (upright)."""

    key: str
    name: str
    width: int
    height: int
    members: tuple[Member, ...]
    tile: Tile | None = None


@dataclass(frozen=True, eq=False)
class _Column:
    """The members of one field.   extensions: one per sample; starts, sizes, crc32: (count,) int64"""

    extensions: list[str]
    starts: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of a shard, by offset.   widths, heights: (count,) int64 pixels"""

    keys: list[str]
    names: list[str]
    widths: np.ndarray
    heights: np.ndarray
    _columns: dict[str, _Column]
    _tiles: dict[str, list[Any]] | None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def has_tiles(self) -> bool:
        return self._tiles is not None

    def __getitem__(self, offset: int) -> Entry:
        members = tuple(
            Member(
                field,
                column.extensions[offset],
                int(column.starts[offset]),
                int(column.sizes[offset]),
                int(column.crc32[offset]),
            )
            for field, column in self._columns.items()
        )
        tile = None if self._tiles is None else Tile(*(self._tiles[name][offset] for name in TILE_COLUMNS))
        return Entry(
            self.keys[offset], self.names[offset], int(self.widths[offset]), int(self.heights[offset]), members, tile
        )

    def __iter__(self) -> Iterator[Entry]:
        return (self[offset] for offset in range(len(self)))


def encode_index(entries: Sequence[Entry]) -> bytes:
    """The content of an .idx file.   entries: the shard's samples in the order of the tar, all with the same fields"""
    document: dict[str, Any] = {
        "format_version": INDEX_VERSION,
        "key": [entry.key for entry in entries],
        "name": [entry.name for entry in entries],
        "width": [entry.width for entry in entries],
        "height": [entry.height for entry in entries],
        "members": {},
    }
    for position, first in enumerate(entries[0].members):
        members = [entry.members[position] for entry in entries]
        assert all(member.field == first.field for member in members), "samples of a shard have the same fields"
        document["members"][first.field] = {
            "extension": [member.extension for member in members],
            "start": [member.start for member in members],
            "size": [member.size for member in members],
            "crc32": [member.crc32 for member in members],
        }
    if entries[0].tile is not None:
        tiles = [entry.tile for entry in entries]
        document["tile"] = {name: [getattr(tile, name) for tile in tiles] for name in TILE_COLUMNS}
    return json.dumps(document, separators=(",", ":")).encode()


def parse_index(data: bytes, *, source: str, count: int, shard_bytes: int, fields: Sequence[str]) -> ShardIndex:
    """The index in an .idx file, checked against the shard it belongs to.

    count, shard_bytes, fields: what the manifest says. Raises DataError naming `source` for what does not fit.
    """
    try:
        document = json.loads(data)
        version = document["format_version"]
        if version != INDEX_VERSION:
            raise DataError(_other_version(source, version))
        if len(document["key"]) != count:
            raise DataError(
                f"{source} lists {len(document['key'])} samples, the manifest {count}; fetch or pack the dataset again"
            )
        index = _parse(document, shard_bytes=shard_bytes)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{source} is damaged ({error}); fetch or pack the dataset again") from error
    if set(index._columns) != set(fields):
        raise DataError(f"{source} holds {sorted(index._columns)}, the manifest says {sorted(fields)}")
    return index


def _other_version(source: str, version: object) -> str:
    if isinstance(version, int) and version < INDEX_VERSION:
        return (
            f"{source} has the old format version {version}, this program reads {INDEX_VERSION}: pack the dataset again"
        )
    return f"{source} has format version {version}; this program reads {INDEX_VERSION}: update it"


def _parse(document: dict[str, Any], *, shard_bytes: int) -> ShardIndex:
    keys, names = _strings(document, "key"), _strings(document, "name")
    count = len(keys)
    bad = next((key for key in keys if not KEY_PATTERN.fullmatch(key)), None)
    if bad is not None or len(set(keys)) != count or len(names) != count:
        raise ValueError(f"bad or repeated key {bad!r}")
    widths, heights = (_integers(document, name, count, 1, MAX_SIDE) for name in ("width", "height"))
    columns = {}
    for field, values in document["members"].items():
        if field not in FIELDS:
            raise ValueError(f"unknown field {field!r}")
        starts = _integers(values, "start", count, 0, shard_bytes)
        sizes = _integers(values, "size", count, 1, min(shard_bytes, MAX_MEMBER_BYTES))
        if (starts + sizes > shard_bytes).any():
            raise ValueError(f"a place of {field} lies outside the shard")
        extensions = _strings(values, "extension")
        if len(extensions) != count or not all(EXTENSION_PATTERN.fullmatch(text) for text in set(extensions)):
            raise ValueError(f"bad extensions of {field}")
        columns[field] = _Column(extensions, starts, sizes, _integers(values, "crc32", count, 0, (1 << 32) - 1))
    tiles = None
    if "tile" in document:
        given = document["tile"]
        tiles = {"image": _strings(given, "image")} | {
            name: _integers(given, name, count, 0, MAX_SIDE).tolist() for name in TILE_COLUMNS[1:]
        }
        if len(tiles["image"]) != count:
            raise ValueError("bad tiles")
        left, top, image_width, image_height = (np.array(tiles[name]) for name in TILE_COLUMNS[1:])
        if ((left + widths > image_width) | (top + heights > image_height)).any():
            raise ValueError("a tile leaves its image")
        if (image_width * image_height > MAX_PIXELS).any():
            raise ValueError("an image is too large")
    return ShardIndex(keys, names, widths, heights, columns, tiles)


def _strings(values: dict[str, Any], name: str) -> list[str]:
    column = values[name]
    if not isinstance(column, list) or not all(isinstance(value, str) for value in column):
        raise ValueError(f"bad column {name}")
    "".join(column).encode()  # half of a surrogate pair is a ValueError
    return column


def _integers(values: dict[str, Any], name: str, count: int, low: int, high: int) -> np.ndarray:
    """(count,) int64 within low..high."""
    column = values[name]
    if not isinstance(column, list) or len(column) != count or not all(type(value) is int for value in column):
        raise ValueError(f"bad column {name}")
    array = np.array(column, dtype=np.int64)
    if count and not (low <= int(array.min()) and int(array.max()) <= high):
        raise ValueError(f"column {name} leaves {low}..{high}")
    return array
