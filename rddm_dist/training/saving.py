"""Saving while training goes on: the loop waits for the copy to host memory, a thread writes, nothing else waits.

Each rank's thread writes its own file and a receipt; rank 0's thread waits for all receipts, then commits and prunes.
No collective happens outside the main thread: whether a save failed or is complete travels with the step's one
collective (`report`), after which all ranks call `finish` together.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import EnvironmentFault
from data_pipeline.retry import RetryPolicy, one_line
from rddm_dist import comm
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.fragments import Snapshot

log = logging.getLogger(__name__)

POLL_S, REMOTE_POLL_S = 0.1, 1.0  # between two looks for the receipts of other ranks
READERS = 16  # of receipts at once
RECEIPT_LIMIT_S = 120.0  # that rank 0 waits for them, once its own file is written and the steps wait as well


@dataclass(frozen=True)
class Series:
    """A row of checkpoints of one form: where they go and what each holds of this rank.

    snapshot: None on a rank that has nothing to write; after: called by rank 0 after a commit, e.g. to prune.
    """

    folder: str
    snapshot: Snapshot | None
    after: Callable[[int], None] = lambda step: None


@dataclass(frozen=True)
class Saved:
    """A committed save.   stall_s: what the loop waited for; seconds: from the copy to the commit"""

    step: int
    uri: str
    num_bytes: int
    stall_s: float
    seconds: float


@dataclass
class _Save:
    """One save in flight, seen by the main thread and by its writer."""

    step: int
    progress: ckpt.Progress
    series: Sequence[Series]
    attempt: str
    started: float
    stall_s: float = 0.0
    error: str = ""
    is_committed: bool = False
    is_told: bool = False
    num_bytes: int = 0
    is_written: threading.Event = field(default_factory=threading.Event)
    is_abandoned: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


class Saver:
    """The saves of one phase of a run, at most one in flight. All ranks call the same methods at the same steps.

    session: names this start of the run, equal on all ranks; writers: how many ranks write; guard: raises where this
    process no longer owns the run folder; before_commit, on_saved, on_failed: called on rank 0, the first by the
    writing thread (raising there fails the save).
    """

    def __init__(
        self,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        session: str,
        writers: int,
        max_failures: int,
        retry: RetryPolicy,
        guard: Callable[[], None],
        before_commit: Callable[[], None],
        on_saved: Callable[[Saved], None],
        on_failed: Callable[[int, str, int], None],
    ) -> None:
        self._shapes, self._session, self._writers, self._retry = shapes, session, writers, retry
        self._max_failures = max_failures
        self._guard = guard
        self._before_commit, self._on_saved, self._on_failed = before_commit, on_saved, on_failed
        self._save: _Save | None = None
        self._failures = 0
        self._count = 0

    def start(self, progress: ckpt.Progress, series: Sequence[Series]) -> None:
        """Copy the state and begin to write it; waits first for a save that is still in flight."""
        called = time.monotonic()
        self.finish()
        self._count += 1
        save = _Save(progress.step, progress, series, f"{self._session}-{self._count}", time.monotonic())
        try:
            for each in series:
                if each.snapshot is not None:
                    each.snapshot.take()
        except MemoryError as error:  # of one worker, which the others learn of in the next step
            save.error = one_line(error)
        save.stall_s = time.monotonic() - called
        save.thread = threading.Thread(target=self._write, args=(save,), name="checkpoint-writer", daemon=True)
        self._save = save
        save.thread.start()

    def report(self) -> tuple[bool, bool]:
        """For the step's collective: whether this rank's write failed, and whether it (rank 0) has committed."""
        save = self._save
        return (False, False) if save is None else (bool(save.error), save.is_committed)

    def finish(self) -> bool:
        """Wait for the save in flight, if any.   -> whether the last save is complete

        Raises EnvironmentFault on every rank where `max_failures` saves have failed in a row.
        """
        save = self._save
        if save is None:
            return not self._failures
        assert save.thread is not None
        save.is_written.wait()
        [num_failed] = comm.sum_floats([float(bool(save.error))])
        if num_failed:
            save.is_abandoned.set()
        save.thread.join(RECEIPT_LIMIT_S)  # a file may be where rank 0 cannot see it
        save.is_abandoned.set()  # ends the wait for receipts alone, no commit
        save.thread.join()
        reasons = comm.gather_object(save.error)
        # That of rank 0 comes last: it may only have waited for the one that failed.
        reason = comm.broadcast_object(next(filter(None, reversed(reasons or [])), ""))
        self._save = None
        if not reason:
            self._failures = 0
            if comm.rank() == 0:
                seconds = time.monotonic() - save.started
                uri = ckpt.step_folder(save.series[0].folder, save.step)
                self._on_saved(Saved(save.step, uri, save.num_bytes, save.stall_s, seconds))
            return True
        self._failures += 1
        if comm.rank() == 0:
            self._remove_unfinished(save)
            self._on_failed(save.step, reason, self._failures)
        if self._failures >= self._max_failures:
            raise self._give_up(reason)
        return False

    def close(self) -> None:
        """Let a save in flight come to its end where that is possible without the other ranks. No collective."""
        save, self._save = self._save, None
        if save is None or save.thread is None:
            return
        save.thread.join(RECEIPT_LIMIT_S)
        save.is_abandoned.set()
        save.thread.join()

    # -- the writing thread ------------------------------------------------------------------------------------------

    def _write(self, save: _Save) -> None:
        try:
            if save.error:
                return
            for series in save.series:
                self._write_rank(save, series)
            save.is_written.set()
            if comm.rank() == 0:
                self._commit(save)
        except Exception as error:  # told to everybody by the next collective, which decides what becomes of the run
            log.debug("a save failed", exc_info=True)
            save.error = one_line(error)
        finally:
            save.is_written.set()

    def _write_rank(self, save: _Save, series: Series) -> None:
        if series.snapshot is None:
            return
        folder = ckpt.step_folder(series.folder, save.step)
        storage.make_folder(folder)
        name = f"rank-{comm.rank():05d}"
        digest = series.snapshot.write(storage.join(folder, f"{name}.safetensors"), retry=self._retry)
        receipt = {"attempt": save.attempt, "bytes": series.snapshot.num_bytes, "sha256": digest}
        storage.write_bytes_atomic(
            storage.join(folder, f"{name}.json"), json.dumps(receipt).encode(), retry=self._retry
        )

    def _commit(self, save: _Save) -> None:
        tables = [self._await_receipts(save, series) for series in save.series]
        self._guard()  # what is sent before the commit is the owner's, too
        self._before_commit()
        self._guard()
        # Checkpoints are committed last: a run that goes on from one must not miss what belongs to its step.
        for series, files in reversed(list(zip(save.series, tables, strict=True))):
            folder = ckpt.step_folder(series.folder, save.step)
            committed = ckpt.write_commit(folder, save.progress, self._shapes, files, retry=self._retry)
            save.num_bytes += committed.num_bytes
        for series in save.series:
            series.after(save.step)
        save.is_committed = True  # and nothing is left to wait for

    def _await_receipts(self, save: _Save, series: Series) -> dict[str, tuple[int, str]]:
        """Wait until every rank has written.   -> name -> (bytes, sha256) of all files"""
        folder = ckpt.step_folder(series.folder, save.step)
        files: dict[str, tuple[int, str]] = {}
        poll_s = POLL_S if storage.is_local(folder) else REMOTE_POLL_S

        def look(rank: int) -> bool:
            name = f"rank-{rank:05d}"
            content = self._read_receipt(storage.join(folder, f"{name}.json"))
            receipt: dict[str, Any] = json.loads(content) if content else {}
            if receipt.get("attempt") != save.attempt:
                return False
            files[f"{name}.safetensors"] = (receipt["bytes"], receipt["sha256"])
            files[f"{name}.json"] = (len(content), ckpt.sha256_of(content))
            return True

        missing = list(range(self._writers))
        with ThreadPoolExecutor(READERS, thread_name_prefix="receipts") as pool:
            while missing:
                # Each look is a request to a server: who waits for one rank does not ask for the others meanwhile.
                if look(missing[0]):
                    found = list(pool.map(look, missing[1:]))
                    missing = [rank for rank, is_there in zip(missing[1:], found, strict=True) if not is_there]
                elif save.is_abandoned.wait(poll_s):
                    raise EnvironmentFault(
                        f"the file of worker {missing[0]} did not come; run.storage must be a place that all workers "
                        "share"
                    )
        return files

    def _read_receipt(self, uri: str) -> bytes:
        try:
            return storage.read_bytes(uri, retry=self._retry)
        except FileNotFoundError:
            return b""

    def _remove_unfinished(self, save: _Save) -> None:
        """What a failed save left takes room that the next one needs.

        At a URL it stays until the next sweep: room is no concern there, and a server that is away would hold up the
        steps.
        """
        for series in save.series:
            folder = ckpt.step_folder(series.folder, save.step)
            if not storage.is_local(folder):
                continue
            try:
                self._guard()
                if not ckpt.is_committed(folder):
                    ckpt.remove(folder)
            except (OSError, EnvironmentFault) as error:
                log.warning("cannot remove the unfinished %s: %s", folder, error)

    def _give_up(self, reason: str) -> EnvironmentFault:
        error = EnvironmentFault(
            f"{self._failures} saves in a row failed, the last with: {reason}; make room or mend the storage, then the "
            "same command goes on from the newest checkpoint (train.max_failed_saves bounds them)"
        )
        error.is_shared = True
        return error
