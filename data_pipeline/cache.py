"""Verified copies of remote files on this machine, shared by its processes, within a limit of bytes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
COUNT_DIGITS = 20
ROOT = 0  # its user id


class _DiskFull(EnvironmentFault):
    """The local disk is full, which the cache may be able to mend."""


class _Copy(NamedTuple):
    used_ns: int
    bytes: int
    path: str


@dataclass(frozen=True)
class NodeCache:
    """Local copies of files of datasets, each downloaded once by whichever thread or process asks first.

    folder: on a local disk; limit_bytes: of all copies together, unfinished downloads included. The copies lie in
    `folder`/rddm-cache as FINGERPRINT-NAME; the modification time is that of the last use.

    A download fills FINGERPRINT-NAME.part, which is also the lock of its file: whoever holds its flock may write it,
    and when it is whole it takes the final name. So there is never a partial file under a final name, a download
    whose process died is known by its free lock, and its length, set before the first byte, reserves the space.

    The file .lock guards names and lengths and holds the sum of the lengths, or more: what is not counted off (failed
    downloads, files removed by hand) is found when the limit seems reached. So thousands of small files are fine: a
    hit is one stat, and the folder is listed only by a miss that must evict (once, about 5 us a file) and, while it
    waits for space that other downloads hold, by every POLL_S.

    Folders made here are of mode 0700; where `folder` is shared by its group (mode 2770), what is made is so too.
    Whatever the local disk refuses is one line, an EnvironmentFault that names data.cache_dir.
    """

    folder: Path
    limit_bytes: int
    retry: RetryPolicy = DEFAULT_RETRY

    def __post_init__(self) -> None:
        if self.limit_bytes < 1:
            raise ConfigError(f"the limit of the cache is {self.limit_bytes} bytes; raise data.cache_gb")
        self._make_home()
        with self._folder_locked() as lock:
            self._scan()
            os.ftruncate(lock, 0)  # a power failure may have lost a count: count anew

    def fetch(self, uri: str, *, fingerprint: str, name: str, sha256: str, size: int) -> Path:
        """The path of a verified local copy of `uri`, which is file `name` of the dataset with this fingerprint.

        sha256: in hex; size: in bytes. Open the copy at once: it may be evicted at any time, and stays readable to
        those who have it open. FileNotFoundError on opening means that it was: fetch again.

        Raises ConfigError for a file larger than the limit, DataError for one that is not what sha256 names,
        FileNotFoundError for one that is not there, and EnvironmentFault when the local disk or the server fails.
        """
        assert "/" not in name and not name.endswith(PART), "manifests allow no such names"
        path = self._home / f"{fingerprint[:32]}-{name}"
        return path if _is_whole(path, size) else self._fill(path, uri, sha256=sha256, size=size)

    def discard(self, path: Path) -> None:
        """Forget a copy, as `fetch` returned it, that turned out damaged: the next fetch downloads it anew.

        It may be gone already. Readers that have it open keep reading the damaged bytes; those that open it now get
        FileNotFoundError, as after an eviction, or the new copy. Who discards a copy late, when another has replaced
        it, discards the new one, at the cost of a download.
        """
        assert path.parent == self._home, "not a copy of this cache"
        with self._folder_locked():
            path.unlink(missing_ok=True)

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
                    if os.path.exists(path):
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
            try:
                self._reserve(descriptor, size)
                return self._copy_once(descriptor, uri, size=size)
            except _DiskFull as full:
                with self._folder_locked():
                    os.ftruncate(descriptor, 0)
                    _, copies = self._scan()
                    if not copies:
                        raise EnvironmentFault(f"no space for {size} bytes: {full}") from full
                    _evict(copies, size)

    def _copy_once(self, descriptor: int, uri: str, *, size: int) -> tuple[int, str]:
        digest, count = hashlib.sha256(), 0
        with _disk(self._home):
            os.lseek(descriptor, 0, os.SEEK_SET)
        for chunk in storage.read_chunks(uri, retry=self.retry):
            count += len(chunk)
            if count > size:
                break  # what follows is beyond the reserved space
            with _disk(self._home):
                _write(descriptor, chunk)
            digest.update(chunk)
        with _disk(self._home):
            os.fsync(descriptor)  # after a power failure a file that has its name must have its bytes
        return count, digest.hexdigest()

    def _reserve(self, descriptor: int, size: int) -> None:
        """Give the claimed file its length; wait while other downloads need the space."""
        while True:
            with self._folder_locked() as lock:
                os.ftruncate(descriptor, 0)
                if self._make_room(lock, size):
                    os.ftruncate(descriptor, size)
                    return
            time.sleep(POLL_S)

    def _make_room(self, lock: int, size: int) -> bool:
        """Count `size` more bytes in, after evicting what must go; False, and nothing evicted, where they do not fit.

        lock: the descriptor of the held lock.
        """
        used = _counted(lock)
        if used is None or used + size > self.limit_bytes:
            used, copies = self._scan()
            if used - sum(copy.bytes for copy in copies) + size > self.limit_bytes:
                return False  # unfinished downloads need the space: to evict would be in vain
            used -= _evict(copies, used + size - self.limit_bytes)
        # Before the file grows: a process killed in between leaves a count too high, not too low.
        _write(lock, b"%0*d" % (COUNT_DIGITS, used + size))
        return True

    def _scan(self) -> tuple[int, list[_Copy]]:
        """What the folder holds, unfinished files whose process died removed.

        -> (bytes of all files, the finished ones with the least recently used first)
        """
        used, copies = 0, []
        for entry in os.scandir(self._home):
            if entry.name == LOCK or (entry.name.endswith(PART) and _is_swept(entry.path)):
                continue
            try:
                found = entry.stat()
            except FileNotFoundError:
                continue  # a download that failed and was removed meanwhile
            used += found.st_size
            if not entry.name.endswith(PART):
                copies.append(_Copy(found.st_mtime_ns, found.st_size, entry.path))
        return used, sorted(copies)

    @property
    def _home(self) -> Path:
        return self.folder / HOME

    def _make_home(self) -> None:
        with _disk(self._home):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder, user, groups = self.folder.stat(), os.geteuid(), {os.getegid(), *os.getgroups()}
            _refuse_open(self.folder, folder, owners=(user, ROOT), groups=groups)
            with contextlib.suppress(FileExistsError):
                self._home.mkdir(mode=0o700)
                if is_group_shared(folder, groups):
                    self._home.chmod(0o2770)
            # Root alone may own what lies above (/tmp), but copies in a folder of everybody's could be anybody's.
            _refuse_open(self._home, self._home.stat(), owners=(user,), groups=groups)
            if not os.access(self._home, os.W_OK | os.X_OK):
                raise PermissionError(f"{self._home} is not writable")

    @contextmanager
    def _folder_locked(self) -> Iterator[int]:
        """Hold, for a moment, what guards names and lengths in the folder.   -> the descriptor of the lock's file"""
        with _held(self._home / LOCK) as lock, _disk(self._home):
            yield lock


def is_group_shared(found: os.stat_result, groups: Collection[int]) -> bool:
    """Whether a folder is made for the members of one of `groups` (ids) to share: group-writable and setgid."""
    return found.st_gid in groups and bool(found.st_mode & stat.S_IWGRP) and bool(found.st_mode & stat.S_ISGID)


def is_open_to_strangers(found: os.stat_result, *, owners: Collection[int], groups: Collection[int]) -> bool:
    """Whether anybody may write into a folder that is none of `owners` (user ids) and not shared by a group of ours."""
    is_foreign = found.st_uid not in owners
    return is_foreign and bool(found.st_mode & stat.S_IWOTH) and not is_group_shared(found, groups)


def _refuse_open(path: Path, found: os.stat_result, *, owners: Collection[int], groups: Collection[int]) -> None:
    if is_open_to_strangers(found, owners=owners, groups=groups):
        raise EnvironmentFault(
            f"the cache folder {path} belongs to user {found.st_uid} and anybody may write to it; set data.cache_dir "
            "to a folder of your own, or to one that a group shares (mode 2770)"
        )


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Tell in one line what the local disk refuses in the block."""
    try:
        yield
    except OSError as error:
        raise _fault(path, error) from error


def _fault(path: Path, error: OSError) -> EnvironmentFault:
    if error.errno in DISK_FULL:
        return _DiskFull(
            f"the disk of {path} is full ({one_line(error)}); free some, lower data.cache_gb or change data.cache_dir"
        )
    return EnvironmentFault(
        f"the cache cannot use {path} ({one_line(error)}); check the disk and the permissions, or change data.cache_dir"
    )


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
    except OSError as error:
        raise _fault(path, error) from error
    return True


def _counted(lock: int) -> int | None:
    """The bytes that the open file of the folder's lock counts; None where they must be counted anew."""
    text = os.pread(lock, COUNT_DIGITS, 0)
    return int(text) if len(text) == COUNT_DIGITS and text.isdigit() else None


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _evict(copies: Sequence[_Copy], needed: int) -> int:
    """Remove copies, the first ones first, until `needed` bytes are free.   -> bytes freed"""
    freed = 0
    for copy in copies:
        if freed >= needed:
            break
        Path(copy.path).unlink(missing_ok=True)  # whoever tidies temporary folders may have been here
        freed += copy.bytes
        log.debug("evicted %s", copy.path)
    return freed


def _is_swept(part: str) -> bool:
    """Remove an unfinished file unless somebody holds it; whether it is gone."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _has_name(descriptor, part):
            os.unlink(part)
    except BlockingIOError:
        return False
    finally:
        _release(descriptor)
    return True


@contextmanager
def _held(path: Path) -> Iterator[int]:
    """The file at `path`, open and locked; made where there is none, for the group where the folder is."""
    with _disk(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            found, mode = os.fstat(descriptor), 0o600 | path.parent.stat().st_mode & 0o060
            if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != mode:
                os.fchmod(descriptor, mode)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            os.close(descriptor)
            raise
    try:
        yield descriptor
    finally:
        _release(descriptor)


@contextmanager
def _claimed(part: Path) -> Iterator[int | None]:
    """The unfinished file, locked and open for writing; None when its download ended while we waited for the lock.

    It is removed at the end unless it took another name.
    """
    with _held(part) as descriptor:
        with _disk(part):
            is_ours = _has_name(descriptor, part)
        if not is_ours:
            yield None
            return
        try:
            yield descriptor
        finally:
            with _disk(part):
                if _has_name(descriptor, part):
                    part.unlink()


def _has_name(descriptor: int, path: Path | str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _release(descriptor: int) -> None:
    # Unlocked by hand: a process forked meanwhile has the descriptor too, and would keep the lock.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
