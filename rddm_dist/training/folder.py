"""The run folder: its home, which is the truth, and the local work folder where files grow.

In a folder all workers can reach both are one. With a URL in run.storage the journal, logs, previews and MLflow's state
grow in a local folder and go up: the journal in segments with each commit, the rest as it is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import EnvironmentFault, UserError
from data_pipeline.retry import RetryPolicy
from rddm_dist.config import Config
from rddm_dist.tracking.journal import complete_bytes

log = logging.getLogger(__name__)

CONFIG_FILE, IDENTITY_FILE, JOURNAL_FILE = "config.yaml", "identity.json", "metrics.jsonl"
TRACKER_FILE = "mlflow.json"
SEGMENTS = "journal"  # folder of the journal's segments at a URL, each named by its first byte
SEGMENT_NAME = re.compile(r"\d+\.jsonl")
RETRY = RetryPolicy(deadline_s=60.0)


@dataclass(frozen=True)
class RunFolder:
    """home: absolute path or URL; work: where this machine writes; equal for a local home."""

    home: str
    work: Path

    @property
    def is_remote(self) -> bool:
        return not storage.is_local(self.home)

    def uri(self, name: str) -> str:
        """Where a file or folder of the run is."""
        return storage.join(self.home, name)

    def read(self, name: str) -> bytes | None:
        """A small file of the run; None where it is not there."""
        try:
            return storage.read_bytes(self.uri(name), retry=RETRY)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file of the run: whole, or not at all."""
        storage.write_bytes_atomic(self.uri(name), content, retry=RETRY)

    def exists(self, name: str) -> bool:
        try:
            return storage.exists(self.uri(name), retry=RETRY)
        except OSError as error:
            raise EnvironmentFault(
                f"run.storage: {self.home} cannot be read ({error.strerror or error}); choose another --storage"
            ) from error

    def remove(self, name: str) -> None:
        storage.remove(self.uri(name), retry=RETRY)

    def send(self, name: str) -> None:
        """Bring a file from the work folder home."""
        if self.is_remote:
            storage.upload(self.work / name, self.uri(name), retry=RETRY)


def run_folder(config: Config) -> RunFolder:
    """Where the run of a configuration lives; nothing is made or looked at."""
    location = config.run.storage
    if storage.is_local(location):
        home = storage.local_path(location).resolve() / config.run.name
        return RunFolder(str(home), home)
    home_uri = storage.join(location, config.run.name)
    parent = Path(config.run.work_dir or Path(tempfile.gettempdir()) / f"rddm-{os.getuid()}" / "runs")
    digest = hashlib.sha256(home_uri.encode()).hexdigest()[:12]
    return RunFolder(home_uri, parent.resolve() / f"{config.run.name}-{digest}")


class JournalMirror:
    """Brings the journal of a run with a remote home up there, and back to a machine that has not got it. Rank 0."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._path = folder.work / JOURNAL_FILE
        self._sent = 0
        self._waiting: list[str] = []
        self._lock = threading.Lock()

    def restore(self) -> None:
        """Make the local journal go on from the one at home.

        A local one that begins with it stays, points behind its end included; another one is of an earlier life of the
        run on this machine, and gives way. A run folder that was copied between a disk and a URL brings its journal in
        the other form.
        """
        if not self._folder.is_remote:
            self._take_segments()
            return
        there, stranded = _segments(self._folder)
        if stranded:
            # Left there, they would be joined to what this start writes over the gap.
            log.warning("the %s of %s has a gap; %d later segment(s) go", SEGMENTS, self._folder.home, len(stranded))
        for name in stranded:
            self._folder.remove(f"{SEGMENTS}/{name}")
        there = self._take_whole(there)
        here = self._path.read_bytes() if self._path.exists() else b""
        if not here.startswith(there):
            self._path.write_bytes(there)
            tracker = self._folder.read(TRACKER_FILE)
            local = self._folder.work / TRACKER_FILE
            if tracker is None:
                local.unlink(missing_ok=True)
            else:
                local.write_bytes(tracker)
        self._sent = len(there)

    def _take_segments(self) -> None:
        """In a folder: what the run wrote at a URL goes on in the one file."""
        if not self._folder.exists(SEGMENTS):
            return
        segments, _ = _segments(self._folder)
        here = self._folder.read(JOURNAL_FILE) or b""
        if segments.startswith(_complete(here)):
            self._folder.write(JOURNAL_FILE, segments)
        shutil.rmtree(self._folder.work / SEGMENTS)

    def _take_whole(self, segments: bytes) -> bytes:
        """At a URL: what the run wrote in a folder goes on in segments.   -> the journal"""
        whole = _complete(self._folder.read(JOURNAL_FILE) or b"")
        if len(whole) <= len(segments) or not whole.startswith(segments):
            return segments
        self._folder.write(f"{SEGMENTS}/{len(segments):012d}.jsonl", whole[len(segments) :])
        return whole

    def add(self, name: str) -> None:
        """Send this file of the work folder with the next commit."""
        if self._folder.is_remote:
            with self._lock:
                self._waiting.append(name)

    def send(self) -> None:
        """Bring home what has come since. From one thread at a time."""
        if not self._folder.is_remote:
            return
        if self._path.exists():
            end = complete_bytes(self._path)
            if end > self._sent:
                with open(self._path, "rb") as file:
                    file.seek(self._sent)
                    content = file.read(end - self._sent)
                self._folder.write(f"{SEGMENTS}/{self._sent:012d}.jsonl", content)
                self._sent = end
        if (self._folder.work / TRACKER_FILE).exists():
            self._folder.send(TRACKER_FILE)
        while self._waiting:
            self._folder.send(self._waiting[0])
            with self._lock:
                self._waiting.pop(0)


def read_segments(folder: RunFolder) -> bytes:
    """The journal as it stands at a remote home, up to the first gap."""
    return _segments(folder)[0]


def _segments(folder: RunFolder) -> tuple[bytes, list[str]]:
    """`read_segments`, and the names of the segments behind the gap."""
    place = folder.uri(SEGMENTS)
    names = [name for name in storage.list_names(place, retry=RETRY) if SEGMENT_NAME.fullmatch(name)]
    content = b""
    for index, name in enumerate(names):
        if int(name.partition(".")[0]) != len(content):
            return content, names[index:]
        content += storage.read_bytes(storage.join(place, name), retry=RETRY)
    return content, []


def _complete(content: bytes) -> bytes:
    """A journal up to its last line end."""
    return content[: content.rfind(b"\n") + 1]


def last_record(folder: RunFolder, event: str) -> dict[str, Any]:
    """The last record of an event in the journal at home; {} where there is none."""
    content = read_segments(folder) if folder.is_remote else folder.read(JOURNAL_FILE) or b""
    records = [json.loads(line) for line in content.splitlines() if line.endswith(b"}")]
    return next((record for record in reversed(records) if record.get("event") == event), {})


def try_sending(what: str, send: Callable[[], None]) -> None:
    """Send, or look for, what a run can do without; a failure is told, and ends nothing."""
    try:
        send()
    except (OSError, UserError) as error:
        log.warning("%s failed: %s", what, error)
