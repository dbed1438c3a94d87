"""Verified copies of remote files on this machine, shared by its processes, within a limit of bytes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline import storage
from data_pipeline.errors import ConfigError, DataError, EnvironmentFault
from data_pipeline.retry import DEFAULT_RETRY, RetryPolicy, one_line

log = logging.getLogger(__name__)

HOME = "rddm-cache"  # everything in this folder is the cache's own, and may be evicted
LOCK = ".lock"
PART = ".part"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
TOUCH_S = 1.0
POLL_S = 0.1
DOWNLOADS = 2


@dataclass(frozen=True)
class NodeCache:
    """Local copies of files of datasets, each downloaded once by whichever thread or process asks first.

    folder: on a local disk; limit_bytes: of all copies together, unfinished downloads included. The copies lie in
    `folder`/rddm-cache as FINGERPRINT-NAME; the modification time is that of the last use.

    A download fills FINGERPRINT-NAME.part, which is also the lock of its file: whoever holds its flock may write it,
    and when it is whole it takes the final name. So there is never a partial file under a final name, a download
    whose process died is known by its free lock, and its length, set before the first byte, reserves the space.
    """

    folder: Path
    limit_bytes: int
    retry: RetryPolicy = DEFAULT_RETRY

    def __post_init__(self) -> None:
        if self.limit_bytes < 1:
            raise ConfigError(f"the limit of the cache is {self.limit_bytes} bytes; raise data.cache_gb")
        self._make_home()
        with self._folder_locked():
            self._sweep()

    def fetch(self, uri: str, *, fingerprint: str, name: str, sha256: str, size: int) -> Path:
        """The path of a verified local copy of `uri`, which is file `name` of the dataset with this fingerprint.

        sha256: in hex; size: in bytes. Open the copy at once: it may be evicted at any time, and stays readable to
        those who have it open. FileNotFoundError on opening means that it was: fetch again.

        Raises ConfigError for a file larger than the limit, DataError for one that is not what sha256 names, and
        EnvironmentFault when the disk is full or the server does not answer.
        """
        assert "/" not in name and not name.endswith(PART), "manifests allow no such names"
        path = self._home / f"{fingerprint[:32]}-{name}"
        return path if _is_whole(path, size) else self._fill(path, uri, sha256=sha256, size=size)

    def _fill(self, path: Path, uri: str, *, sha256: str, size: int) -> Path:
        if size > self.limit_bytes:
            raise ConfigError(
                f"{path.name} has {size} bytes and the cache holds {self.limit_bytes}; raise data.cache_gb, or set it "
                "to 0 to read without a cache"
            )
        part = path.with_name(path.name + PART)
        self._make_home()
        shown = storage.shown(uri)
        with storage.waiting(f"{shown} on its way into the cache ({size} bytes)"):
            while not _is_whole(path, size):
                with _claimed(part) as descriptor:
                    if descriptor is None or _is_whole(path, size):
                        continue  # another one was here first
                    if path.exists():
                        log.warning("the cached copy of %s has not its %d bytes; fetching it again", shown, size)
                    self._download(descriptor, uri, sha256=sha256, size=size)
                    with self._folder_locked():
                        os.replace(part, path)
        return path

    def _download(self, descriptor: int, uri: str, *, sha256: str, size: int) -> None:
        """Fill a claimed file, or raise."""
        shown = storage.shown(uri)
        for attempt in range(1, DOWNLOADS + 1):
            count, digest = self._copy(descriptor, uri, size=size)
            if (count, digest) == (size, sha256):
                return
            log.warning("download %d of %s is not the file the manifest names", attempt, shown)
        raise DataError(f"{shown} is not the file the manifest names (sha256); fetch or pack the dataset again")

    def _copy(self, descriptor: int, uri: str, *, size: int) -> tuple[int, str]:
        """Write a remote file; evict others while the disk is full.   -> (bytes that came, their sha256)

        It stops when more than `size` bytes came."""
        while True:
            self._reserve(descriptor, size)
            try:
                return self._copy_once(descriptor, uri, size=size)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                os.ftruncate(descriptor, 0)
                with self._folder_locked():
                    self._sweep()
                    copies = self._copies()
                    if not copies:
                        raise EnvironmentFault(
                            f"no space for {size} bytes in {self._home} ({one_line(error)}); free some, lower "
                            "data.cache_gb or change data.cache_dir"
                        ) from error
                    copies[0].unlink()

    def _copy_once(self, descriptor: int, uri: str, *, size: int) -> tuple[int, str]:
        digest, count = hashlib.sha256(), 0
        os.lseek(descriptor, 0, os.SEEK_SET)
        with open(descriptor, "wb", closefd=False) as file:
            for chunk in storage.read_chunks(uri, retry=self.retry):
                count += len(chunk)
                if count > size:
                    break  # what follows is beyond the reserved space
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(descriptor)  # after a power failure a file that has its name must have its bytes
        return count, digest.hexdigest()

    def _reserve(self, descriptor: int, size: int) -> None:
        """Give the claimed file its length; wait while other downloads need the space."""
        while True:
            with self._folder_locked():
                os.ftruncate(descriptor, 0)
                if self._make_room(size):
                    os.ftruncate(descriptor, size)
                    return
            time.sleep(POLL_S)

    def _make_room(self, size: int) -> bool:
        """Evict until `size` more bytes fit; whether they do."""
        if self._used() + size > self.limit_bytes:
            self._sweep()
        used = self._used()
        for copy in self._copies():
            if used + size <= self.limit_bytes:
                break
            used -= copy.stat().st_size
            copy.unlink()
            log.debug("evicted %s", copy.name)
        return used + size <= self.limit_bytes

    def _used(self) -> int:
        return sum(stat.st_size for _, stat in self._files())

    def _copies(self) -> list[Path]:
        """The finished files, the least recently used first."""
        finished = [
            (stat.st_mtime_ns, path) for path, stat in self._files() if path.name != LOCK and path.suffix != PART
        ]
        return [path for _, path in sorted(finished)]

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for name in os.listdir(self._home):
            path = self._home / name
            try:
                yield path, path.stat()
            except FileNotFoundError:
                continue  # a download that failed and was removed meanwhile

    def _sweep(self) -> None:
        """Remove unfinished files that nobody holds: their process died."""
        for part in self._home.glob(f"*{PART}"):
            try:
                descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _has_name(descriptor, part):
                    part.unlink()
            except BlockingIOError:
                log.debug("%s is being written", part.name)
            finally:
                _release(descriptor)

    @property
    def _home(self) -> Path:
        return self.folder / HOME

    def _make_home(self) -> None:
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            if not os.access(self._home, os.W_OK):
                raise PermissionError(f"{self._home} is not writable")
        except OSError as error:
            raise EnvironmentFault(f"the cache folder cannot be used ({error}); change data.cache_dir") from error

    @contextmanager
    def _folder_locked(self) -> Iterator[None]:
        """Hold, for a moment, what guards names and lengths in the folder."""
        descriptor = os.open(self._home / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            _release(descriptor)


def _is_whole(path: Path, size: int) -> bool:
    """Whether a finished copy of the right length is there; it counts as used now."""
    try:
        found = os.stat(path)
        if found.st_size != size:
            return False
        if abs(time.time() - found.st_mtime) >= TOUCH_S:
            os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _claimed(part: Path) -> Iterator[int | None]:
    """The unfinished file, locked and open for writing; None when its download ended while we waited for the lock.

    It is removed at the end unless it took another name.
    """
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not _has_name(descriptor, part):
            yield None
            return
        try:
            yield descriptor
        finally:
            if _has_name(descriptor, part):
                part.unlink()
    finally:
        _release(descriptor)


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _release(descriptor: int) -> None:
    # Unlocked by hand: a process forked meanwhile has the descriptor too, and would keep the lock.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
