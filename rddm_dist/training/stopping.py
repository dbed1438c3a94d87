"""Stop requests: signals, a file in the run folder, a wall-clock limit, a notice file; one flag for the collective.

Whatever wants a run to stop ends here: the step's collective carries the flag, so all workers save at one boundary.
What launchers need to tell apart stands beside it: a run that a person stopped is not started again by a launcher.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType

from data_pipeline import storage
from rddm_dist.config import TrainSection
from rddm_dist.training.folder import RunFolder, try_sending

log = logging.getLogger(__name__)

REQUEST_FILE = "stop-request"
LAUNCHES = "launch"  # folder of the run's submissions, each in a folder of its number
STOPPED_FILE = "stopped"  # in the folder of a submission: a person wants it to end for good
LAUNCH_ENV = "RDDM_LAUNCH"  # number of the submission that a process was started by
STOPPED_CODE_ENV = "RDDM_STOPPED_CODE"  # exit code of a run that a person stopped, where any but 0 starts it again
KEEP_ENV = "RDDM_KEEP_REQUEST"  # set where a launcher has removed what was left of a stop request before
PREEMPTED = "preempted: "  # begins the reason of a stop after which the run is to be started again
REQUESTED = "stop requested in the run folder"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_S, REMOTE_POLL_S = 0.5, 5.0


class StopFlag:
    """This process's wish to stop at the next step boundary.

    It becomes true on SIGTERM or SIGUSR1 (where Python allows handlers: the main thread), on `request()`, when
    `<run folder>/stop-request` exists, train.max_hours after its making, and when train.notice_file exists. Files are
    looked for at most every POLL_S seconds; a URL by a thread every REMOTE_POLL_S seconds, on one worker.
    """

    def __init__(self, folder: RunFolder, *, rank: int = 0, train: TrainSection | None = None) -> None:
        train = train or TrainSection()
        self._folder = folder
        self._notice_file, self._max_hours = train.notice_file, train.max_hours
        self._deadline = time.monotonic() + train.max_hours * 3600 if train.max_hours else float("inf")
        self._next_poll = 0.0
        self._reason = ""
        self._previous: dict[int, object] = {}
        self._closed = threading.Event()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        if folder.is_remote and rank == 0:
            threading.Thread(target=self._watch, name="stop-request", daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    def request(self, reason: str) -> None:
        self._reason = self._reason or reason

    @property
    def reason(self) -> str:
        """Why, or an empty string."""
        now = time.monotonic()
        if not self._reason and now >= self._next_poll:
            self._next_poll = now + POLL_S
            if now >= self._deadline:
                self.request(f"train.max_hours={self._max_hours:g} are over")
            if self._notice_file and os.path.exists(self._notice_file):
                self.request(f"{PREEMPTED}{self._notice_file} is there")
            if not self._folder.is_remote:
                try_sending("the look for a stop request", self._look)
        return self._reason

    def _watch(self) -> None:
        while not self._closed.wait(REMOTE_POLL_S):
            try_sending("the look for a stop request", self._look)

    def _look(self) -> None:
        if self._folder.exists(REQUEST_FILE):
            said = (self._folder.read(REQUEST_FILE) or b"").decode(errors="replace").strip()
            self.request(said or REQUESTED)

    def close(self) -> None:
        """Put the signal handlers back."""
        self._closed.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()


def request_stop(folder: RunFolder, reason: str = "") -> None:
    """Ask whoever trains there to save at the next step boundary and stop. reason: as the journal will have it.

    A request that is there stays, except that one without PREEMPTED takes the place of any.
    """
    if reason.startswith(PREEMPTED) and folder.exists(REQUEST_FILE):
        return
    folder.write(REQUEST_FILE, reason.encode())


def clear_request(folder: RunFolder) -> None:
    """Forget the request that a run has followed."""
    folder.remove(REQUEST_FILE)


def forget_earlier_request(folder: RunFolder) -> None:
    """Forget a request that was for an earlier start: a run that starts means to run.

    Not under a launcher that did so itself when its job began: what lies there now came after it.
    """
    if not os.environ.get(KEEP_ENV):
        clear_request(folder)


def end_launch(folder: RunFolder, number: str, reason: str) -> None:
    """Ask a run to stop, and its launcher not to start it again in this submission. The run need not have begun."""
    storage.make_folder(folder.uri(f"{LAUNCHES}/{number}"))
    folder.write(f"{LAUNCHES}/{number}/{STOPPED_FILE}", reason.encode())
    request_stop(folder, reason)


def stopped_for_good(folder: RunFolder) -> bool:
    """Whether a person has stopped the submission that started this process, which is then not to run (again)."""
    number = os.environ.get(LAUNCH_ENV, "")
    return bool(number) and folder.exists(f"{LAUNCHES}/{number}/{STOPPED_FILE}")


def exit_code_of(code: int, folder: RunFolder) -> int:
    """The exit code of a process whose run ended with `code`: 75 becomes what the launcher asked for after a stop
    by a person."""
    asked = os.environ.get(STOPPED_CODE_ENV, "")
    return int(asked) if code == 75 and asked and stopped_for_good(folder) else code
