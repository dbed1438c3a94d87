"""Connect to a Ray cluster, or start one on this machine for the duration of a command."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray

from data_pipeline.errors import EnvironmentFault

log = logging.getLogger(__name__)

LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


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


def require_resources(*, cpus: float, gpus: float) -> None:
    """Refuse a request that the cluster can never grant, instead of waiting for ever."""
    have = ray.cluster_resources()
    if have.get("CPU", 0.0) < cpus or have.get("GPU", 0.0) < gpus:
        raise EnvironmentFault(
            f"the Ray cluster has {have.get('CPU', 0):.0f} CPUs and {have.get('GPU', 0):.0f} GPUs, the job asks for "
            f"{cpus:.0f} and {gpus:.0f}; lower --workers, --actors or --gpus-per-worker, or add nodes"
        )


def quiet_ray_data() -> None:
    """No progress bars of its own, and its log records only into the file it keeps in Ray's session folder."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logger = logging.getLogger("ray.data")
    for handler in list(logger.handlers):
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
    logger.propagate = False
