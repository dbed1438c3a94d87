"""Work that may never end, such as a look at a folder whose server is away, within a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def within(limit_s: float, work: Callable[[], T]) -> T:
    """The result of `work`, or what it raises; TimeoutError where it takes longer, with its thread left behind."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # raised by whoever waits
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(timeout=limit_s)
