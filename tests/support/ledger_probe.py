"""Run by the workers of a test: runs one after the other in one process, each with a ledger of the samples it used.

ledger_probe.py CONFIG ACTIONS.json LEDGERS

ACTIONS: [{"copy": [folder or URL, folder or URL]}, {"attempt": its name, "overrides": [...], "term_at": step,
"kill_at": step, "after_commit": step}, ...]. At the metrics of step term_at rank 0 sends itself SIGTERM; after step
kill_at all workers wait for the checkpoint of step after_commit and send themselves SIGKILL.
LEDGERS/<attempt>-<rank>.jsonl gets, of rank 0, {"start": step the run goes on from} and, of all, after each step
{"step": 1, 2, ..., "loss": of the global batch, "rows": [[position, sample key, sha256 of the pixels]] with weight 1}.
Prints "RUN attempt exit-code" on rank 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from data_pipeline import storage
from data_pipeline.batch import Batch
from rddm_dist import comm
from rddm_dist.comm import Topology, topology_from_env
from rddm_dist.config import Config, load_config
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training import run
from rddm_dist.training.folder import run_folder
from rddm_dist.training.step import StepResult, train_step

COMMIT_LIMIT_S = 60.0


def copy_tree(source: str, target: str) -> None:
    """Copy a folder with all below it, between any two storages."""
    for name in storage.list_names(source):
        content = None
        try:
            content = storage.read_bytes(storage.join(source, name))
        except IsADirectoryError:
            copy_tree(storage.join(source, name), storage.join(target, name))
        if content is not None:
            storage.make_folder(target)
            storage.write_bytes_atomic(storage.join(target, name), content)


def rows_of(batch: Batch) -> list[tuple[int, str, str]]:
    """(position, sample key, sha256 of the pixels) of the rows that count."""
    assert batch.input is not None
    return [
        (int(batch.positions[row]), batch.keys[row], digest_of(batch.input[row], batch.target[row]))
        for row in range(len(batch.keys))
        if batch.weight[row] > 0
    ]


def digest_of(*images: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(image.contiguous().numpy().tobytes() for image in images)).hexdigest()


def write_line(ledger: TextIO, **entry: Any) -> None:
    ledger.write(json.dumps(entry) + "\n")
    ledger.flush()


def die(config: Config, committed: int) -> None:
    """Wait for a commit, then end this worker as a power cut would."""
    uri = ckpt.step_folder(run_folder(config).uri(ckpt.CHECKPOINTS), committed)
    deadline = time.monotonic() + COMMIT_LIMIT_S
    while not ckpt.is_committed(uri):
        assert time.monotonic() < deadline, f"{uri} was not committed in time"
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def attempt(config: Config, action: dict[str, Any], ledger: TextIO, here: Topology) -> int:
    """Train with a ledger.   -> exit code"""

    def step_and_record(engine: Any, schedule: Any, batch: Batch, **settings: Any) -> StepResult:
        result = train_step(engine, schedule, batch, **settings)
        write_line(ledger, step=batch.step + 1, loss=result.losses["loss"], rows=rows_of(batch))
        if batch.step + 1 == action.get("kill_at"):
            die(config, action["after_commit"])
        return result

    def hear(record: dict[str, Any]) -> None:
        if record["event"] in ("started", "resumed"):
            write_line(ledger, start=record["step"])
        if record["event"] == "metrics" and record["step"] == action.get("term_at"):
            os.kill(os.getpid(), signal.SIGTERM)

    run.train_step = step_and_record
    return run.train(config, here, run.Hooks(hear)).exit_code


def main(config_path: str, actions: str, ledgers: str) -> None:
    here = topology_from_env()
    torch.set_num_threads(1)
    comm.initialize(here)
    for action in json.loads(Path(actions).read_text()):
        if "copy" in action:
            with comm.together():
                if here.rank == 0:
                    copy_tree(*action["copy"])
            continue
        name = action["attempt"]
        with open(Path(ledgers) / f"{name}-{here.rank}.jsonl", "w") as ledger:
            code = attempt(load_config(config_path, action["overrides"]), action, ledger, here)
        if here.rank == 0:
            print(f"RUN {name} {code}", flush=True)
    comm.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
