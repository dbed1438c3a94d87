"""Stop requests: signals and a file in the run folder, read as one local flag that the step's collective carries."""

from __future__ import annotations

import logging
import signal
import threading
import time
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

REQUEST_FILE = "stop-request"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """This process's wish to stop at the next step boundary.

    It becomes true on SIGTERM or SIGUSR1 (where Python allows handlers: the main thread), on `request()`, and when
    `<run folder>/stop-request` exists (looked up at most every `poll_s` seconds).
    """

    def __init__(self, run_dir: Path, *, poll_s: float = 0.5) -> None:
        self._file = run_dir / REQUEST_FILE
        self._poll_s = poll_s
        self._next_poll = 0.0
        self._reason = ""
        self._previous: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    def request(self, reason: str) -> None:
        self._reason = self._reason or reason

    @property
    def reason(self) -> str:
        """Why, or an empty string."""
        if not self._reason and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + self._poll_s
            if self._file.exists():
                self.request("stop requested in the run folder")
        return self._reason

    def close(self) -> None:
        """Put the signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()


def request_stop(run_dir: Path) -> None:
    """Ask whoever trains in `run_dir` to save at the next step boundary and stop."""
    (run_dir / REQUEST_FILE).touch()


def clear_request(run_dir: Path) -> None:
    """Forget an earlier request: a run that starts means to run."""
    (run_dir / REQUEST_FILE).unlink(missing_ok=True)
