"""Everything that talks to torch.distributed (the torch.distributed door).

A process group has two halves: gloo for what lives on the CPU (flags, names, errors) and, on GPUs, nccl for tensors.
With a single process every function is the identity, so callers never ask whether they are distributed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.errors import EnvironmentFault, RddmError, TrainingFault
from data_pipeline.retry import one_line
from rddm_dist.limits import within

T = TypeVar("T")

LINK_ADVICE = (
    "open the firewall between the nodes, and name the interface that they share with GLOO_SOCKET_IFNAME (on GPUs "
    "NCCL_SOCKET_IFNAME too), e.g. eth0"
)
ROLL_CALL_S = 0.1
TOLD_EVERY_S = 10.0
LAST_WORDS_S = 3.0  # for the others to hear why there will be no group


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


def initialize(topology: Topology, *, timeout_s: float = 1800.0, store: dist.Store | None = None) -> None:
    """Join the process group, unless a launcher already did. A single process makes a group of its own.

    store: where workers meet; by default as the environment says.
    """
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
    _check_env()
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=timeout
        )


def _check_env() -> None:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise EnvironmentFault(f"several workers need {', '.join(missing)} in the environment; start with torchrun")


def assemble(
    topology: Topology, *, name: str, wait_s: float, timeout_s: float, tell: Callable[[str], None] = lambda text: None
) -> None:
    """Join the process group as `initialize` does, and find out who does not come.

    name: of this worker's machine; wait_s: for all to come; timeout_s: of the group; tell: hears who is waited for, on
    rank 0. Raises EnvironmentFault on every worker that did come, which says who is missing and what to look at.
    """
    if topology.world_size == 1:
        initialize(topology, timeout_s=timeout_s)
        return
    _check_env()
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    store = _open_store(topology, name=name, place=place, wait_s=wait_s)
    _call_the_roll(store, topology, name=name, wait_s=wait_s, tell=tell)
    try:
        initialize(topology, timeout_s=wait_s, store=dist.PrefixStore("group", store))
        # A group's one limit holds for joining it, too; there is no public call that sets it later.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise EnvironmentFault(
            f"{name}: all workers came to {place}, but they do not reach each other ({one_line(error)[:300]}); "
            f"{LINK_ADVICE}"
        ) from error


def _open_store(topology: Topology, *, name: str, place: str, wait_s: float) -> dist.TCPStore:
    host, _, port = place.rpartition(":")
    # torchrun keeps one there itself, unless it was told otherwise.
    is_ours = topology.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_ours:
        reason = _knock(host, int(port), wait_s=wait_s)
        if reason:
            raise EnvironmentFault(
                f"{name}: worker {topology.rank} did not reach the first worker at {place} within {wait_s:.0f} s "
                f"({reason}); is that worker running there? If so, {LINK_ADVICE}"
            )
    limit = timedelta(seconds=wait_s)
    try:
        # It waits for ever for the answer of somebody else who listens there.
        return within(
            wait_s + LAST_WORDS_S,
            lambda: dist.TCPStore(
                host, int(port), is_master=is_ours, timeout=limit, wait_for_workers=False, multi_tenant=True
            ),
        )
    except (RuntimeError, TimeoutError) as error:
        raise EnvironmentFault(
            f"{name}: worker {topology.rank} cannot use {place} ({one_line(error)[:300]}); MASTER_ADDR must be an "
            "address of the first worker's machine and MASTER_PORT a port that is free there: choose another port"
        ) from error


def _knock(host: str, port: int, *, wait_s: float) -> str:
    """Wait until somebody listens there; torch would print pages while it waits.   -> why nobody does"""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())):
                return ""
        except OSError as error:
            if time.monotonic() > deadline:
                return one_line(error)
        time.sleep(ROLL_CALL_S)


def _call_the_roll(
    store: dist.TCPStore, topology: Topology, *, name: str, wait_s: float, tell: Callable[[str], None]
) -> None:
    """Wait until every worker has written its name. The first worker tells the others how it went."""
    store.set(f"name/{topology.rank}", name)
    if topology.rank:
        try:
            store.wait(["verdict"], timedelta(seconds=wait_s + 2 * LAST_WORDS_S))
            verdict = store.get("verdict").decode()
            store.add("heard", 1)
        except RuntimeError as error:
            raise EnvironmentFault(
                f"{name}: the first worker fell silent ({one_line(error)[:300]}); see its output"
            ) from error
    else:
        absent = _wait_for_names(store, topology.world_size, wait_s=wait_s, tell=tell)
        verdict = _who_is_missing(store, topology.world_size, absent, wait_s=wait_s) if absent else "complete"
        store.set("verdict", verdict)
        deadline = time.monotonic() + LAST_WORDS_S
        # Whatever it does next, this process may end at once, and the store with it: all must have heard before.
        while store.add("heard", 0) < topology.world_size - 1 - len(absent) and time.monotonic() < deadline:
            time.sleep(ROLL_CALL_S)
    if verdict != "complete":
        fault = EnvironmentFault(verdict)
        fault.is_shared = True
        raise fault


def _wait_for_names(store: dist.TCPStore, world_size: int, *, wait_s: float, tell: Callable[[str], None]) -> list[int]:
    """The ranks that have not come when the time is over."""
    started = time.monotonic()
    next_line = started + TOLD_EVERY_S
    absent = list(range(world_size))
    while True:
        absent = [rank for rank in absent if not store.check([f"name/{rank}"])]
        now = time.monotonic()
        if not absent or now - started > wait_s:
            return absent
        if now > next_line:
            next_line = now + TOLD_EVERY_S
            tell(f"waiting for worker {ranges(absent)} of 0-{world_size - 1}, {wait_s - (now - started):.0f} s more")
        time.sleep(ROLL_CALL_S)


def _who_is_missing(store: dist.TCPStore, world_size: int, absent: Sequence[int], *, wait_s: float) -> str:
    there: dict[str, list[int]] = {}
    for rank in sorted(set(range(world_size)) - set(absent)):
        there.setdefault(store.get(f"name/{rank}").decode(), []).append(rank)
    came = ", ".join(f"{ranges(ranks)} on {name}" for name, ranks in there.items())
    return (
        f"{len(absent)} of {world_size} workers did not come within {wait_s:.0f} s: {ranges(absent)} (here: {came}); "
        f"see what the missing ones printed; if they could not reach this node, {LINK_ADVICE}"
    )


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers in short, e.g. 0-3, 8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


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


def meeting_times(rounds: int) -> list[tuple[float, float]]:
    """This machine's clock before and after each of several meetings: nobody leaves one before all have come."""
    times = []
    for _ in range(rounds):
        before = time.time()
        meet()
        times.append((before, time.time()))
    return times


def measure_all_reduce(*, num_bytes: int, rounds: int, on_gpu: bool, device: torch.device, wait_s: float) -> float:
    """Seconds that an all-reduce of so many bytes of float32 takes, the median of `rounds`.

    on_gpu: through nccl, on `device`; else through gloo. wait_s: for each round. Raises EnvironmentFault when it fails,
    or when the sum is wrong.
    """
    place = device if on_gpu else torch.device("cpu")
    values = torch.empty(num_bytes // 4, dtype=torch.float32, device=place)
    expected = world_size() * (world_size() + 1) / 2
    seconds = []
    try:
        for _ in range(rounds + 1):
            values.fill_(rank() + 1)
            _synchronize(place)
            started = time.monotonic()
            dist.all_reduce(values, async_op=True).wait(timedelta(seconds=wait_s))
            _synchronize(place)
            seconds.append(time.monotonic() - started)
    except RuntimeError as error:
        raise EnvironmentFault(one_line(error)[:300]) from error
    if not bool((values == expected).all()):
        raise EnvironmentFault(f"the sum over {world_size()} workers is wrong: {values[0].item():g}, not {expected:g}")
    return statistics.median(seconds[1:])  # the first one makes the connections


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def exchange_object(value: T) -> list[T]:
    """Every worker's value, by rank, on every worker."""
    if _alone():
        return [value]
    boxes: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes


@contextlib.contextmanager
def naming_losses(name: str) -> Iterator[None]:
    """A block of exchanges: where another worker is lost meanwhile, a TrainingFault (exit code 1: trying again may
    help). name: of this machine."""
    try:
        yield
    except RuntimeError as error:
        raise TrainingFault(
            f"{name}: worker {rank()} lost the others ({one_line(error)[:300]}); see what they printed; if they are "
            f"well, {LINK_ADVICE}"
        ) from error


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
    boxes = exchange_object(payload)
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
