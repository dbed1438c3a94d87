"""Read a tar that others wrote, front to back, by strict rules: what two programs could read differently is refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from data_pipeline import storage
from data_pipeline.errors import DataError

BLOCK = 512
CHUNK_BYTES = 4 << 20
MAX_HEADER_BYTES = 1 << 20  # a pax header or a long name
MAX_NAME_BYTES = 4096
REGULAR, SPECIAL, DIRECTORY = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"6"), b"5"
PAX, PAX_GLOBAL, GNU_NAME, GNU_LINK, GNU_SPARSE = b"x", b"g", b"L", b"K", b"S"
MAGIC_OF_COMPRESSION = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
OTHER_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))  # programs stop at bad ones
BASE_256 = (0x80, 0xFF)
PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=\n\0]+)=")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class TarMember(NamedTuple):
    """A member of a tar: is_file tells plain files from folders, links and devices; start, size: of its content."""

    name: str
    is_file: bool
    start: int
    size: int

    @property
    def shown(self) -> str:
        """The name for messages: ASCII, quoted, not endless."""
        return ascii(self.name if len(self.name) <= 100 else f"{self.name[:97]}...")


class ReadOnce:
    """The bytes of a file of `size` bytes at `uri`, once and in order, hashed on the way. advance(bytes) is called for
    each piece that came. Reading raises DataError for a file that is cut short."""

    def __init__(self, uri: str, size: int, *, advance: Callable[[int], None]) -> None:
        self._uri, self.size, self._advance = uri, size, advance
        self._chunk = memoryview(b"")
        self._fetched = 0
        self._sha256 = hashlib.sha256()

    @property
    def position(self) -> int:
        return self._fetched - len(self._chunk)

    @property
    def sha256(self) -> str:
        """Of the whole file, once it is read."""
        assert self.position == self.size, "the file is read to its end"
        return self._sha256.hexdigest()

    def fault(self, text: str) -> DataError:
        return DataError(f"{self._uri} cannot be used: {text}")

    def read(self, length: int) -> bytes:
        return b"".join(self.pieces(length))

    def pieces(self, length: int) -> Iterator[memoryview]:
        """The next `length` bytes, in pieces."""
        if length > self.size - self.position:
            raise self.fault(f"it is cut short: it ends after {self.size} bytes without the mark of its end")
        while length:
            if not self._chunk:
                self._fetch()
            piece, self._chunk = self._chunk[:length], self._chunk[length:]
            length -= len(piece)
            yield piece

    def skip_to(self, position: int) -> None:
        for _ in self.pieces(position - self.position):
            pass

    def _fetch(self) -> None:
        try:
            chunk = storage.read_range(self._uri, self._fetched, min(CHUNK_BYTES, self.size - self._fetched))
        except OSError as error:
            raise DataError(f"{self._uri} cannot be read: {error}") from error
        if not chunk:
            raise self.fault("it became shorter while it was read; run again when nobody writes it")
        self._sha256.update(chunk)
        self._fetched += len(chunk)
        self._chunk = memoryview(chunk)
        self._advance(len(chunk))


def read_tar(stream: ReadOnce) -> Iterator[TarMember]:
    """The members of a plain tar; what is left of a member's content is skipped when the next one is asked for.

    Raises DataError for compressed, damaged, cut or concatenated tars, sparse members, absolute names, names with ..
    or control characters, and headers that two programs could read differently.
    """
    extras: dict[bytes, bytes] = {}  # what the extension headers before a member say of it
    block = stream.read(min(BLOCK, stream.size))
    if block.startswith(MAGIC_OF_COMPRESSION):
        raise stream.fault("it is compressed, which cannot be read from the middle; unpack it (gunzip) first")
    while block.count(0) < BLOCK:
        kind, name, size = _parse_header(block, extras, stream)
        if kind in (PAX, PAX_GLOBAL, GNU_NAME, GNU_LINK):
            given = _read_extension(kind, size, stream)
            if kind != PAX_GLOBAL:
                if given.keys() & extras.keys():
                    raise stream.fault(f"a member before byte {stream.position} has two extension headers")
                extras |= given
        else:
            start = stream.position
            end = start + -(-size // BLOCK) * BLOCK
            if end > stream.size:
                raise stream.fault(f"it is cut short: a member ends at byte {end} of {stream.size}")
            yield TarMember(_check_name(name, stream), kind in REGULAR and not name.endswith(b"/"), start, size)
            stream.skip_to(end)
            extras = {}
        block = stream.read(BLOCK)
    if extras:
        raise stream.fault("it is cut short: the member after an extension header is missing")
    for piece in stream.pieces(stream.size - stream.position):
        if piece.tobytes().count(0) < len(piece):
            raise stream.fault(
                "data follows after the end of the archive (tars put together?), which others do not see"
            )


def _parse_header(block: bytes, extras: Mapping[bytes, bytes], stream: ReadOnce) -> tuple[bytes, bytes, int]:
    """(kind, name, size) of a member, extras of pax and GNU headers taken in."""
    place = f"the header that ends at byte {stream.position}"
    plain = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    signed = plain - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
    if len(block) < BLOCK or _number(block[148:156]) not in (plain, signed):
        raise stream.fault(f"it is no tar, or damaged: {place} has a wrong checksum")
    if not all(block[start] in BASE_256 or _number(block[start:end]) is not None for start, end in OTHER_NUMBERS):
        raise stream.fault(f"{place} has a mode, owner, time or device that is no number")
    kind = block[156:157]
    size = _number(block[124:136])
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0]
    if prefix and block[257:265] != b"ustar\x0000":
        raise stream.fault(f"{place} has a prefix to its name, which its format does not know")
    if kind in (PAX, PAX_GLOBAL, GNU_NAME, GNU_LINK):
        extras = {}
    if b"size" in extras:
        size = int(extras[b"size"]) if re.fullmatch(rb"\d{1,19}", extras[b"size"]) else None
    if size is None:
        raise stream.fault(f"{place} has no proper size")
    if kind == GNU_SPARSE or any(key.startswith(b"GNU.sparse") for key in extras):
        raise stream.fault(f"{place} is of a sparse member; write the tar without --sparse")
    if kind not in (*REGULAR, *SPECIAL, DIRECTORY, PAX, PAX_GLOBAL, GNU_NAME, GNU_LINK):
        raise stream.fault(f"{place} is of unknown kind {kind!r}")
    if size and kind in (*SPECIAL, DIRECTORY):
        raise stream.fault(f"{place} is of a folder, link or device with content")
    return kind, extras.get(b"path", b"/".join((prefix, name)) if prefix else name), size


def _number(field: bytes) -> int | None:
    """A number in a tar header, octal or base 256; None for anything else, and below 0."""
    if field[0] == BASE_256[0]:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0")[0].strip(b" ")
    return int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else None


def _read_extension(kind: bytes, size: int, stream: ReadOnce) -> dict[bytes, bytes]:
    """What a pax or GNU header says of the next member, under the pax names."""
    if size > MAX_HEADER_BYTES:
        raise stream.fault(
            f"the extension header at byte {stream.position} has {size} bytes; {MAX_HEADER_BYTES} allowed"
        )
    data = stream.read(-(-size // BLOCK) * BLOCK)[:size]
    if kind in (GNU_NAME, GNU_LINK):
        return {b"path" if kind == GNU_NAME else b"linkpath": data.split(b"\0")[0]}
    records: dict[bytes, bytes] = {}
    at = 0
    while at < size:
        match = PAX_RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= size or data[end - 1] != ord("\n") or match[2] in records:
            raise stream.fault(f"the pax header that ends at byte {stream.position} is damaged")
        records[match[2]] = data[match.end() : end - 1]
        at = end
    if kind == PAX_GLOBAL and (
        records.keys() & {b"path", b"size"} or any(k.startswith(b"GNU.sparse") for k in records)
    ):
        raise stream.fault("a global pax header gives one path, size or sparseness to all members")
    return records


def _check_name(raw: bytes, stream: ReadOnce) -> str:
    name = raw.decode("utf-8", "backslashreplace")
    shown = ascii(name[:100])
    if name.startswith("/") or ".." in name.split("/"):
        raise stream.fault(f"the name {shown} leads out of the archive")
    if CONTROL.search(name) or len(raw) > MAX_NAME_BYTES:
        raise stream.fault(f"the name {shown} holds control characters, or is longer than {MAX_NAME_BYTES} bytes")
    while name.startswith("./"):
        name = name[2:]
    return name
