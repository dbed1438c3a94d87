"""Progress on the console: a bar with rate and ETA on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

console = Console(highlight=False)


def say(text: str) -> None:
    """One line of the story."""
    console.print(text, markup=False, soft_wrap=True)


class ProgressBar:
    """`with ProgressBar("train", total) as bar: bar.update(done, "loss 0.1")`. Waiting is shown with done = 0."""

    def __init__(self, title: str, total: int, *, every_s: float = 15.0) -> None:
        self._title, self._total, self._every_s = title, total, every_s
        self._started = time.monotonic()
        self._first_done: int | None = None
        self._next_line = 0.0
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(compact=True),
                console=console,
            )

    def __enter__(self) -> ProgressBar:
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=self._total, note="")
        return self

    def update(self, done: int, note: str = "") -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if self._first_done is None and done:
            self._first_done, self._started = done, now
        if now < self._next_line and done < self._total:
            return
        self._next_line = now + self._every_s
        say(f"  {self._title} {done}/{self._total}{self._eta(done, now)}{'  ' + note if note else ''}")

    def _eta(self, done: int, now: float) -> str:
        gained = done - (self._first_done or 0)
        if gained <= 0 or done >= self._total:
            return ""
        return f"  ETA {(now - self._started) / gained * (self._total - done):.0f} s"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
