"""Read and write one shard: a plain webdataset tar, and beside it an index of where its members lie (the webdataset
door)."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.errors import BadSample, DataError
from data_pipeline.records import FIELDS, KEY_PATTERN
from data_pipeline.storage import read_range

INDEX_VERSION = 1
MAX_RECORD_BYTES = 1 << 30
OWNER = "rddm"


class Member(NamedTuple):
    """An image of a sample: which one, its extension and where it lies in the shard."""

    field: str
    extension: str
    start: int
    size: int


class Entry(NamedTuple):
    """A sample in a shard's index; width and height in pixels."""

    key: str
    name: str
    width: int
    height: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class WrittenShard:
    """What came of write_shard. index: the content of the .idx file; bytes, sha256: of the tar."""

    index: bytes
    count: int
    bytes: int
    sha256: str


class _HashingFile:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self._file.write(data)


def write_shard(path: Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> WrittenShard:
    """Write (key, {"input.png": bytes, ..., "json": bytes}) records as a tar whose bytes depend on them alone."""
    from webdataset import TarWriter

    count = 0
    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        with TarWriter(hashing, mtime=0, user=OWNER, group=OWNER, mode=0o644, encoder=False) as writer:
            for key, members in records:
                writer.write({"__key__": key, **members})
                count += 1
    return WrittenShard(build_index(path), count, hashing.bytes, hashing.sha256.hexdigest())


def build_index(path: Path) -> bytes:
    """The index of a shard, from the tar's own headers and its KEY.json members."""
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(path, mode="r:") as tar:
        for info in tar:
            key, _, suffix = info.name.partition(".")
            sample = samples.setdefault(key, {"members": {}})
            if suffix == "json":
                content = tar.extractfile(info)
                assert content is not None, "KEY.json is a plain file"
                sample.update(json.loads(content.read()))
            else:
                sample["members"][suffix] = (info.offset_data, info.size)
    document = {"format_version": INDEX_VERSION, "samples": list(samples.values())}
    return json.dumps(document, separators=(",", ":")).encode()


def parse_index(data: bytes, *, source: str, count: int, shard_bytes: int, has_mask: bool) -> tuple[Entry, ...]:
    """Entries of an index, checked against the shard.   Raises DataError naming `source` for what does not fit."""
    try:
        document = json.loads(data)
        version = document["format_version"]
        if version > INDEX_VERSION:
            raise DataError(f"{source} has format version {version}; this program reads {INDEX_VERSION}: update it")
        entries = tuple(_parse_entry(row, shard_bytes=shard_bytes) for row in document["samples"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source} is damaged ({error}); fetch or pack the dataset again") from error
    if len(entries) != count:
        raise DataError(f"{source} lists {len(entries)} samples, the manifest {count}; fetch or pack the dataset again")
    wanted = set(FIELDS if has_mask else FIELDS[:2])
    for entry in entries:
        found = {member.field for member in entry.members}
        if found != wanted:
            raise DataError(f"{source}: sample {entry.key} has {sorted(found)}, the dataset needs {sorted(wanted)}")
    return entries


def _parse_entry(row: dict[str, Any], *, shard_bytes: int) -> Entry:
    key, name, width, height, members = row["key"], row["name"], row["width"], row["height"], row["members"]
    if not (isinstance(key, str) and KEY_PATTERN.fullmatch(key) and isinstance(name, str)):
        raise ValueError(f"bad key {key!r}")
    if not (isinstance(width, int) and isinstance(height, int) and isinstance(members, dict)):
        raise ValueError(f"bad entry {key!r}")
    parsed = []
    for suffix, (start, size) in members.items():
        field, _, extension = suffix.partition(".")
        if not (isinstance(start, int) and isinstance(size, int) and start >= 0 and 0 < size <= shard_bytes - start):
            raise ValueError(f"bad place of {key}.{suffix}")
        parsed.append(Member(field, extension, start, size))
    return Entry(key, name, width, height, tuple(parsed))


def read_members(shard_uri: str, entry: Entry) -> dict[str, tuple[str, bytes]]:
    """The images of a sample in one read.   -> field -> (extension, bytes);   raises BadSample when cut short"""
    first = min(member.start for member in entry.members)
    length = max(member.start + member.size for member in entry.members) - first
    if length > MAX_RECORD_BYTES:
        raise BadSample(f"{entry.key} spans {length} bytes; at most {MAX_RECORD_BYTES} are allowed")
    data = read_range(shard_uri, first, length)
    if len(data) != length:
        raise BadSample(f"{entry.key}: {shard_uri} ends after {len(data)} of {length} bytes")
    return {
        member.field: (member.extension, data[member.start - first : member.start - first + member.size])
        for member in entry.members
    }
