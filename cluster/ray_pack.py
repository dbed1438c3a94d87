"""Packing on Ray: the jobs of `data_pipeline.pack` as Ray Data tasks."""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray.data
from ray.exceptions import RayError, RayTaskError, UserCodeException
from ray.util.annotations import RayDeprecationWarning

from cluster.ray_session import quiet_ray_data, ray_session
from data_pipeline import errors
from data_pipeline.errors import EnvironmentFault, RddmError, kind_of
from data_pipeline.pack_executors import Executor

Job = TypeVar("Job")
Result = TypeVar("Result")

MAX_BLOCKS = 2000  # a block holds one job, or several where there are very many
MAX_RETRIES = 3  # of a task whose process or node died; Ray Data itself would try for ever


class _RayExecutor:
    """A pack_executors.Executor: each job is a row of a Ray Data dataset, mapped by tasks of one CPU."""

    def __init__(self, jobs: int) -> None:
        self._concurrency = jobs or None

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job], /) -> Iterator[Result]:
        """Results in the order of the jobs; the first error that comes back is raised.

        Raises EnvironmentFault for a task that died again and again.
        """
        rows = [{"number": number, "job": pickle.dumps((function, job))} for number, job in enumerate(jobs)]
        if not rows:
            return
        early: dict[int, Result] = {}
        following = 0
        for row in _mapped(rows, self._concurrency):
            if row["error"]:
                name, _, text = row["error"].partition(":")
                raise getattr(errors, name)(text)
            early[row["number"]] = pickle.loads(row["result"])
            while following in early:
                yield early.pop(following)
                following += 1


@contextlib.contextmanager
def ray_tasks(jobs: int = 0) -> Iterator[Executor]:
    """Ray Data tasks on the cluster that RAY_ADDRESS names, else on a local one; at most `jobs` at once, 0: no limit.

    Every node must see source files and dataset under the same absolute paths or URLs.
    """
    os.environ.setdefault("RAY_task_oom_retries", str(MAX_RETRIES))  # which Ray counts apart, and read when it starts
    with ray_session(cpus=jobs or 1):
        quiet_ray_data()
        yield _RayExecutor(jobs)


def _mapped(rows: list[dict[str, Any]], concurrency: int | None) -> Iterator[dict[str, Any]]:
    """What _run makes of the rows, in any order."""
    blocks = min(len(rows), MAX_BLOCKS)
    at_once = None if concurrency is None else min(concurrency, blocks)
    with warnings.catch_warnings():
        # Ray Data has no other way yet to say how often a task is tried.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = ray.data.from_items(rows, override_num_blocks=blocks).map(
            _run, concurrency=at_once, max_retries=MAX_RETRIES
        )
    try:
        yield from dataset.iter_rows()
    except (RayTaskError, UserCodeException):
        raise  # a bug in a job: its traceback counts
    except RayError as error:
        raise EnvironmentFault(
            f"packing on Ray failed ({type(error).__name__}), after {MAX_RETRIES} retries where a task died, perhaps "
            "for want of memory; lower --jobs or mend the cluster, then run the same command again"
        ) from error


def _run(row: dict[str, Any]) -> dict[str, Any]:
    function, job = pickle.loads(row["job"])  # from the driver, as the code is
    try:
        return {"number": row["number"], "result": pickle.dumps(function(job)), "error": ""}
    except RddmError as error:
        # Told in one line by whoever asked; Ray would wrap it in its own and print both.
        return {"number": row["number"], "result": b"", "error": f"{kind_of(error)}:{error}"}
