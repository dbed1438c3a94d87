"""Bytes by location: local paths and every URL fsspec knows (the fsspec door)."""

from __future__ import annotations

import os
import shutil
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import ConfigError

MAX_OPEN_FILES = 64


def is_local(uri: str) -> bool:
    """Whether `uri` is a path of this machine (plain, or file://)."""
    return uri.startswith("file://") or "://" not in uri


def local_path(uri: str) -> Path:
    """The path of a local `uri`."""
    return Path(uri.removeprefix("file://"))


def join(uri: str, name: str) -> str:
    """The location of `name` inside folder `uri`."""
    return f"{uri.rstrip('/')}/{name}" if uri.strip("/") else f"{uri}{name}"


def exists(uri: str) -> bool:
    if is_local(uri):
        return local_path(uri).exists()
    filesystem, path = _remote(uri)
    return bool(filesystem.exists(path))


def size(uri: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    if is_local(uri):
        return local_path(uri).stat().st_size
    filesystem, path = _remote(uri)
    return int(filesystem.size(path))


def list_names(uri: str) -> list[str]:
    """Sorted names of what a folder holds; [] where there is no such folder."""
    if is_local(uri):
        folder = local_path(uri)
        return sorted(os.listdir(folder)) if folder.exists() else []
    filesystem, path = _remote(uri)
    if not filesystem.exists(path):
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(path, detail=False))


def read_bytes(uri: str) -> bytes:
    """A whole file. Raises FileNotFoundError."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    filesystem, path = _remote(uri)
    return bytes(filesystem.cat_file(path))


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from byte `start`; fewer where the file ends. Any number of threads may call it."""
    if is_local(uri):
        path = local_path(uri)
        stat = path.stat()
        # The key names this very file: another one written under the same name later is opened anew.
        file = _open(str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size)
        return os.pread(file.fileno(), length, start)
    filesystem, place = _remote(uri)
    return bytes(filesystem.cat_file(place, start=start, end=start + length))


def write_bytes_atomic(uri: str, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none."""
    if not is_local(uri):
        filesystem, place = _remote(uri)
        try:
            filesystem.pipe_file(place, data)
        except NotImplementedError as error:
            raise ConfigError(f"{uri} cannot be written; give a folder or an s3:// URL") from error
        return
    path = local_path(uri)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def upload(local: Path, uri: str) -> None:
    """Copy a file to `uri`."""
    if is_local(uri):
        shutil.copyfile(local, local_path(uri))
        return
    filesystem, path = _remote(uri)
    filesystem.put_file(str(local), path)


def remove(uri: str) -> None:
    """Delete a file; it may be gone already."""
    if is_local(uri):
        local_path(uri).unlink(missing_ok=True)
        return
    filesystem, path = _remote(uri)
    if filesystem.exists(path):
        filesystem.rm_file(path)


@lru_cache(maxsize=MAX_OPEN_FILES)
def _open(path: str, inode: int, mtime_ns: int, size: int) -> BinaryIO:
    # Not closed here: a file that falls out of the cache closes when the last thread that reads it lets go.
    return open(path, "rb", buffering=0)


def _remote(uri: str) -> tuple[Any, str]:
    """(filesystem, path on it) of a URL."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        raise ConfigError(f"{uri} cannot be opened: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{uri} is no known kind of location ({error}); give a folder or an s3:// URL") from error
    return filesystem, str(path)
