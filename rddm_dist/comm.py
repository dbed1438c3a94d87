"""Everything that talks to torch.distributed (the torch.distributed door).

A process group has two halves: gloo for what lives on the CPU (flags, names, errors) and, on GPUs, nccl for tensors.
With a single process every function is the identity, so callers never ask whether they are distributed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.errors import EnvironmentFault, RddmError

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """Where this process stands among the workers."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def device(self) -> torch.device:
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


def topology_from_env() -> Topology:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE as torchrun and Ray Train set them; one process if unset."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return Topology(
        rank=int(os.environ.get("RANK", "0")),
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))),
    )


def initialize(topology: Topology, *, timeout_s: float = 1800.0) -> None:
    """Join the process group, unless a launcher already did. A single process makes a group of its own."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if topology.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if topology.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        # DeepSpeed looks these up even for a group that exists already.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(name, value)
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise EnvironmentFault(f"several workers need {', '.join(missing)} in the environment; start with torchrun")
    dist.init_process_group(backend, timeout=timeout)


def leave(code: int) -> NoReturn:
    """End this worker's process with an exit code.

    Threads of gloo that outlive the group abort an interpreter that takes itself down in the usual way now and then
    ("terminate called without an active exception"), after all work is done; so it does not.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_floats(values: Sequence[float]) -> list[float]:
    """Element-wise sum over all workers, in float64. The step's one collective."""
    if _alone():
        return [float(value) for value in values]
    packed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(packed)
    return packed.tolist()


def broadcast_object(value: T | None) -> T:
    """Rank 0's value on every worker (small, trusted: pickled within the job)."""
    if _alone():
        return value  # type: ignore[return-value]
    box: list[T | None] = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def gather_object(value: T) -> list[T] | None:
    """Every worker's value, by rank, on rank 0; None elsewhere."""
    if _alone():
        return [value]
    boxes: list[T] | None = [value] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, boxes, dst=0)
    return boxes


def raise_together(error: BaseException | None) -> None:
    """Raise on every worker when one failed: its own error where there is one, else the first one that others met.

    Call it where all ranks meet after doing something that may fail on one of them; nobody is left in a collective.
    """
    if _alone():
        if error is not None:
            raise error
        return
    payload = None
    if error is not None:
        kept = error if isinstance(error, RddmError) else RuntimeError(f"{type(error).__name__}: {error}")
        if isinstance(kept, RddmError):
            kept.is_shared = True
        payload = pickle.dumps(kept)
    boxes: list[bytes | None] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, payload)
    if error is not None:
        raise error
    for box in boxes:
        if box is not None:
            raise pickle.loads(box)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that may fail on some workers, without collectives in it: all meet at its end and raise together.

    An OSError becomes an EnvironmentFault.
    """
    error: Exception | None = None
    try:
        yield
    except OSError as problem:
        error = EnvironmentFault(str(problem))
    except Exception as problem:  # raised below, on every worker
        error = problem
    raise_together(error)


def meet() -> None:
    """Wait for all workers."""
    sum_floats([0.0])
