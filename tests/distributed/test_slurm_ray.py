"""`form: ray` on a real Slurm: a Ray cluster for the length of a job, its signals, and what its start can trip over."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.pack import pack
from data_pipeline.sources import find_pairs
from rddm_dist.model.weights import load_safetensors
from tests.distributed.test_slurm_launch import cluster_file, events, launch, submitted_job
from tests.support.datasets import make_dataset, make_folders
from tests.support.evaluation import tiny_model
from tests.support.processes import free_port, rddm
from tests.support.runs import write_config
from tests.support.servers import wait_until
from tests.support.slurm_cluster import SlurmCluster, why_not

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.slow]

WITH_RAY = {"form": "ray", "exclusive": True, "workers_per_node": 2}
LEAVES_RAY = "#!/bin/bash\n{python} -m ray.scripts.scripts start --head --port={port} --include-dashboard=false\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"), count=20, size=(40, 48))


@pytest.mark.timeout(500)
def test_a_signalled_run_on_ray_is_queued_again_and_ends_with_the_bits_of_a_local_one(
    data: str, tmp_path: Path
) -> None:
    keys = ["train.steps=120", "train.checkpoint_every=60", "engine.threads=1"]
    (tmp_path / "local").mkdir()
    local = rddm("train", str(write_config(tmp_path / "local", data)), *keys, "--workers", "2", cwd=tmp_path)
    assert local.code == 0, local.text
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    with SlurmCluster(tmp_path / "slurm", nodes=1) as slurm, socket.create_server(("", 0)) as taken:
        # The first job would take this port.
        cluster = cluster_file(tmp_path, **WITH_RAY, port=taken.getsockname()[1] - 1)
        job = submitted_job(launch(slurm, config, *keys, "--cluster", str(cluster), "--workers", "2"))
        wait_until(lambda: len(events(run, "metrics")) > 5, timeout_s=150)
        slurm.ask("scancel", "--batch", "--signal=USR1", job)
        ended = slurm.wait(job, timeout_s=200)
        printed = slurm.output(job)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), printed
        left = [process.info["name"] for process in slurm.processes() if "ray" in process.info["name"]]
    assert left == []
    [stopped, done] = events(run, "finished")
    assert str(stopped["reason"]).startswith("preempted: the signal before") and done["status"] == "done"
    [resumed] = events(run, "resumed")
    assert (resumed["step"], resumed["world_size"]) == (stopped["step"], 2)
    assert "stopped and resumable: queued again" in printed and "VINFO" not in printed
    weights = load_safetensors(run / "model.safetensors")[0]
    expected = load_safetensors(tmp_path / "local" / "runs" / "tiny" / "model.safetensors")[0]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.timeout(240)
def test_ray_that_does_not_start_is_a_fault_and_ray_left_over_is_named(data: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)

    def ended(name: str, **keys: object) -> tuple[str, str, str]:
        """How a job ended: its exit code, restarts and errors."""
        cluster = str(cluster_file(tmp_path, **{**WITH_RAY, **keys}))
        job = submitted_job(launch(slurm, config, "--cluster", cluster, "--run", name))
        fields = slurm.wait(job, timeout_s=60)
        return fields["ExitCode"], fields["Restarts"], "\n".join(re.findall("^error: .*", slurm.output(job), re.M))

    with SlurmCluster(tmp_path / "slurm", nodes=1) as slurm:
        # ray symmetric-run itself ends with 0 here.
        env = {"RAY_TMPDIR": "/dev/null", "PYTHONPATH": str(Path(__file__).parents[2])}
        said = "error: Ray did not come up on all nodes (they have wait_s=300 s); see above"
        assert ended("unstarted", env=env) == ("1:0", "0", said)
        script = tmp_path / "leaves-ray.sh"
        script.write_text(LEAVES_RAY.format(python=sys.executable, port=free_port()))
        slurm.wait(slurm.sbatch(script))
        said = "error: Ray runs already on n1 (of root); run ray stop there, or exclude it"
        assert ended("disturbed") == ("2:0", "0", said)
        assert "raylet" in [process.info["name"] for process in slurm.processes()]  # not ours to stop
    assert not (tmp_path / "runs" / "disturbed" / "metrics.jsonl").exists()


@pytest.mark.timeout(500)
def test_a_signalled_evaluation_on_ray_goes_on_and_its_report_has_the_same_bytes(tmp_path: Path) -> None:
    make_folders(tmp_path, count=24, size=(72, 96))
    pack(find_pairs(tmp_path / "input", tmp_path / "target"), str(tmp_path / "data"), shard_mb=1.0, jobs=1)
    model, out = tiny_model(tmp_path), tmp_path / "out"
    data = str(tmp_path / "data")
    work = ["evaluate", str(model), "--data", data, "--steps", "10", "--batch-size", "1"]
    calm = rddm(*work, "--actors", "0", "--out", str(tmp_path / "calm"), cwd=tmp_path)
    assert calm.code == 0, calm.text
    with SlurmCluster(tmp_path / "slurm", nodes=1) as slurm:
        cluster = ("--cluster", str(cluster_file(tmp_path, **WITH_RAY)), "--run", "scores")
        command = ["launch", "slurm", "--job", *work, *cluster, "--workers", "2", "--out", str(out)]
        job = submitted_job(rddm(*command, cwd=tmp_path, env=slurm.env))
        wait_until(lambda: out.is_dir() and any(path.is_file() for path in out.rglob("*")), timeout_s=120)
        slurm.ask("scancel", "--batch", "--signal=USR1", job)
        ended = slurm.wait(job, timeout_s=200)
        printed = slurm.output(job)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), printed
    assert "stopped and resumable: queued again" in printed and "image(s) were evaluated before" in printed, printed
    assert (out / "report.json").read_bytes() == (tmp_path / "calm" / "report.json").read_bytes()
