"""The manifest of a packed dataset: what its shards are, and the fingerprint that names the whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from data_pipeline import storage
from data_pipeline.decode import MAX_SIDE
from data_pipeline.errors import DataError
from data_pipeline.records import FIELDS
from data_pipeline.retry import DEFAULT_RETRY, RetryPolicy

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")
SHA256 = re.compile(r"[0-9a-f]{64}")
FIELD_SETS = (FIELDS[:2], FIELDS, ("target",))  # pairs, pairs with masks, clean images alone


class ShardInfo(NamedTuple):
    """A shard: file name, samples, bytes and sha256 of the tar and of the index beside it, sizes in pixels."""

    name: str
    count: int  # type: ignore[assignment]  # hides tuple.count
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str
    min_width: int
    max_width: int
    min_height: int
    max_height: int

    @property
    def index_name(self) -> str:
        return f"{self.name.removesuffix('.tar')}.idx"


class Tiling(NamedTuple):
    """How large images were cut: side of a tile and least overlap of neighbours, in pixels."""

    size: int
    overlap: int


class ShardTable(Sequence[ShardInfo]):
    """Shards in columns: a hundred thousand of them load in a moment, a row is made when it is asked for."""

    def __init__(self, columns: Mapping[str, list[Any]]) -> None:
        self._columns = tuple(columns[name] for name in ShardInfo._fields)

    @classmethod
    def of(cls, shards: Sequence[ShardInfo]) -> ShardTable:
        return cls({name: [getattr(shard, name) for shard in shards] for name in ShardInfo._fields})

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return ShardInfo(*(column[index] for column in self._columns))

    def __iter__(self) -> Iterator[ShardInfo]:
        return (ShardInfo(*row) for row in zip(*self._columns, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and self._columns == other._columns

    __hash__ = None  # type: ignore[assignment]  # a table of lists

    def column(self, name: str) -> list[Any]:
        return self._columns[ShardInfo._fields.index(name)]

    def columns(self) -> dict[str, list[Any]]:
        return dict(zip(ShardInfo._fields, self._columns, strict=True))


@dataclass(frozen=True)
class Manifest:
    """A packed dataset.

    fields: what a sample holds, ("input", "target"), the same with "mask", or ("target",) for clean images alone;
    codec: how images are stored, foreign for tars that were only indexed; source_digest: what it was made from and how;
    tiling: how large images were cut, None when they were not.
    """

    shards: ShardTable
    fields: tuple[str, ...]
    codec: str
    source_digest: str
    tiling: Tiling | None = None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the shards and their indexes: two datasets with one fingerprint hold the same samples in the same
        places."""
        names = ("name", "count", "bytes", "sha256", "index_bytes", "index_sha256")
        return hashlib.sha256(json.dumps([self.shards.column(name) for name in names]).encode()).hexdigest()

    @cached_property
    def counts(self) -> np.ndarray:
        """(num_shards,) int64 samples per shard."""
        return np.array(self.shards.column("count"), dtype=np.int64)

    @cached_property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @property
    def has_input(self) -> bool:
        return "input" in self.fields

    @property
    def has_mask(self) -> bool:
        return "mask" in self.fields

    @cached_property
    def min_width(self) -> int:
        return int(min(self.shards.column("min_width")))

    @cached_property
    def max_width(self) -> int:
        return int(max(self.shards.column("max_width")))

    @cached_property
    def min_height(self) -> int:
        return int(min(self.shards.column("min_height")))

    @cached_property
    def max_height(self) -> int:
        return int(max(self.shards.column("max_height")))

    def describe_sizes(self) -> str:
        """Smallest to largest width x height, for messages."""
        return f"{self.min_width}x{self.min_height} to {self.max_width}x{self.max_height}"

    def to_json(self) -> bytes:
        document = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "num_samples": self.num_samples,
            "fields": list(self.fields),
            "codec": self.codec,
            "source_digest": self.source_digest,
            "tiling": None if self.tiling is None else self.tiling._asdict(),
            "shards": self.shards.columns(),
        }
        # One column a line: readable, and no slower to load than a single line.
        head = json.dumps({name: value for name, value in document.items() if name != "shards"})
        columns = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in self.shards.columns().items())
        return f'{head[:-1]},\n"shards": {{\n{columns}\n}}}}\n'.encode()

    def save(self, uri: str) -> None:
        """Write manifest.json into the dataset's folder, whole or not at all."""
        storage.write_bytes_atomic(storage.join(uri, MANIFEST_NAME), self.to_json())

    @staticmethod
    def load(uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> Manifest:
        """The manifest of the dataset in folder `uri`. Raises DataError when there is none or a damaged one."""
        source = storage.join(uri, MANIFEST_NAME)
        try:
            data = storage.read_bytes(source, retry=retry)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise DataError(
                f"{uri} is no packed dataset: it holds no {MANIFEST_NAME}; give the folder that `rddm pack --out` or "
                "`rddm index` wrote"
            ) from error
        except OSError as error:
            raise DataError(f"{source} cannot be read: {error}") from error
        try:
            return _parse(json.loads(data), source=source)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{source} is damaged ({error}); fetch or pack the dataset again") from error


def _parse(document: Any, *, source: str) -> Manifest:
    if not isinstance(document, dict):
        raise ValueError("not an object")
    version = document["format_version"]
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise DataError(f"{source} has format version {version}; this program reads {FORMAT_VERSION}: update it")
    if version < FORMAT_VERSION:
        raise DataError(
            f"{source} has the old format version {version}, this program reads {FORMAT_VERSION}: pack the dataset "
            "again"
        )
    columns = document["shards"]
    _check_columns(columns)
    tiling = document["tiling"]
    manifest = Manifest(
        shards=ShardTable(columns),
        fields=tuple(document["fields"]),
        codec=_text(document, "codec"),
        source_digest=_text(document, "source_digest"),
        tiling=None if tiling is None else Tiling(**tiling),
    )
    if manifest.fields not in FIELD_SETS:
        raise ValueError(f"unknown fields {document['fields']}")
    if manifest.tiling is not None and not all(type(value) is int for value in manifest.tiling):
        raise TypeError("bad value of tiling")
    if document["num_samples"] != manifest.num_samples:
        raise ValueError("the shards' counts do not add up")
    if document["fingerprint"] != manifest.fingerprint:
        raise ValueError("its fingerprint does not fit its shards")
    return manifest


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document[name]
    if not isinstance(value, str):
        raise TypeError(f"bad value of {name}")
    return value


def _check_columns(columns: Any) -> None:
    """Raise ValueError or TypeError for columns of shards that cannot be right."""
    if not isinstance(columns, dict) or set(columns) != set(ShardInfo._fields):
        raise ValueError("bad columns of shards")
    if not all(isinstance(column, list) for column in columns.values()):
        raise TypeError("a column of shards is no list")
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError("columns of shards of unequal length, or none")
    for name in ("name", "sha256", "index_sha256"):
        pattern = SHARD_NAME if name == "name" else SHA256
        for value in columns[name]:
            if not pattern.fullmatch(value):
                raise ValueError(f"bad {name} {value!r}")
    if len(set(columns["name"])) != len(columns["name"]):
        raise ValueError("two shards of one name")
    for name in set(ShardInfo._fields) - {"name", "sha256", "index_sha256"}:
        high = MAX_SIDE if name.startswith(("min_", "max_")) else 2**53
        if not all(type(value) is int and 1 <= value <= high for value in columns[name]):
            raise ValueError(f"bad value of {name}")
    if sum(columns["count"]) > 2**53:
        raise ValueError("more samples than can be counted")
    for side in ("width", "height"):
        if any(low > high for low, high in zip(columns[f"min_{side}"], columns[f"max_{side}"], strict=True)):
            raise ValueError(f"bad {side}s")
