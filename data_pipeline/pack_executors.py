"""Who does the jobs of a pack: threads, processes, or whatever else maps a function over them in order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from data_pipeline.errors import EnvironmentFault

Job = TypeVar("Job")
Result = TypeVar("Result")

# Image codecs and hashes release the GIL: two threads pack as fast as two processes. With more cores the rest of the
# work gets in the way, and from here on the two seconds in which a process starts are a small part of the whole.
PROCESS_BYTES = 256 << 20


class Executor(Protocol):
    """Maps a function of the top level of a module over picklable jobs."""

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job], /) -> Iterator[Result]:
        """Results in the order of the jobs; the first error is raised."""
        ...


def choose_executor(files: Iterable[Path], out: str, *, jobs: int) -> AbstractContextManager[Executor]:
    """Processes where the source files are more than PROCESS_BYTES together, else threads.

    jobs: how many, 0 for one per core. A dataset on memory:// is of this process and wants threads.
    """
    jobs = jobs or os.cpu_count() or 1
    if jobs > 1 and not out.startswith("memory://") and _is_more(files, PROCESS_BYTES):
        return processes(jobs)
    return threads(jobs)


@contextmanager
def threads(jobs: int) -> Iterator[Executor]:
    """`jobs` threads. Leaving waits for the jobs that run and drops the others."""
    executor = ThreadPoolExecutor(jobs, thread_name_prefix="pack")
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def processes(jobs: int) -> Iterator[Executor]:
    """`jobs` new processes. They end with this one, however it ends; leaving by an error ends them in mid-job.

    Raises EnvironmentFault when one of them dies. A script that calls this must be importable (spawn): what it does
    belongs below `if __name__ == "__main__"`.
    """
    context = get_context("spawn")
    alive, lifeline = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(alive,))
    try:
        yield executor
    except BrokenProcessPool as error:
        lifeline.close()
        raise EnvironmentFault(
            "a packing process died, perhaps for want of memory; lower --jobs and run the same command again"
        ) from error
    except BaseException:
        lifeline.close()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        lifeline.close()
        alive.close()


def _start_worker(alive: Connection) -> None:
    # Ctrl-C reaches the whole process group; what becomes of the work is decided by the one that handed it out.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    torch.set_num_threads(1)  # every core has a process already


def _end_with_parent(alive: Connection) -> None:
    alive.poll(None)  # nothing is ever sent: it becomes readable when the other end is closed
    os._exit(1)


def _is_more(files: Iterable[Path], limit: int) -> bool:
    """Whether the files have more than `limit` bytes; stops looking when it knows."""
    total = 0
    for path in files:
        with suppress(OSError):  # of one that cannot be looked at, which is named when it is read
            total += path.stat().st_size
        if total > limit:
            return True
    return False
