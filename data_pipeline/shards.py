"""Read and write one shard: a plain webdataset tar (the webdataset door)."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import AlteredSample, BadSample
from data_pipeline.index import Entry, Member, Tile, encode_index
from data_pipeline.records import FIELDS
from data_pipeline.retry import DEFAULT_RETRY, RetryPolicy
from data_pipeline.storage import read_range

MAX_GAP_BYTES = 1 << 16  # members further apart are read one by one
OWNER = "rddm"


@dataclass(frozen=True)
class WrittenShard:
    """What came of write_shard. index: the content of the .idx file; entries: what it lists; bytes, sha256: of the
    tar."""

    index: bytes
    entries: tuple[Entry, ...]
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

    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        with TarWriter(hashing, mtime=0, user=OWNER, group=OWNER, mode=0o644, encoder=False) as writer:
            for key, members in records:
                writer.write({"__key__": key, **members})
    entries = list_entries(path)
    return WrittenShard(encode_index(entries), entries, hashing.bytes, hashing.sha256.hexdigest())


def list_entries(path: Path) -> tuple[Entry, ...]:
    """The samples of a tar that write_shard wrote, from its headers and its KEY.json members."""
    members: dict[str, dict[str, Member]] = {}
    metas: dict[str, dict[str, object]] = {}
    with tarfile.open(path, mode="r:") as tar:
        for info in tar:
            key, _, suffix = info.name.partition(".")
            content = tar.extractfile(info)
            assert content is not None, "every member is a plain file"
            data = content.read()
            if suffix == "json":
                metas[key] = json.loads(data)
            else:
                field, _, extension = suffix.partition(".")
                member = Member(field, extension, info.offset_data, info.size, zlib.crc32(data))
                members.setdefault(key, {})[field] = member
    return tuple(_make_entry(metas[key], members[key]) for key in members)


def _make_entry(meta: Mapping[str, object], members: Mapping[str, Member]) -> Entry:
    key, name, width, height = meta["key"], meta["name"], meta["width"], meta["height"]
    assert isinstance(key, str) and isinstance(name, str) and isinstance(width, int) and isinstance(height, int)
    given = meta.get("tile")
    tile = Tile(**given) if isinstance(given, dict) else None
    return Entry(key, name, width, height, tuple(members[field] for field in FIELDS if field in members), tile)


def read_members(
    shard_uri: str,
    entry: Entry,
    fields: Collection[str] = FIELDS,
    *,
    retry: RetryPolicy = DEFAULT_RETRY,
) -> dict[str, tuple[str, bytes]]:
    """The images of a sample, in one read where they lie together.   -> field -> (extension, bytes)

    The CRC-32 of what came is compared with the index, so that damage is noticed wherever the shard lies. Raises
    BadSample for what is cut short, AlteredSample for what differs.
    """
    members = [member for member in entry.members if member.field in fields]
    first = min(member.start for member in members)
    length = max(member.start + member.size for member in members) - first
    if length <= sum(member.size for member in members) + MAX_GAP_BYTES:
        data = read_range(shard_uri, first, length, retry=retry)
        found = {m.field: (m.extension, data[m.start - first : m.start - first + m.size]) for m in members}
    else:
        found = {m.field: (m.extension, read_range(shard_uri, m.start, m.size, retry=retry)) for m in members}
    for member in members:
        extension, content = found[member.field]
        if len(content) != member.size:
            raise BadSample(
                f"{entry.key}.{member.field}.{extension}: {shard_uri} ends after {len(content)} of {member.size} bytes"
            )
        if zlib.crc32(content) != member.crc32:
            name = f"{entry.key}.{member.field}.{extension}"
            raise AlteredSample(f"{name}: its bytes in {shard_uri} are not those packed")
    return found
