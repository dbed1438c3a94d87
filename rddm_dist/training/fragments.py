"""The file of a rank in a checkpoint: pieces of parameters in the safetensors format, written from one buffer.

Tensors are named "<kind>/<parameter>@<start>": kind weight, ema, exp_avg..., and the first element of the flattened
parameter that is in it. All are float32. Files are read by byte ranges, from a folder or a URL.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline import storage
from data_pipeline.errors import ModelError
from data_pipeline.retry import DEFAULT_RETRY, RetryPolicy

ITEM_BYTES = 4
WRITE_BYTES = 8 << 20  # written and hashed at a time
READ_BYTES = 64 << 20  # of one request, at most
GAP_BYTES = 1 << 20  # between two ranges that are still read as one
HEADER_BYTES = 100 << 20  # of a file's header, at most
READERS = 4  # requests at once


class Key(NamedTuple):
    """What a tensor of a file is: elements of one kind of a flattened parameter, from `start` on."""

    kind: str
    parameter: str
    start: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.parameter}@{self.start}"


def parse_key(text: str) -> Key:
    kind, _, rest = text.partition("/")
    parameter, _, start = rest.rpartition("@")
    return Key(sys.intern(kind), sys.intern(parameter), int(start))  # one string each, however many files name it


class Snapshot:
    """A copy in host memory of tensors that go on changing, laid out as the file that it will be.

    The buffer is allocated once and holds one copy: `take` overwrites the last one. sources: (numel,) float32 each, on
    any device.
    """

    def __init__(self, sources: Sequence[tuple[Key, Tensor]]) -> None:
        self._sources = [tensor for _, tensor in sources]
        entries, offset = {}, 0
        for key, tensor in sources:
            end = offset + tensor.numel() * ITEM_BYTES
            entries[str(key)] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self._buffer = bytearray()
        self._views: list[Tensor] = []
        self.num_bytes = len(self._header) + offset

    def take(self) -> None:
        """Copy the sources as they are now. Returns when the copy is complete."""
        if not self._buffer:
            self._buffer = bytearray(self.num_bytes)
            self._buffer[: len(self._header)] = self._header
            whole = torch.frombuffer(self._buffer, dtype=torch.uint8)[len(self._header) :].view(torch.float32)
            self._views = list(whole.split([tensor.numel() for tensor in self._sources]))
        with torch.no_grad():
            for view, tensor in zip(self._views, self._sources, strict=True):
                view.copy_(tensor)

    def write(self, uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> str:
        """Write the copy and see it on the disk.   -> sha256 of what was meant to be written

        A local file that could not be finished is removed: on a full disk others wait for its room.
        """
        digest = hashlib.sha256()
        pieces = memoryview(self._buffer)
        if not storage.is_local(uri):
            digest.update(pieces)
            storage.write_bytes_atomic(uri, self._buffer, retry=retry)
            return digest.hexdigest()
        path = storage.local_path(uri)
        try:
            with open(path, "wb") as file:
                for first in range(0, len(pieces), WRITE_BYTES):
                    piece = pieces[first : first + WRITE_BYTES]
                    file.write(piece)
                    digest.update(piece)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return digest.hexdigest()


@dataclass(frozen=True)
class Request:
    """Fill `target` ((numel,) float32, any device) with elements of one kind of a flattened parameter from `start`."""

    target: Tensor
    kind: str
    parameter: str
    start: int


class _Span(NamedTuple):
    """Elements [start, start + numel) of a parameter, at a byte of a file."""

    start: int
    numel: int
    uri: str
    offset: int


class _Part(NamedTuple):
    """Bytes [low, high) of a file and where they go."""

    low: int
    high: int
    target: Tensor


class Entry(NamedTuple):
    """A tensor of a file: what it is, its elements and its first byte in the file."""

    key: Key
    numel: int
    offset: int


Index = Mapping[str, Sequence[Entry]]  # by file


def read_index(uris: Iterable[str], *, retry: RetryPolicy = DEFAULT_RETRY) -> Index:
    """What the headers of files say. Raises ModelError where one is none of ours."""
    return {uri: _read_header(uri, retry) for uri in uris}


class Fragments:
    """The rank files of one checkpoint as a whole: ranges of parameters, wherever they stand.

    Raises ModelError where two files hold the same elements.
    """

    def __init__(self, index: Index, *, retry: RetryPolicy = DEFAULT_RETRY) -> None:
        self._retry = retry
        self._spans: dict[tuple[str, str], list[_Span]] = {}
        for uri, entries in index.items():
            for (kind, parameter, start), numel, offset in entries:
                self._spans.setdefault((kind, parameter), []).append(_Span(start, numel, uri, offset))
        for (kind, parameter), spans in self._spans.items():
            spans.sort()
            for one, other in pairwise(spans):
                if one.start + one.numel > other.start:
                    raise ModelError(f"{other.uri} holds elements of {kind} {parameter} that {one.uri} holds as well")

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({kind for kind, _ in self._spans}))

    def fill(self, requests: Iterable[Request]) -> None:
        """Read what the requests name. Ranges that lie side by side are read as one, several at once.

        Raises ModelError where elements are missing.
        """
        parts: dict[str, list[_Part]] = {}
        for request in requests:
            self._locate(request, parts)
        chunks = [(uri, chunk) for uri, wanted in parts.items() for chunk in _chunks(wanted)]
        with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint-reader") as pool:
            for future in [pool.submit(self._read, uri, chunk) for uri, chunk in chunks]:
                future.result()

    def _locate(self, request: Request, parts: dict[str, list[_Part]]) -> None:
        start, end = request.start, request.start + request.target.numel()
        filled = 0
        for span in self._spans.get((request.kind, request.parameter), ()):
            low, high = max(start, span.start), min(end, span.start + span.numel)
            if low >= high:
                continue
            first = span.offset + (low - span.start) * ITEM_BYTES
            target = request.target[low - start : high - start]
            parts.setdefault(span.uri, []).append(_Part(first, first + (high - low) * ITEM_BYTES, target))
            filled += high - low
        if filled != request.target.numel():
            raise ModelError(
                f"{filled} of {request.target.numel()} elements of {request.kind} {request.parameter} are there"
            )

    def _read(self, uri: str, chunk: list[_Part]) -> None:
        first, last = chunk[0].low, max(part.high for part in chunk)
        data = bytearray(_read_range(uri, first, last - first, self._retry))
        if len(data) != last - first:
            raise ModelError(f"{uri} ended before byte {last}")
        for low, high, target in chunk:
            target.copy_(torch.frombuffer(data, dtype=torch.float32, offset=low - first, count=(high - low) // 4))


def _read_header(uri: str, retry: RetryPolicy) -> list[Entry]:
    try:
        (length,) = struct.unpack("<Q", _read_range(uri, 0, 8, retry))
        room = storage.size(uri, retry=retry) - 8 - length
        if room < 0 or length > HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, the file {8 + length + room}")
        header = json.loads(_read_range(uri, 8, length, retry))
        if not isinstance(header, dict):
            raise ValueError("its header names no tensors")
        found = [(*_parse_entry(name, entry), name) for name, entry in header.items() if name != "__metadata__"]
        end = 0
        for _, numel, low, name in sorted(found, key=lambda each: each[2]):
            if low < end or low + numel * ITEM_BYTES > room:
                raise ValueError(f"tensor {name} does not fit")
            end = low + numel * ITEM_BYTES
    except FileNotFoundError as error:
        raise ModelError(f"{uri} is missing") from error
    except (
        IsADirectoryError,
        NotADirectoryError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        struct.error,
    ) as error:
        raise ModelError(f"{uri} is no file of a checkpoint: {error}") from error
    return [Entry(key, numel, 8 + length + low) for key, numel, low, _ in found]


def _parse_entry(name: str, entry: dict[str, Any]) -> tuple[Key, int, int]:
    """What a header says of a tensor.   -> (what, elements, first byte behind the header)"""
    key = parse_key(name)
    low, high = entry["data_offsets"]
    [numel] = entry["shape"]
    if any(type(number) is not int or number < 0 for number in (low, high, numel, key.start)):
        raise ValueError(f"tensor {name} has a size or place that is no number of bytes or elements")
    if entry["dtype"] != "F32" or high - low != numel * ITEM_BYTES:
        raise ValueError(f"tensor {name} does not fit its shape")
    return key, numel, low


def _read_range(uri: str, start: int, length: int, retry: RetryPolicy) -> bytes:
    """`storage.read_range`, which keeps local files open: a deleted checkpoint would go on taking room."""
    if not storage.is_local(uri):
        return storage.read_range(uri, start, length, retry=retry)
    with open(storage.local_path(uri), "rb") as file:
        return os.pread(file.fileno(), length, start)


def _chunks(parts: list[_Part]) -> list[list[_Part]]:
    """Parts of one file in groups that are read by one request each."""
    parts.sort(key=lambda part: part.low)
    groups: list[list[_Part]] = []
    end = 0
    for part in parts:
        is_near = groups and part.low - end <= GAP_BYTES and part.high - groups[-1][0].low <= READ_BYTES
        if is_near:
            groups[-1].append(part)
            end = max(end, part.high)
        else:
            groups.append([part])
            end = part.high
    return groups
