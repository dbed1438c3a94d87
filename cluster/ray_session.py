"""Connect to a Ray cluster, or start one on this machine for the duration of a command."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray

from data_pipeline.errors import EnvironmentFault

log = logging.getLogger(__name__)

LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
NODE_GROUP_LABEL = "ray.io/node-group"


@contextlib.contextmanager
def ray_session(*, cpus: int) -> Iterator[None]:
    """Use the cluster that RAY_ADDRESS names (set inside a Ray job), else a local one with at least `cpus` CPUs.

    A session inside a session shares it. Only the one who started a local cluster ends it.
    """
    if ray.is_initialized():
        yield
        return
    local: dict[str, Any] = {
        "address": "local",
        "num_cpus": max(cpus, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
    }
    try:
        with _quiet_core():
            ray.init(
                log_to_driver=False, logging_level=logging.ERROR, **({} if os.environ.get("RAY_ADDRESS") else local)
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EnvironmentFault(f"cannot start or reach Ray: {' '.join(str(error).split())[:300]}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet_core() -> Iterator[None]:
    """Keep Ray's C++ core off this console; what matters of it is in Ray's session folder.

    It even announces that it was told to be quiet, straight to file descriptor 2.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def actors_that_fit(nodes: Iterable[Mapping[str, float]], *, cpus: float, gpus: float) -> int:
    """How many actors of `cpus` CPUs and `gpus` GPUs nodes with these resources hold; an actor is on one node."""
    return sum(
        int(min(node.get("CPU", 0.0) / cpus if cpus else math.inf, _gpu_places(node.get("GPU", 0.0), gpus)))
        for node in nodes
    )


def _gpu_places(have: float, gpus: float) -> float:
    if not gpus:
        return math.inf
    # A fraction of a GPU is of one GPU: three actors of 0.3 on each, however many there are.
    return have // gpus if gpus >= 1 else int(have) * int(1 / gpus + 1e-9)


def require_actors(count: int, *, cpus: float, gpus: float) -> int:
    """How many actors of `cpus` CPUs and `gpus` GPUs each the nodes that are there can hold, when nobody else is.

    EnvironmentFault if fewer than `count`, unless the cluster may grow.
    """
    remedy = "lower --actors, --gpus-per-actor or the threads of an actor, or add nodes"
    return _require_room(count, cpus=cpus, gpus=gpus, who="actors", remedy=remedy)


def require_workers(count: int, *, cpus: float, gpus: float) -> None:
    """EnvironmentFault where the cluster can never hold so many workers of `cpus` CPUs and `gpus` GPUs each."""
    remedy = "lower --workers, --cpus-per-worker or --gpus-per-worker, or add nodes"
    _require_room(count, cpus=cpus, gpus=gpus, who="workers", remedy=remedy)


def _require_room(count: int, *, cpus: float, gpus: float, who: str, remedy: str) -> int:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    room = actors_that_fit((node["Resources"] for node in nodes), cpus=cpus, gpus=gpus)
    if room < count and not may_grow(node["Labels"] for node in nodes):
        raise EnvironmentFault(
            f"the Ray cluster has room for {room} {who} of {cpus:g} CPUs and {gpus:g} GPUs, the job asks for {count}; "
            f"{remedy}"
        )
    return room


def may_grow(labels: Iterable[Mapping[str, str]]) -> bool:
    """Whether a cluster whose nodes have these labels may grow.

    Nodes that were started by node groups (KubeRay, `ray up`) say so by Ray's label of their group.
    """
    return any(NODE_GROUP_LABEL in node for node in labels)


def quiet_raylets() -> None:
    """Nothing on standard output of what raylets say of processes that died: long lines, whatever log_to_driver is."""
    import ray._private.worker

    # It has no public switch, this is the one that Ray's debugger uses.
    ray._private.worker._worker_logs_enabled = False


def quiet_ray_data() -> None:
    """No progress bars of its own, and its log records only into the file it keeps in Ray's session folder. Nor what
    raylets say."""
    import ray.data

    quiet_raylets()
    ray.data.DataContext.get_current().enable_progress_bars = False
    logger = logging.getLogger("ray.data")
    for handler in list(logger.handlers):
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
    logger.propagate = False
