"""Run by the workers of a test: several runs one after the other in one process, which saves the starts.

train_probe.py CONFIG RUNS.json     RUNS: [{"name": run, "overrides": [...], "signal_at": step, "forget": [file, ...]}]
Prints "RUN name exit-code message" for each on rank 0. At the step of signal_at, of search or training, rank 0 sends
itself SIGTERM; what is to be forgotten is taken out of the run folder before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import RddmError
from rddm_dist import comm
from rddm_dist.cli.train import TrainConsole
from rddm_dist.comm import Topology, topology_from_env
from rddm_dist.config import load_config
from rddm_dist.training.folder import run_folder
from rddm_dist.training.run import Hooks, train


def run_one(config_path: str, run: dict[str, Any], topology: Topology) -> tuple[int, str]:
    """->  exit code, what was said"""
    try:
        run_dir = run_folder(load_config(config_path, [f"run.name={run['name']}"])).work
        if topology.rank == 0:
            for name in run.get("forget", []):
                path = run_dir / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        comm.meet()
        config = load_config(config_path, [*run.get("overrides", []), f"run.name={run['name']}"])
        console = TrainConsole(config)

        def hear(record: dict[str, Any]) -> None:
            console.on_event(record)
            if record["event"] == "metrics" and record["step"] == run.get("signal_at"):
                os.kill(os.getpid(), signal.SIGTERM)

        return train(config, topology, Hooks(hear)).exit_code, ""
    except RddmError as error:
        assert error.is_shared or topology.world_size == 1, "the others would wait"
        return error.exit_code, str(error)


if __name__ == "__main__":
    here = topology_from_env()
    torch.set_num_threads(1)
    comm.initialize(here)
    for each in json.loads(Path(sys.argv[2]).read_text()):
        code, said = run_one(sys.argv[1], each, here)
        if here.rank == 0:
            print(f"RUN {each['name']} {code} {said}", flush=True)
    comm.leave(0)
