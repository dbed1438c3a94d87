"""Workers for pools of Ray actors: they tell in a folder what they did, and fail in the way a unit asks for.

As a program, `python -m tests.support.ray_probe FOLDER`: a pool on a cluster whose second node comes late and is lost.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from data_pipeline.errors import ModelError


class _OwnError(ModelError):
    """A kind of ModelError that only this module knows."""


def unit(number: int, **asks: Any) -> bytes:
    """A unit of work: its number, and what the worker shall do with it (see make_worker)."""
    return json.dumps({"number": number, **asks}).encode()


def number_of(result: bytes) -> int:
    """The number of the unit that gave this result."""
    return int(np.frombuffer(result[:8], np.int64)[0])


def make_worker(folder: str, *, fails: str = "") -> Callable[[bytes], bytes]:
    """A worker that leaves an empty file NUMBER.PID.RANDOM in `folder` whenever it starts a unit.

    A unit may ask for: sleep (s), kilobytes (of its result, default 0), die_times (kills its process, so many times in
    all), user_error or bug (a text to raise). `fails`: "make" raises a ModelError here, "die" kills the process here.
    """
    place = Path(folder)
    (place / f"made.{os.getpid()}.{uuid.uuid4().hex}").touch()
    if fails == "make":
        raise ModelError("no such model: give another path")
    if fails == "die":
        os.kill(os.getpid(), signal.SIGKILL)

    def work(data: bytes) -> bytes:
        asks = json.loads(data)
        number = int(asks["number"])
        (place / f"{number}.{os.getpid()}.{uuid.uuid4().hex}").touch()
        if asks.get("die_times") and starts(folder)[number] <= asks["die_times"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if asks.get("user_error"):
            raise _OwnError(asks["user_error"])
        if asks.get("bug"):
            raise ZeroDivisionError(asks["bug"])
        time.sleep(asks.get("sleep", 0.0))
        return np.int64(number).tobytes() + bytes(1024 * asks.get("kilobytes", 0))

    return work


def starts(folder: str | Path) -> Counter[int]:
    """How often each unit was started, by number."""
    return Counter(int(path.name.split(".")[0]) for path in Path(folder).glob("[0-9]*.*"))


def _units_of(folder: str, workers: set[int]) -> list[int]:
    """The numbers of the units that these processes started."""
    names = [path.name.split(".") for path in Path(folder).glob("[0-9]*.*")]
    return sorted(int(number) for number, process, _ in names if int(process) in workers)


def processes(folder: str | Path) -> set[int]:
    """The ids of the processes that made a worker."""
    return {int(path.name.split(".")[1]) for path in Path(folder).glob("made.*")}


def node_comes_and_goes(folder: str) -> dict[str, Any]:
    """Run 12 units on two actors, one per node: the second node comes after they are asked for, and is lost midway.

    -> the numbers of the results, those of the two units that the second node had started, and how often each was.
    """
    os.environ["RAY_NODE_TYPE_NAME"] = "workers"  # as a cluster does that adds nodes by itself
    import ray
    from ray.cluster_utils import Cluster

    from cluster.ray_pool import run_on_actors

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    # Results too large to travel with the reply: those of the lost node are lost with it, unless they were fetched.
    units = [unit(number, sleep=1.5, kilobytes=300) for number in range(12)]
    numbers: list[int] = []

    def read() -> None:
        results = run_on_actors(make_worker, {"folder": folder}, units, actors=(2, 2))
        numbers.extend(map(number_of, results))

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    time.sleep(2.0)
    late = cluster.add_node(**node)
    raylet = psutil.Process(late.all_processes["raylet"][0].process.pid)
    while len(started := _units_of(folder, {child.pid for child in raylet.children(recursive=True)})) < 2:
        time.sleep(0.05)
    cluster.remove_node(late, allow_graceful=False)
    reading.join()
    ray.shutdown()
    cluster.shutdown()
    return {"numbers": numbers, "late": started, "starts": sorted(starts(folder).items())}


if __name__ == "__main__":
    print(json.dumps(node_comes_and_goes(sys.argv[1])))
