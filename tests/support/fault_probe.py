"""Run by the workers of a test: runs on storage that fails, and saves that are slow enough to be killed inside.

fault_probe.py runs CONFIG RUNS.json    RUNS: [{"name": run, "overrides": [...], "before": [action, ...],
                                        "at": {step: [action, ...]}}]; one after the other in one process, which saves
                                        the starts. Actions are taken by rank 0, those of a step before it is saved:
    ["fill", file, bytes]               fill the disk of a file but for so many bytes
    ["write", file], ["remove", file]
    ["await", uri]                      wait until it is there
Prints "RUN name exit-code message" for each on rank 0. A file of a save is tried for RETRY_S.

fault_probe.py slow CONFIG [override...]    `python -m rddm_dist.training`, whose every save takes about SLOW_SAVE_S
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from data_pipeline import storage
from data_pipeline.errors import RddmError
from data_pipeline.retry import RetryPolicy
from rddm_dist import comm
from rddm_dist.cli.torchrun import main
from rddm_dist.comm import Topology, topology_from_env
from rddm_dist.config import load_config
from rddm_dist.training import folder, fragments, keeper
from rddm_dist.training.run import Hooks, train
from tests.support.servers import wait_until

RETRY_S = 1.5
SLOW_SAVE_S = 0.6
PIECES = 20  # of a rank's file
FILL_BYTES = 1 << 16


def fill(file: str, leave: str) -> None:
    """Write zeros until the disk has no more than `leave` bytes."""
    with open(file, "wb", buffering=0) as ballast:
        disk = os.statvfs(file)
        while (excess := disk.f_bavail * disk.f_frsize - int(leave)) > 0:
            ballast.write(bytes(min(FILL_BYTES, excess)))
            disk = os.statvfs(file)


ACTIONS: dict[str, Callable[..., None]] = {
    "fill": fill,
    "write": lambda file: Path(file).touch(),
    "remove": lambda file: Path(file).unlink(),
    "await": lambda uri: wait_until(lambda: storage.exists(uri), timeout_s=20),
}


def take(actions: list[list[str]]) -> None:
    for name, *arguments in actions:
        ACTIONS[name](*arguments)


def run_one(config_path: str, run: dict[str, Any], topology: Topology) -> tuple[int, str]:
    """->  exit code, what was said"""

    def hear(record: dict[str, Any]) -> None:
        if record["event"] == "metrics":
            take(run.get("at", {}).get(str(record["step"]), []))

    config = load_config(config_path, [*run.get("overrides", []), f"run.name={run['name']}"])
    if topology.rank == 0:
        take(run.get("before", []))
    comm.meet()
    try:
        return train(config, topology, Hooks(hear)).exit_code, ""
    except RddmError as error:
        assert error.is_shared, "the others would wait"
        return error.exit_code, str(error)


def run_all(config_path: str, runs: Path) -> None:
    """Several runs, as RUNS says."""
    keeper.RETRY = RetryPolicy(deadline_s=RETRY_S, first_delay_s=0.05)
    folder.RETRY = RetryPolicy(deadline_s=4 * RETRY_S, first_delay_s=0.05)
    topology = topology_from_env()
    torch.set_num_threads(1)
    comm.initialize(topology)
    for each in json.loads(runs.read_text()):
        code, said = run_one(config_path, each, topology)
        if topology.rank == 0:
            print(f"RUN {each['name']} {code} {said}", flush=True)
    comm.leave(0)


class SlowDigest:
    """sha256 that takes its time, and with it the file that is written and hashed piece by piece."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.hexdigest = self._digest.hexdigest

    def update(self, piece: bytes) -> None:
        self._digest.update(piece)
        time.sleep(SLOW_SAVE_S / 2 / PIECES)


def write_slowly(replacing: Callable[[Path], contextlib.AbstractContextManager[BinaryIO]]) -> Any:
    """Receipts and COMMIT.json lie half written and complete beside their place before they get there."""

    @contextlib.contextmanager
    def slowly(path: Path) -> Iterator[BinaryIO]:
        with replacing(path) as file:
            write = file.write

            def write_halves(data: bytes) -> None:
                write(data[: len(data) // 2])
                file.flush()
                time.sleep(SLOW_SAVE_S / 8)
                write(data[len(data) // 2 :])
                file.flush()
                time.sleep(SLOW_SAVE_S / 8)

            yield SimpleNamespace(write=write_halves)  # type: ignore[misc]

    return slowly


def run_slowly(config_path: str, overrides: list[str]) -> None:
    """One run, the way torchrun starts it."""
    take_copy = fragments.Snapshot.take

    def take_and_divide(snapshot: fragments.Snapshot) -> None:
        take_copy(snapshot)
        fragments.WRITE_BYTES = snapshot.num_bytes // PIECES + 1

    fragments.Snapshot.take = take_and_divide  # type: ignore[method-assign, assignment]
    fragments.hashlib = SimpleNamespace(sha256=SlowDigest)  # type: ignore[assignment]
    storage._replacing = write_slowly(storage._replacing)
    sys.argv = ["rddm_dist.training", config_path, *overrides]
    main()


if __name__ == "__main__":
    if sys.argv[1] == "runs":
        run_all(sys.argv[2], Path(sys.argv[3]))
    else:
        run_slowly(sys.argv[2], sys.argv[3:])
