"""Single ranks of a large group in one process: what each holds, a group of absent others, counted requests."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from data_pipeline.errors import EnvironmentFault
from data_pipeline.retry import DEFAULT_RETRY, RetryPolicy
from rddm_dist.comm import Topology
from rddm_dist.config import EmaSection, EngineSection, OptimSection
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.ema import Ema, profiles
from rddm_dist.training.engine import MOMENTS, Engine, Piece
from rddm_dist.training.fragments import Request, Snapshot
from rddm_dist.training.plan import make_plan
from rddm_dist.training.saving import Saver, Series

Shapes = Mapping[str, tuple[int, ...]]


class Extent(NamedTuple):
    """Elements [start, start + numel) of a flattened parameter."""

    name: str
    start: int
    numel: int


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of a group whose other ranks do not exist: collectives return at once, with nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        deepspeed = sys.modules.get("deepspeed")  # keeps groups of its own, which go only this way
        (deepspeed.comm if deepspeed and deepspeed.comm.is_initialized() else dist).destroy_process_group()


# -- who holds what ----------------------------------------------------------------------------------------------------


def layout(shapes: Shapes, *, stage: int, rank: int, world_size: int) -> list[Extent]:
    """What a rank holds of the fp32 weights at a ZeRO stage, without DeepSpeed, which takes seconds per rank.

    Stage 3 cuts every parameter into equal parts; stages 1 and 2 the row of all parameters, into parts of an even
    number of elements; at stage 0 rank 0 writes everything. `real_layout` says the same.
    """
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    if stage == 0:
        return [Extent(name, 0, numel) for name, numel in sizes.items()] if rank == 0 else []
    if stage == 3:
        parts = [(name, numel, -(-numel // world_size)) for name, numel in sizes.items()]
        own = [Extent(name, rank * width, min(width, numel - rank * width)) for name, numel, width in parts]
        return [extent for extent in own if extent.numel > 0]
    width = -(-sum(sizes.values()) // (2 * world_size)) * 2
    extents, begin = [], 0
    for name, numel in sizes.items():
        low, high = max(begin, rank * width), min(begin + numel, (rank + 1) * width)
        if low < high:
            extents.append(Extent(name, low - begin, high - low))
        begin += numel
    return extents


def real_layout(net: nn.Module, *, stage: int, rank: int, world_size: int) -> list[Extent]:
    """What the engine holds as a rank of a large group: DeepSpeed itself, alone."""
    plan = make_plan(global_batch=world_size, world_size=world_size, micro_batch=1)
    place = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    before = dict(os.environ)
    os.environ.update({**place, "MASTER_PORT": "1"})  # DeepSpeed looks them up, and connects to nothing
    try:
        with as_rank(rank, world_size):
            engine = Engine(
                net,
                engine=EngineSection(zero_stage=stage),  # type: ignore[arg-type]
                optim=OptimSection(),
                plan=plan,
                topology=Topology(rank, world_size),
            )
            extents = [Extent(piece.name, piece.start, piece.numel) for piece in engine.pieces]
            engine.close()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return extents


def held(weights: Mapping[str, Tensor], extents: Iterable[Extent]) -> tuple[list[Piece], Ema]:
    """Pieces with moments, and the published average, as a rank keeps them. All are views of the same weights.

    weights: parameter -> (numel,) float32
    """
    views = [(extent, weights[extent.name][extent.start : extent.start + extent.numel]) for extent in extents]
    pieces = tuple(Piece(extent.name, extent.start, view, dict.fromkeys(MOMENTS, view)) for extent, view in views)
    return list(pieces), Ema(pieces, profiles(EmaSection()), (tuple(view for _, view in views),))


def requests_of(extents: Iterable[Extent]) -> list[Request]:
    """What a rank reads from a checkpoint when a run goes on: memory of its own for each of its pieces."""
    kinds = (ckpt.WEIGHT, *MOMENTS, ckpt.EMA)
    return [Request(torch.empty(e.numel), kind, e.name, e.start) for e in extents for kind in kinds]


# -- saving as all ranks, one after the other --------------------------------------------------------------------------


@dataclass
class Timeline:
    """When things happened in a save by rank 0, by the clock of the caller: its own file written, all receipts read,
    COMMIT.json written."""

    clock: Callable[[], float]
    written: float = 0.0
    gathered: float = 0.0
    committed: float = 0.0


class _TimedSnapshot(Snapshot):
    """Notes when it has been written."""

    timeline: Timeline

    def write(self, uri: str, *, retry: RetryPolicy = DEFAULT_RETRY) -> str:
        digest = super().write(uri, retry=retry)
        self.timeline.written = self.timeline.clock()
        return digest


def save_as_all(
    folder: str, weights: Mapping[str, Tensor], shapes: Shapes, *, stage: int, world_size: int, timeline: Timeline
) -> str:
    """A checkpoint of step 1 by `world_size` ranks, each through its own Saver, rank 0 last.   -> its location"""
    progress = ckpt.Progress(1, world_size, 1, "", "", world_size, stage)
    for rank in reversed(range(world_size)):
        pieces, ema = held(weights, layout(shapes, stage=stage, rank=rank, world_size=world_size))
        snapshot = _TimedSnapshot(ckpt.sources(pieces, ema))
        snapshot.timeline = timeline

        def note_gathered() -> None:
            timeline.gathered = timeline.gathered or timeline.clock()

        def note_committed(step: int) -> None:
            timeline.committed = timeline.clock()

        with as_rank(rank, world_size):
            saver = Saver(
                shapes=shapes,
                session="scaling",
                writers=world_size,
                max_failures=1,
                retry=DEFAULT_RETRY,
                guard=note_gathered,
                before_commit=lambda: None,
                on_saved=lambda saved: None,
                on_failed=lambda step, reason, failures: None,
            )
            saver.start(progress, [Series(folder, snapshot, after=note_committed)])
            saver.close()
    if not timeline.committed:
        raise EnvironmentFault(f"a save by {world_size} ranks in {folder} came to nothing; is there room?")
    return ckpt.step_folder(folder, 1)


# -- counting ----------------------------------------------------------------------------------------------------------


@dataclass
class Requests:
    """Requests that a server has answered, by method; `take` starts anew."""

    counts: Counter[str] = field(default_factory=Counter)

    def take(self) -> int:
        total = self.counts.total()
        self.counts.clear()
        return total


@contextmanager
def counting_s3(bucket: str) -> Iterator[Requests]:
    """A real S3 server in this process that counts requests, and the environment that leads to it, until the end."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are used again

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Say nothing."""

    requests, answer = Requests(), DomainDispatcherApplication(create_backend_app)

    def count(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        requests.counts[environ["REQUEST_METHOD"]] += 1
        return answer(environ, start_response)

    server = make_server("127.0.0.1", 0, count, threaded=True, request_handler=Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = dict(os.environ)
    os.environ.update(
        AWS_ACCESS_KEY_ID="none",
        AWS_SECRET_ACCESS_KEY="none",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.server_port}",
        AWS_EC2_METADATA_DISABLED="true",
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    )
    try:
        import boto3

        boto3.client("s3").create_bucket(Bucket=bucket)
        requests.take()
        yield requests
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.shutdown()
        server.server_close()


class FileReads:
    """Files below a folder that this process opens, and bytes that it reads, between `start` and `stop`. Linux only.

    Python's audit hooks cannot be removed again, so one watches for as long as the process lives.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._opened, self._is_on, self._read = str(folder), set[str](), False, 0
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_on and event == "open" and str(arguments[0]).startswith(self._folder):
            self._opened.add(str(arguments[0]))

    def start(self) -> None:
        self._opened, self._is_on, self._read = set(), True, self._bytes()

    def stop(self) -> tuple[int, int]:
        """-> (files opened, bytes read)"""
        self._is_on = False
        return len(self._opened), self._bytes() - self._read

    @staticmethod
    def _bytes() -> int:
        values = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(values["rchar"])
