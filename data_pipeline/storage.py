"""Bytes by location: local paths and every URL fsspec knows (the fsspec door)."""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from data_pipeline.errors import ConfigError, DataError, EnvironmentFault, UserError
from data_pipeline.retry import DEFAULT_RETRY, READ_ADVICE, RetryPolicy, call, explained, http_status, one_line

T = TypeVar("T")

MAX_OPEN_FILES = 64
CHUNK_BYTES = 8 << 20
MAX_CONNECTIONS = 64  # of one process to S3
SLOW_READ_S = 1.0  # of a range of a local file, which takes microseconds where nothing is wrong
WRITE_ADVICE = "check the network and the server, then run the command again"
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
READ_ONLY = ("http", "https")
PRECONDITION_FAILED = 412
RANGE_NOT_SATISFIABLE = 416
# A filesystem takes these from the environment when it is made; a change of them makes a new one.
SETTINGS = ("AWS_", "GOOGLE_", "STORAGE_EMULATOR_HOST", "FSSPEC_")


@dataclass(frozen=True)
class InFlight:
    """Something this process waits for: what it is, and since when (seconds of time.monotonic())."""

    what: str
    started: float


class _OpenFile(NamedTuple):
    identity: tuple[int, int, int]
    file: BinaryIO


# State of this process: local files kept open for read_range, and what its threads wait for: by block, and by thread
# the local range it reads (uri, start, length, since when), which costs less. Single dict operations are atomic, so
# that none needs a lock (which a fork could copy locked).
_open_files: dict[str, _OpenFile] = {}
_waiting: dict[object, InFlight] = {}
_local_reads: dict[int, tuple[str, int, int, float]] = {}


def _forget_threads() -> None:
    _waiting.clear()
    _local_reads.clear()


# A forked child has none of its parent's other threads.
os.register_at_fork(after_in_child=_forget_threads)


def is_local(uri: str) -> bool:
    """Whether `uri` is a path of this machine (plain, or file://)."""
    return uri.startswith("file://") or "://" not in uri


def local_path(uri: str) -> Path:
    """The path of a local `uri`."""
    return Path(uri.removeprefix("file://"))


def join(uri: str, name: str) -> str:
    """The location of `name` inside folder `uri`."""
    return f"{uri.rstrip('/')}/{name}" if uri.strip("/") else f"{uri}{name}"


def in_flight() -> tuple[InFlight, ...]:
    """What this process waits for now, the oldest first: remote operations, cache downloads, reads of local files.

    Ranges of local files are named once they took SLOW_READ_S.
    """
    entries = list(_waiting.values())
    before = time.monotonic() - SLOW_READ_S
    for uri, start, length, started in list(_local_reads.values()):
        if started <= before:
            entries.append(InFlight(_range_name(uri, start, length), started))
    return tuple(sorted(entries, key=lambda entry: entry.started))


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Name in `in_flight()` what the block waits for."""
    key = object()
    _waiting[key] = InFlight(what, time.monotonic())
    try:
        yield
    finally:
        _waiting.pop(key, None)  # gone in a child forked inside the block


def shown(uri: str) -> str:
    """The URL without its query, which may hold a signature."""
    return uri.partition("?")[0]


def exists(uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> bool:
    """Whether there is a file or folder. A missing bucket is a ConfigError."""
    if is_local(uri):
        return local_path(uri).exists()
    what = f"the look-up of {shown(uri)}"
    try:
        _persist(lambda limit_s: _once(uri, "info", limit_s), uri, what=what, retry=retry)
    except FileNotFoundError:
        return False
    return True


def size(uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    what = f"the size of {shown(uri)}"
    if is_local(uri):
        with waiting(what):
            return local_path(uri).stat().st_size
    return _persist(lambda limit_s: _size_once(uri, limit_s), uri, what=what, retry=retry)


def list_names(uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> list[str]:
    """Sorted names of what a folder holds; [] where there is no such folder. A missing bucket is a ConfigError."""
    if is_local(uri):
        folder = local_path(uri)
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []  # not asked again: another worker may be making it now
        except NotADirectoryError:
            if folder.exists():
                raise
            return []
    _, path = _remote(uri)
    what = f"the names in {shown(uri)}"
    try:
        found = _persist(lambda limit_s: _once(uri, "ls", limit_s, detail=False), uri, what=what, retry=retry)
    except FileNotFoundError:
        return []
    # A folder made by hand in an object store lists itself.
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found if entry.rstrip("/") != path.rstrip("/"))


def read_bytes(uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> bytes:
    """A whole file. Raises FileNotFoundError."""
    if is_local(uri):
        with waiting(f"the bytes of {uri}"):
            return local_path(uri).read_bytes()
    return b"".join(read_chunks(uri, retry=retry))


def read_range(uri: str, start: int, length: int, *, retry: RetryPolicy = DEFAULT_RETRY) -> bytes:
    """`length` bytes from byte `start`; fewer where the file ends. Any number of threads may call it.

    A remote answer that is cut short is asked for again. Raises FileNotFoundError; EnvironmentFault past the deadline.
    """
    if is_local(uri):
        thread = threading.get_ident()
        _local_reads[thread] = (uri, start, length, time.monotonic())
        try:
            file = _open(uri.removeprefix("file://"))  # held: another thread may drop it from the table meanwhile
            return os.pread(file.fileno(), length, start)
        finally:
            del _local_reads[thread]
    if length == 0:
        return b""
    return _persist(
        lambda limit_s: _range_once(uri, start, length, limit_s),
        uri,
        what=_range_name(uri, start, length),
        retry=retry.for_bytes(length),
    )


def read_chunks(uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> Iterator[bytes]:
    """A whole file in pieces of CHUNK_BYTES, each retried by itself. Raises FileNotFoundError."""
    if is_local(uri):
        with open(local_path(uri), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        return
    total = size(uri, retry=retry)
    for start in range(0, total, CHUNK_BYTES):
        length = min(CHUNK_BYTES, total - start)
        chunk = read_range(uri, start, length, retry=retry)
        if len(chunk) != length:
            raise DataError(f"{shown(uri)} became shorter while it was read; run again when nobody writes it")
        yield chunk


def download(
    uri: str,
    path: Path,
    *,
    retry: RetryPolicy = DEFAULT_RETRY,
    on_chunk: Callable[[bytes], object] | None = None,
) -> int:
    """Copy a whole file to a local path in bounded memory.   -> its bytes

    on_chunk: called with each piece in order, once. After an error nothing is left at `path`.
    """
    written = 0
    try:
        with open(path, "wb") as file:
            for chunk in read_chunks(uri, retry=retry):
                written += file.write(chunk)
                if on_chunk is not None:
                    on_chunk(chunk)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return written


def write_bytes_atomic(uri: str, data: bytes | bytearray, *, retry: RetryPolicy = DEFAULT_RETRY) -> None:
    """Write a file so that a reader sees all of it or none."""
    if is_local(uri):
        with _replacing(local_path(uri)) as file:
            file.write(data)
        return
    _refuse_read_only(uri)
    _persist(
        lambda limit_s: _once(uri, "pipe_file", limit_s, data),
        uri,
        what=f"writing {shown(uri)}",
        retry=retry.for_bytes(len(data)),
        advice=WRITE_ADVICE,
    )


def create(uri: str, data: bytes, *, retry: RetryPolicy = DEFAULT_RETRY) -> bool:
    """Write a file where there is none, as one atomic step.   -> False: there was one, which stays as it is

    When the answer to a remote request is lost, the next one finds the file that the first made, and knows it by its
    content: `data` must hold something unique. Raises FileNotFoundError where the local folder is missing, and
    ConfigError where files cannot be written.
    """
    if is_local(uri):
        return _create_local(local_path(uri), data)
    _refuse_read_only(uri)
    if _persist(
        lambda limit_s: _create_once(uri, data, limit_s),
        uri,
        what=f"creating {shown(uri)}",
        retry=retry.for_bytes(len(data)),
        advice=WRITE_ADVICE,
    ):
        return True
    try:
        return read_bytes(uri, retry=retry) == data
    except FileNotFoundError:  # removed since
        return False


def upload(local: Path, uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> None:
    """Copy a file to `uri` so that a reader sees all of it or none."""
    if is_local(uri):
        with open(local, "rb") as source, _replacing(local_path(uri)) as file:
            shutil.copyfileobj(source, file, CHUNK_BYTES)
        return
    _refuse_read_only(uri)
    _persist(
        lambda limit_s: _once(uri, "put_file", limit_s, before=(str(local),)),
        uri,
        what=f"uploading {shown(uri)}",
        retry=retry.for_bytes(local.stat().st_size),
        advice=WRITE_ADVICE,
    )


def remove(uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> None:
    """Delete a file; it may be gone already."""
    if is_local(uri):
        local_path(uri).unlink(missing_ok=True)
        return
    _refuse_read_only(uri)
    what = f"removing {shown(uri)}"
    try:
        _persist(lambda limit_s: _once(uri, "rm_file", limit_s), uri, what=what, retry=retry, advice=WRITE_ADVICE)
    except FileNotFoundError:
        return


def make_folder(uri: str) -> None:
    """Make a local folder and those above it; object stores have no folders and need none."""
    if is_local(uri):
        local_path(uri).mkdir(parents=True, exist_ok=True)


def _range_name(uri: str, start: int, length: int) -> str:
    return f"bytes {start}-{start + length} of {shown(uri)}"


def _open(path: str) -> BinaryIO:
    """The local file, open: the one that has this name now, also where another was read under it before."""
    found = os.stat(path)
    identity = (found.st_ino, found.st_mtime_ns, found.st_size)
    entry = _open_files.get(path)
    if entry is not None and entry.identity == identity:
        return entry.file
    # Deleted files give back their space only when they are closed. Not closed by hand: a file is closed when the
    # last thread that reads it lets go.
    for name, other in list(_open_files.items()):
        if os.fstat(other.file.fileno()).st_nlink == 0 or len(_open_files) >= MAX_OPEN_FILES:
            _open_files.pop(name, None)
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - kept open
    _open_files[path] = _OpenFile(identity, file)
    return file


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends, and is gone when the block raises."""
    temporary = _temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")


def _create_local(path: Path, data: bytes) -> bool:
    temporary = _temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return temporary.stat().st_nlink > 1  # made by us: a network filesystem may lose an answer, too
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_once(uri: str, data: bytes, limit_s: float) -> bool:
    try:
        _once(uri, "pipe_file", limit_s, data, mode="create")
    except Exception as error:
        if isinstance(error, FileExistsError) or http_status(error) == PRECONDITION_FAILED:
            return False
        raise
    return True


def _range_once(uri: str, start: int, length: int, limit_s: float) -> bytes:
    try:
        data = bytes(_once(uri, "cat_file", limit_s, start=start, end=start + length))
    except Exception as error:
        if http_status(error) != RANGE_NOT_SATISFIABLE:
            raise
        data = b""  # what servers say to a range behind the end; the size tells below whether it is
    if len(data) < length:
        expected = max(0, min(length, _size_once(uri, limit_s) - start))
        if len(data) < expected:
            raise ConnectionError(f"{len(data)} of {expected} bytes came")
        length = expected
    if len(data) > length:
        raise ConfigError(
            f"the server of {shown(uri)} ignores range requests; serve it from one that answers them (S3, nginx), "
            "or copy the dataset to a local folder"
        )
    return data


def _size_once(uri: str, limit_s: float) -> int:
    found = _once(uri, "info", limit_s)
    if found["type"] == "directory":
        raise IsADirectoryError(f"{shown(uri)} is a folder")
    if found["size"] is None:
        raise EnvironmentFault(
            f"the server of {shown(uri)} does not tell the size of the file; serve it from one that does (S3, nginx)"
        )
    return int(found["size"])


def _once(uri: str, method: str, limit_s: float, *after: Any, before: tuple[Any, ...] = (), **options: Any) -> Any:
    """One call of a filesystem's method with (*before, path, *after); asynchronous ones are cut after `limit_s`."""
    import fsspec.asyn

    filesystem, path = _remote(uri)
    arguments = (*before, path, *after)
    if not filesystem.async_impl:
        return getattr(filesystem, method)(*arguments, **options)
    function = getattr(filesystem, f"_{method}")
    return fsspec.asyn.sync(filesystem.loop, function, *arguments, timeout=limit_s, **options)


def _persist(
    operation: Callable[[float], T], uri: str, *, what: str, retry: RetryPolicy, advice: str = READ_ADVICE
) -> T:
    """`operation` under the policy, named while it runs; what a user can mend is raised as one line."""
    try:
        with waiting(what):
            return call(operation, what=what, policy=retry, advice=advice)
    except UserError:
        raise
    except Exception as error:
        told = explained(error, what=what, where=shown(uri))
        if told is None:
            raise
        raise told from error


def _refuse_read_only(uri: str) -> None:
    if uri.partition("://")[0] in READ_ONLY:
        raise ConfigError(f"{shown(uri)} cannot be written; give a folder or an s3:// URL")


def _remote(uri: str) -> tuple[Any, str]:
    """(filesystem, path on it) of a URL."""
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(SETTINGS)))
    protocol = uri.partition("://")[0]
    try:
        filesystem = _filesystem(protocol, os.getpid(), settings)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        advice = f"run: pip install 'rddm-dist[{extra}]'" if extra else one_line(error)
        raise ConfigError(f"{shown(uri)} needs a package that is not installed; {advice}") from error
    except (TypeError, ValueError) as error:  # TypeError: a filesystem that needs more than a URL says
        raise ConfigError(
            f"{shown(uri)} is no known kind of location ({one_line(error)}); give a folder or an s3:// URL"
        ) from error
    return filesystem, str(filesystem._strip_protocol(uri))


@lru_cache(maxsize=8)
def _filesystem(protocol: str, pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    """The filesystem of a protocol for this process (its connections do not survive a fork) and environment.

    fsspec keeps instances by their arguments alone, so that a changed endpoint or credential would go unnoticed.
    """
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if EXTRAS.get(protocol) == "s3":
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "max_pool_connections": MAX_CONNECTIONS}
    if protocol in READ_ONLY:
        # A compressed answer has another length than the file.
        options["client_kwargs"] = {"headers": {"Accept-Encoding": "identity"}}
    filesystem = fsspec.filesystem(protocol, **options)
    if EXTRAS.get(protocol) == "s3":
        filesystem.retries = 1  # attempts are counted here, not below
    return filesystem
