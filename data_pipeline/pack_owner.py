"""Whose the output of a pack is: one owner at a time, in a folder by a lock, at a URL by a claim with signs of life."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline import storage
from data_pipeline.errors import DataError, EnvironmentFault

LOCK_NAME, OWNER_NAME = "lock", "owner.json"  # in the staging folder: of a local dataset, of one at a URL
BEAT_S = 30.0  # between two signs of life of the owner of a URL
STALE_S = 120.0  # without one it counts as dead
WORK_PREFIX = "rddm-writing-"
WORK_GRACE_S = 60.0  # so old must a work folder be that nobody holds, before it is taken for a killed pack's


class UrlClaim:
    """That one process packs into a URL: owner.json beside the plan names it and is written anew every BEAT_S seconds.

    An object store has no locks. What is left open: of two packs that begin within the same moment (between the look at
    owner.json and the writing of one's own, a few requests) both may go on, until the one whose name was overwritten
    looks again: when it begins to write shards, after at most BEAT_S, and last just before it writes the manifest. A
    process that was cut off for STALE_S loses its place to the next one; shards it was sending at that moment may still
    arrive. Clocks of machines must agree within a minute.
    """

    def __init__(self, out: str, staging: str) -> None:
        self._out, self._staging = out, staging
        self._uri = storage.join(staging, OWNER_NAME)
        self._id = uuid.uuid4().hex
        self._fault: Exception | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pack-owner", daemon=True)

    def take(self) -> None:
        """Raises DataError where another process is at work."""
        refuse_fresh_owner(self._out, self._staging)
        self._write()
        self.check()
        self._thread.start()

    @property
    def fault(self) -> Exception | None:
        """What the last sign of life met, if it was not well."""
        return self._fault

    def is_held(self) -> bool:
        return (_read_owner(self._uri) or {}).get("id") == self._id

    def check(self) -> None:
        """Raise DataError where another process has taken over."""
        if not self.is_held():
            raise DataError(f"--out {self._out} was taken over by another process; wait for it or give another URL")

    def release(self) -> None:
        self._released.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.is_held():
            storage.remove(self._uri)

    def _write(self) -> None:
        storage.write_bytes_atomic(self._uri, json.dumps({"id": self._id, "time": time.time()}).encode())

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                self.check()
                self._write()
            except Exception as error:  # raised by Output.check(), in the thread that can end the pack
                self._fault = error
                return


def _read_owner(uri: str) -> dict[str, object] | None:
    try:
        return json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None


def refuse_fresh_owner(out: str, staging: str) -> None:
    """Raise DataError where a process gave a sign of life at a URL not long ago."""
    owner = None if storage.is_local(out) else _read_owner(storage.join(staging, OWNER_NAME))
    age_s = abs(time.time() - float(str(owner["time"]))) if owner is not None else STALE_S
    if age_s < STALE_S:
        raise DataError(
            f"--out {out} is being packed by another process, which wrote there {age_s:.0f} s ago; wait for it or give "
            f"another URL (one that was killed is taken over after {STALE_S:.0f} s)"
        )


def lock_file(descriptor: int, out: str) -> None:
    """Lock an open file until it is closed. Raises DataError where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"--out {out} is being packed by another process; wait for it or give another folder"
        ) from error


def take_lock(out: str, staging: str) -> int | None:
    """The staging folder, made and locked for this process until the descriptor is closed; None for a URL."""
    if not storage.is_local(out):
        return None
    path = storage.local_path(staging) / LOCK_NAME
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # the one who held it has finished and removed the folder
        try:
            lock_file(lock, out)
        except BaseException:
            os.close(lock)
            raise
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # of a folder that is gone


@contextmanager
def using_temporary_folder() -> Iterator[None]:
    """Tell in one line that there is no room here for shards on their way to a URL."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"the folder {tempfile.tempdir or 'for temporary files'}, in which shards are made, cannot be written: "
            f"{error.strerror or error}; make room or set TMPDIR to another one"
        ) from error


@contextmanager
def work_folder(parent: str | None) -> Iterator[Path]:
    """A new folder in `parent`; None: in the one for temporary files, where those of killed packs are removed first.

    It is locked while it is in use, by which others know.
    """
    if parent is None:
        _sweep_work_folders(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=parent) as work:
        lock = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(work)
        finally:
            os.close(lock)


def _sweep_work_folders(parent: Path) -> None:
    """Remove this user's work folders that no process holds."""
    for path in parent.glob(f"{WORK_PREFIX}*"):
        try:
            found = path.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < WORK_GRACE_S:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # another process was faster
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
        except BlockingIOError:
            continue  # in use
        finally:
            os.close(lock)
