"""Stop requests: signals and a file in the run folder, read as one local flag that the step's collective carries."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType

from rddm_dist.training.folder import RunFolder, try_sending

log = logging.getLogger(__name__)

REQUEST_FILE = "stop-request"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_S, REMOTE_POLL_S = 0.5, 5.0


class StopFlag:
    """This process's wish to stop at the next step boundary.

    It becomes true on SIGTERM or SIGUSR1 (where Python allows handlers: the main thread), on `request()`, and when
    `<run folder>/stop-request` exists. A folder is looked into at most every POLL_S seconds; a URL by a thread every
    REMOTE_POLL_S seconds, on one worker.
    """

    def __init__(self, folder: RunFolder, *, rank: int = 0) -> None:
        self._folder = folder
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
        is_due = not self._folder.is_remote and time.monotonic() >= self._next_poll
        if not self._reason and is_due:
            self._next_poll = time.monotonic() + POLL_S
            try_sending("the look for a stop request", self._look)
        return self._reason

    def _watch(self) -> None:
        while not self._closed.wait(REMOTE_POLL_S):
            try_sending("the look for a stop request", self._look)

    def _look(self) -> None:
        if self._folder.exists(REQUEST_FILE):
            self.request("stop requested in the run folder")

    def close(self) -> None:
        """Put the signal handlers back."""
        self._closed.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()


def request_stop(folder: RunFolder) -> None:
    """Ask whoever trains there to save at the next step boundary and stop."""
    folder.write(REQUEST_FILE, b"")


def clear_request(folder: RunFolder) -> None:
    """Forget an earlier request: a run that starts means to run."""
    folder.remove(REQUEST_FILE)
