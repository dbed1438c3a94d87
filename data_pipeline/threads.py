"""Threads that map in order and hold few results at a time. Decoding, hashing and numpy release the GIL."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from data_pipeline.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ordered(function: Callable[[Item], Result], items: Iterable[Item], *, jobs: int) -> Iterator[Result]:
    """The results of `function` in the order of `items`, whatever the number of threads.

    jobs: threads, 0 for one per core. At most 2 * jobs + 1 results wait; an error stops what has not begun.
    Raises ConfigError for jobs below 0.
    """
    if jobs < 0:
        raise ConfigError(f"--jobs={jobs} must be 0 (one per core) or more")
    jobs = jobs or os.cpu_count() or 1
    waiting: deque[Future[Result]] = deque()
    executor = ThreadPoolExecutor(jobs, thread_name_prefix="map")
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
