"""The manifest of a packed dataset: what its shards are, and the fingerprint that names the whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline import storage
from data_pipeline.errors import DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardInfo:
    """A shard: file name, samples, bytes and sha256 of the tar, sha256 of the index beside it."""

    name: str
    count: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        return f"{self.name.removesuffix('.tar')}.idx"


@dataclass(frozen=True)
class Manifest:
    """A packed dataset. Widths and heights in pixels, over all images; source_digest: what it was packed from."""

    shards: tuple[ShardInfo, ...]
    num_samples: int
    has_mask: bool
    min_width: int
    max_width: int
    min_height: int
    max_height: int
    codec: str
    source_digest: str
    format_version: int = FORMAT_VERSION

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the shards: two datasets with one fingerprint hold the same samples in the same places."""
        rows = [[shard.name, shard.count, shard.bytes, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def counts(self) -> np.ndarray:
        """(num_shards,) int64 samples per shard."""
        return np.array([shard.count for shard in self.shards], dtype=np.int64)

    def to_json(self) -> bytes:
        return (json.dumps({**asdict(self), "fingerprint": self.fingerprint}, indent=1, sort_keys=True) + "\n").encode()

    def save(self, uri: str) -> None:
        """Write manifest.json into the dataset's folder, whole or not at all."""
        storage.write_bytes_atomic(storage.join(uri, MANIFEST_NAME), self.to_json())

    @staticmethod
    def load(uri: str) -> Manifest:
        """The manifest of the dataset in folder `uri`. Raises DataError when there is none or a damaged one."""
        source = storage.join(uri, MANIFEST_NAME)
        try:
            data = storage.read_bytes(source)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise DataError(
                f"{uri} is no packed dataset: it holds no {MANIFEST_NAME}; give the folder that `rddm pack --out` wrote"
            ) from error
        except OSError as error:
            raise DataError(f"{source} cannot be read: {error}") from error
        try:
            return _parse(json.loads(data), source=source)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{source} is damaged ({error}); fetch or pack the dataset again") from error


def _parse(document: Any, *, source: str) -> Manifest:
    if not isinstance(document, dict):
        raise ValueError("not an object")
    version = document["format_version"]
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise DataError(f"{source} has format version {version}; this program reads up to {FORMAT_VERSION}: update it")
    rows = document["shards"]
    shards = tuple(_construct(ShardInfo, row) for row in rows)
    manifest: Manifest = _construct(Manifest, {**document, "shards": shards})
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard.name) or shard.count < 1 or shard.bytes < 1:
            raise ValueError(f"bad shard {shard.name!r}")
        if not (SHA256.fullmatch(shard.sha256) and SHA256.fullmatch(shard.index_sha256)):
            raise ValueError(f"bad sha256 of {shard.name}")
    if not shards or sum(shard.count for shard in shards) != manifest.num_samples:
        raise ValueError("the shards' counts do not add up")
    sides = (manifest.min_width, manifest.min_height)
    if min(sides) < 1 or manifest.max_width < sides[0] or manifest.max_height < sides[1]:
        raise ValueError("bad image sizes")
    if document.get("fingerprint") != manifest.fingerprint:
        raise ValueError("its fingerprint does not fit its shards")
    return manifest


def _construct(kind: type, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from the JSON object, every value of the type its field says."""
    types = {"str": str, "int": int, "bool": bool, "tuple[ShardInfo, ...]": tuple}
    given = {}
    for field in fields(kind):
        value = values[field.name]
        if type(value) is not types[str(field.type)]:
            raise TypeError(f"bad value of {field.name}")
        given[field.name] = value
    return kind(**given)
