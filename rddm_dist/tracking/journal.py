"""The journal of a run: one JSON object per line, appended and flushed; the truth that trackers are told from."""

from __future__ import annotations

import errno
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 16
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


class Journal:
    """Appends records to a file. A line that an earlier process left unfinished is cut off on opening."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            complete = complete_bytes(path)
            if complete < file.tell():
                file.truncate(complete)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._waiting = b""  # what a full disk has not taken yet
        self._is_told = False
        self._lock = threading.Lock()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and flush it; safe from any thread."""
        line = json.dumps(json_safe(record), separators=(",", ":"), allow_nan=False) + "\n"
        with self._lock:
            self._waiting += line.encode()
            self._write()

    def close(self) -> None:
        """Write what is still waiting, if there is room now, and close the file."""
        with self._lock:
            self._write()
            self._file.close()

    def _write(self) -> None:
        """Write what is waiting; a disk that is full gets it with a later record."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            if not self._is_told:
                log.warning("%s takes no more (%s); records wait in memory", self._file.name, error.strerror)
            self._is_told = True
        else:
            self._is_told = False


def json_safe(value: Any) -> Any:
    """The value with every number that JSON lacks as "nan", "inf" or "-inf", which float() reads back."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """All complete records; [] for a journal that is not there yet. An unfinished last line is left out."""
    path = Path(path)
    return [record for record, _ in read_from(path, 0)] if path.exists() else []


def read_from(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Complete records from byte `offset` on, each with the offset behind it."""
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset


def follow_journal(path: str | Path) -> Callable[[], Iterator[dict[str, Any]]]:
    """Follow a journal from its present end: each call of the result yields what was appended since the call before."""
    path = Path(path)
    offset = complete_bytes(path) if path.exists() else 0

    def records() -> Iterator[dict[str, Any]]:
        nonlocal offset
        if path.exists():
            for record, behind in read_from(path, offset):
                offset = behind
                yield record

    return records


def complete_bytes(path: Path) -> int:
    """Length of the file up to and with its last line end."""
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        while end > 0:
            start = max(0, end - CHUNK)
            found = _read_at(file, start, end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _read_at(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)
