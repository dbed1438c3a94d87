"""Runs launched on a cluster of nodes by `rddm launch ray`, and what their journals and weights say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rddm_dist.model.weights import load_safetensors
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.run import EXPORT_FILE
from tests.support.processes import RDDM, Finished, finish, rddm, run_workers, start
from tests.support.ray_nodes import RayNodes
from tests.support.runs import TRAIN, write_config

# Workers on nodes of their own would each take all cores, which sums in another order than two on one machine.
ONE_THREAD = "engine.threads=1"
WORKER_TITLE = "ray::RayTrainWorker"


class Launches:
    """Launches of one tiny run, named as its folder in the cluster's shared one, with two workers."""

    def __init__(self, cluster: RayNodes, name: str, data: str, **settings: Any) -> None:
        self.cluster, self.name, self.folder = cluster, name, cluster.shared / name
        self.folder.mkdir()
        self.config = write_config(self.folder, data)
        self.file = cluster_file(self.folder, cluster.dashboard, **settings)
        self.run_dir = self.folder / "runs" / name

    def command(self, *arguments: str, job: str = "train") -> list[str]:
        """`rddm launch ray`, followed to its end."""
        what = [str(self.config), ONE_THREAD] if job == "train" else ["--job", job]
        options = ["--cluster", str(self.file), "--run", self.name, "--workers", "2", "--follow"]
        return [*RDDM, "launch", "ray", *options, *what, *arguments]

    def start(self, *arguments: str, job: str = "train") -> subprocess.Popen[str]:
        return start(self.command(*arguments, job=job), cwd=self.folder, env=self.cluster.env)

    def run(self, *arguments: str, job: str = "train", timeout_s: float = 120.0) -> Finished:
        process = start(self.command(*arguments, job=job), cwd=self.folder, env=self.cluster.env)
        return finish(process, timeout_s=timeout_s)

    def place_anywhere(self) -> None:
        """Launch from now on with a cluster file that has no further settings."""
        self.file = cluster_file(self.folder, self.cluster.dashboard)

    def rddm(self, *arguments: str) -> Finished:
        """Another command about these runs."""
        return rddm(*arguments, cwd=self.folder, env=self.cluster.env)

    def wait_for_step(self, step: int, process: subprocess.Popen[str], *, timeout_s: float = 90.0) -> None:
        """Wait until the run has logged a step; its output in the error where its launch ends before."""
        deadline = time.monotonic() + timeout_s
        while last_step(self.run_dir) < step:
            if process.poll() is not None:
                raise AssertionError(finish(process, timeout_s=10.0).text)
            assert time.monotonic() < deadline, f"step {step} did not come in {timeout_s:.0f} s"
            time.sleep(0.1)

    def nodes_with_workers(self, nodes: int) -> list[int]:
        """Which of the first so many nodes have a worker of a training; the head is 0."""
        return [index for index in range(nodes) if workers_on(self.cluster, index)]


def cluster_file(folder: Path, dashboard: str, **settings: Any) -> Path:
    """A cluster file for the cluster at that dashboard."""
    path = folder / "ray.yaml"
    values = {"kind": "ray", "address": dashboard, "python": sys.executable, "preflight": False, **settings}
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    return path


def workers_on(cluster: RayNodes, index: int, title: str = WORKER_TITLE) -> list[int]:
    """Process ids, as the node counts them, of the workers on a node."""
    return [int(line) for line in cluster.run_on(index, ["pgrep", "-f", f"^{title}"]).stdout.split()]


def undisturbed(folder: Path, data: str, *overrides: str) -> Path:
    """The same run by two workers on this machine, without Ray.   -> its folder"""
    folder.mkdir(exist_ok=True)
    command = [*TRAIN, str(write_config(folder, data)), ONE_THREAD, *overrides]
    results = run_workers(command, 2, cwd=folder)
    assert {result.code for result in results} == {0}, "\n".join(result.text for result in results)
    return folder / "runs" / "tiny"


def journal(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run so far."""
    path = run_dir / "metrics.jsonl"
    content = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def events(run_dir: Path, *names: str) -> list[dict[str, Any]]:
    """The records of these events."""
    return [record for record in journal(run_dir) if record["event"] in names]


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in events(run_dir, "metrics")), default=0)


def same_state(run_dir: Path, other: Path) -> bool:
    """Whether two runs ended with the same bits: exported weights, and weights, averages and moments as saved."""
    one, two = _state(run_dir), _state(other)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _state(run_dir: Path) -> dict[str, Tensor]:
    found = ckpt.find_newest(str(run_dir / ckpt.CHECKPOINTS))
    assert found is not None, f"{run_dir} holds no checkpoint"
    kinds = (ckpt.WEIGHT, ckpt.EMA, "exp_avg", "exp_avg_sq")
    state = {f"{kind}/{name}": value for kind in kinds for name, value in found.read_full(kind).items()}
    exported, _, _ = load_safetensors(run_dir / EXPORT_FILE)
    return state | {f"exported/{name}": value for name, value in exported.items()}


def losses(run_dir: Path) -> list[float]:
    """The loss of each step, of the last start where a step was taken twice."""
    steps = {record["step"]: record["metrics"]["train/loss"] for record in events(run_dir, "metrics")}
    return [steps[step] for step in sorted(steps)]
