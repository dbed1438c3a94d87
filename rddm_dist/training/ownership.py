"""One run folder has one owner: generation files made by conditional writes, heartbeats, and take-over of the dead.

`owner-000001.json`, `owner-000002.json`, ... lie in the folder and the highest generation owns it. Taking is the
creation of the next generation, which the storage lets succeed once. Only the owner rewrites its file, every BEAT_S.
No clocks are compared to find out who is dead: a process of the same machine is looked up, any other one is watched.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from data_pipeline import storage
from data_pipeline.errors import EnvironmentFault, UserError
from data_pipeline.retry import DEFAULT_RETRY, RetryPolicy

log = logging.getLogger(__name__)

OWNER_PATTERN = re.compile(r"owner-(\d{6,})\.json")
BEAT_S = 10.0
BEAT_AGAIN_S = 2.0  # after a beat that failed
STALE_S = 60.0
POLL_S = 1.0
# Who was away for so long while it wrote a beat cannot know whether it made a file again that a new owner had removed.
PAUSE_S = 30.0
# One attempt: a failed beat is repeated by the next one.
BEAT_RETRY = RetryPolicy(deadline_s=5.0, first_delay_s=10.0, attempt_timeout_s=5.0)
RELEASE_RETRY = RetryPolicy(deadline_s=10.0)
JOIN_S = 30.0
# All versions of a file are equally long, since a reader on object storage asks for the length first.
FILE_BYTES = 512


@dataclass(frozen=True)
class _Owner:
    """What an owner file says.

    id: unique to a take; boot: boot of the machine and process-id namespace, in which `pid` and `started` (clock
    ticks since the boot) name one process for ever; beat: counts signs of life; time: of the last one, seconds since
    the epoch by the owner's clock, for messages.
    """

    id: str
    host: str
    boot: str
    pid: int
    started: int
    beat: int
    time: float

    def encoded(self) -> bytes:
        """The content of the file."""
        return json.dumps(asdict(self)).encode().ljust(FILE_BYTES)

    @property
    def age_s(self) -> float:
        """Seconds since the last sign of life, if all clocks agree."""
        return max(0.0, time.time() - self.time)


class _Seen(NamedTuple):
    """The highest generation in a folder, as it was read."""

    generation: int
    content: bytes


class Ownership:
    """The run folder `home` is ours from `take` until `release()` (or the end of the with block), or until `lost`.

    `lost`: "" or why the folder is no longer ours, as far as the last heartbeat or `check()` saw; it stays lost.
    Any thread may use it; only the process that took the folder may.
    """

    def __init__(self, home: str, generation: int, owner: _Owner, *, is_new: bool) -> None:
        """Start the heartbeat of a folder that `take` has made ours. is_new: it goes when it is left empty."""
        self.home = home
        self.lost = ""
        self._uri, self._generation, self._owner, self._is_new = _file_of(home, generation), generation, owner, is_new
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="run-folder-owner", daemon=True)
        self._thread.start()

    def __enter__(self) -> Ownership:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self, *, retry: RetryPolicy = DEFAULT_RETRY) -> None:
        """Look now whether the folder is still ours; just before a commit.

        Raises EnvironmentFault where it is not (then `lost` says so as well, for good) or where the storage cannot be
        read.
        """
        with _told(self.home, "read"):
            self._look(retry)
        if self.lost:
            raise EnvironmentFault(
                f"run folder {self.home} is no longer owned by this process ({self.lost}), which stops without writing "
                "to it; stop the other one, or choose another run.name"
            )

    def release(self) -> None:
        """Stop the heartbeat and remove the owner file, if it is ours; a file left by a failure is only logged."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join(JOIN_S)
        if self._thread.is_alive():
            log.warning("the owner file of %s stays: the storage does not answer", self.home)
            return
        try:
            _remove_own(self._uri, self._owner.id)
            if self._is_new:
                _drop_if_empty(self.home)
        except (UserError, OSError) as error:
            log.warning("%s could not be released (%s); who takes it next may have to wait", self.home, error)

    def _look(self, retry: RetryPolicy) -> None:
        seen = _look(self.home, retry=retry)
        if seen is None or seen.generation < self._generation:
            self._lose("its owner file is gone")
        elif seen.generation > self._generation or _id_of(seen.content) != self._owner.id:
            self._lose(f"taken over by {_described(_parsed(seen.content))}")

    def _lose(self, why: str) -> None:
        if not self.lost:
            self.lost = why
            log.error("run folder %s is no longer owned by this process: %s", self.home, why)

    def _keep_beating(self) -> None:
        is_failing = False
        while not self._stopping.wait(BEAT_AGAIN_S if is_failing else BEAT_S) and not self.lost:
            try:
                self._beat()
            except (UserError, OSError) as error:
                if not is_failing:
                    log.warning("no sign of life in %s (%s); trying on, others may take it for dead", self.home, error)
                is_failing = True
                continue
            if is_failing:
                log.info("signs of life in %s again", self.home)
            is_failing = False

    def _beat(self) -> None:
        """Give a sign of life, if the folder is still ours."""
        self._look(BEAT_RETRY)
        if self.lost or self._stopping.is_set():
            return
        looked = time.monotonic()
        self._owner = replace(self._owner, beat=self._owner.beat + 1, time=time.time())
        if storage.is_local(self._uri):
            # In place: however long it takes, it makes no file again that a new owner has removed.
            with open(storage.local_path(self._uri), "r+b", buffering=0) as file:
                file.write(self._owner.encoded())
            return
        try:
            storage.write_bytes_atomic(self._uri, self._owner.encoded(), retry=BEAT_RETRY)
        finally:
            away_s = time.monotonic() - looked
            if away_s > PAUSE_S:
                self._lose(f"this process stood still for {away_s:.0f} s, in which another may have had the folder")


def take(home: str, *, stale_s: float = STALE_S) -> Ownership:
    """Make the run folder ours, or refuse.   -> the ownership, with its heartbeat running

    home: local folder, made where it is absent, or s3:// URL. stale_s: seconds without a sign of life after which an
    owner that cannot be looked up from here is dead; it is waited for. Raises EnvironmentFault when somebody has the
    folder, and when it cannot be written.
    """
    is_new = storage.is_local(home) and not storage.local_path(home).exists()
    owner = _this_process()
    with _told(home, "written"):
        try:
            while True:
                seen = _look(home)
                if seen is not None and not _is_dead(home, seen, stale_s):
                    continue
                storage.make_folder(home)
                if _create_next(home, seen, owner):
                    break
        except BaseException:
            if is_new:
                _drop_if_empty(home)
            raise
        generation = 1 if seen is None else seen.generation + 1
        if seen is not None:
            log.warning("took over run folder %s from %s", home, _described(_parsed(seen.content)))
        for older in _generations(home):
            if older < generation:
                storage.remove(_file_of(home, older))
    return Ownership(home, generation, owner, is_new=is_new)


def peek(home: str) -> str:
    """Who has the run folder, as in "pid 123 on node7, last sign of life 3 s ago"; "" when nobody is known to live.

    Never writes and never waits: of an owner elsewhere it believes the clock, and STALE_S. Raises EnvironmentFault
    when the folder cannot be read.
    """
    with _told(home, "read"):
        seen = _look(home)
    owner = None if seen is None else _parsed(seen.content)
    if owner is None:
        return ""
    is_running = _is_running(owner)
    if is_running is None:
        is_running = owner.age_s <= STALE_S
    return f"{_name(owner)}, last sign of life {owner.age_s:.0f} s ago" if is_running else ""


def _create_next(home: str, seen: _Seen | None, owner: _Owner) -> bool:
    """Whether `owner` made the generation after `seen` (None: the first), and still none but `seen` came before it.

    What was seen is looked at again: meanwhile its owner may have woken up, or others have come and gone.
    """
    mine = _Seen(1 if seen is None else seen.generation + 1, owner.encoded())
    uri = _file_of(home, mine.generation)
    if not storage.create(uri, mine.content):
        return False
    is_unchanged = seen is None or _content(_file_of(home, seen.generation)) == seen.content
    if is_unchanged and _look(home) == mine:
        return True
    _remove_own(uri, owner.id)
    return False


def _is_dead(home: str, seen: _Seen, stale_s: float) -> bool:
    """Whether the owner is dead; False: it is gone. Raises EnvironmentFault where it lives, and waits to find out."""
    owner = _parsed(seen.content)
    is_running = None if owner is None else _is_running(owner)
    if is_running is not None:
        if is_running:
            raise _in_use(home, seen)
        return True
    log.warning(
        "run folder %s was left by %s, which cannot be looked up from here; waiting up to %g s for a sign of life",
        home, _described(owner), stale_s,
    )  # fmt: skip
    pause_s = min(POLL_S, stale_s / 5)
    silent_s = 0.0  # our pauses alone: while the storage does not answer us, the owner may not reach it either
    while silent_s < stale_s:
        time.sleep(pause_s)
        silent_s += pause_s
        now = _look(home)
        if now is None:
            return False
        if now != seen:
            raise _in_use(home, now)
    return True


def _in_use(home: str, seen: _Seen) -> EnvironmentFault:
    who = _described(_parsed(seen.content))
    return EnvironmentFault(f"run folder {home} is in use by {who}; stop that one, or choose another run.name")


def _look(home: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> _Seen | None:
    """The highest generation now; None where there is no owner file."""
    while generations := _generations(home, retry=retry):
        content = _content(_file_of(home, generations[-1]), retry=retry)
        if content is not None:
            return _Seen(generations[-1], content)
    return None


def _generations(home: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> list[int]:
    matches = map(OWNER_PATTERN.fullmatch, storage.list_names(home, retry=retry))
    return sorted(int(match[1]) for match in matches if match)


def _file_of(home: str, generation: int) -> str:
    return storage.join(home, f"owner-{generation:06d}.json")


def _content(uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> bytes | None:
    try:
        return storage.read_bytes(uri, retry=retry)
    except FileNotFoundError:
        return None


def _remove_own(uri: str, id: str) -> None:
    content = _content(uri, retry=RELEASE_RETRY)
    if content is not None and _id_of(content) == id:
        storage.remove(uri, retry=RELEASE_RETRY)


def _drop_if_empty(home: str) -> None:
    folder = storage.local_path(home)
    if folder.is_dir() and not os.listdir(folder):
        folder.rmdir()


def _parsed(content: bytes) -> _Owner | None:
    """What the file says; None where it is no owner file of ours."""
    try:
        said = json.loads(content)
        texts = {key: str(said[key]) for key in ("id", "host", "boot")}
        numbers = {key: int(said[key]) for key in ("pid", "started", "beat")}
        return _Owner(**texts, **numbers, time=float(said["time"]))  # type: ignore[arg-type]
    except (ValueError, TypeError, LookupError, OverflowError):
        return None


def _id_of(content: bytes) -> str:
    owner = _parsed(content)
    return "" if owner is None else owner.id


def _name(owner: _Owner) -> str:
    return f"pid {owner.pid} on {owner.host}"


def _described(owner: _Owner | None) -> str:
    if owner is None:
        return "somebody whose owner file cannot be read"
    return f"{_name(owner)} (last sign of life {owner.age_s:.0f} s ago)"


def _this_process() -> _Owner:
    """This process as a new owner."""
    pid = os.getpid()
    return _Owner(uuid.uuid4().hex, socket.gethostname(), _boot(), pid, _started(pid), beat=0, time=time.time())


def _boot() -> str:
    """The boot of this machine and the process-id namespace: where both are the same, process ids mean the same."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _is_running(owner: _Owner) -> bool | None:
    """Whether the process lives; None where it cannot be looked up: elsewhere, or hidden as another user's."""
    if owner.boot != _boot():
        return None
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists
    try:
        return _started(owner.pid) == owner.started
    except FileNotFoundError:
        return None


def _started(pid: int) -> int:
    """When a process was started, in clock ticks since the boot (field 22 of /proc/PID/stat); 0: it has ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from field 3 on: the state
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


@contextmanager
def _told(home: str, done: str) -> Iterator[None]:
    """Errors of the operating system in one line."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"run.storage: {home} cannot be {done} ({error.strerror or error}); choose another --storage"
        ) from error
