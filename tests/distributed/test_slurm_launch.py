"""A real Slurm takes a run through a signal, the queue and the end, with the weights of an undisturbed one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_pipeline.manifest import Manifest
from rddm_dist.model.weights import load_safetensors
from tests.support.datasets import make_dataset
from tests.support.processes import Finished, rddm, run_workers
from tests.support.runs import TRAIN, write_config
from tests.support.servers import wait_until
from tests.support.slurm_cluster import GPU_PARTITION, SlurmCluster, why_not

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.timeout(280)]

STEPS = 150
PAIRS = 60
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"), count=20, size=(40, 48))


def cluster_file(folder: Path, **keys: object) -> Path:
    path = folder / "slurm.yaml"
    values = {
        "kind": "slurm", "partition": "main", "python": sys.executable, "time": "10", "exclusive": False,
        "preflight": False,
        "env": {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump({**values, **keys}))
    return path


def events(run: Path, name: str) -> list[dict[str, object]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["event"] == name]


def submitted_job(launched: Finished, *, code: int = 0) -> str:
    """The id of a job that was submitted."""
    assert launched.code == code, launched.text
    return launched.stdout.split("slurm job ")[1].split(";")[0]


def launch(slurm: SlurmCluster, config: Path, *arguments: str, timeout_s: float = 120.0) -> Finished:
    command = ["launch", "slurm", str(config), *arguments]
    return rddm(*command, cwd=config.parent, env=slurm.env, timeout_s=timeout_s)


def test_a_signalled_run_of_two_nodes_is_queued_again_and_ends_with_the_same_bits(data: str, tmp_path: Path) -> None:
    (tmp_path / "undisturbed").mkdir()
    calm = write_config(tmp_path / "undisturbed", data)
    keys = [f"train.steps={STEPS}", "train.checkpoint_every=50", "engine.threads=1"]
    [result, _] = run_workers([*TRAIN, str(calm), *keys], 2, cwd=tmp_path)
    assert result.code == 0, result.text
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    with SlurmCluster(tmp_path / "slurm", nodes=2) as slurm:
        launched = launch(slurm, config, *keys, "--cluster", str(cluster_file(tmp_path)), "--workers", "2")
        job = submitted_job(launched)
        wait_until(lambda: len(events(run, "metrics")) > 5, timeout_s=90)
        twice = launch(slurm, config, *keys, "--cluster", str(cluster_file(tmp_path)), "--workers", "2")
        assert twice.code == 2 and f"is running already (slurm job {job})" in twice.stderr
        status = rddm("status", str(run), cwd=tmp_path, env=slurm.env)
        assert f"slurm job {job}: running (on n[1-2])" in status.stdout, status.text
        slurm.ask("scancel", "--batch", "--signal=USR1", job)
        ended = slurm.wait(job, timeout_s=120)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), slurm.output(job)
        status = rddm("status", str(run), cwd=tmp_path, env=slurm.env)
        assert f"slurm job {job}: done, exit code 0 (COMPLETED, started again 1 time(s))" in status.stdout, status.text
        printed = rddm("logs", str(run), cwd=tmp_path, env=slurm.env).stdout
    [stopped, done] = events(run, "finished")
    assert stopped["status"] == "stopped" and str(stopped["reason"]).startswith("preempted: the signal before")
    [resumed] = events(run, "resumed")
    assert resumed["step"] == stopped["step"] and resumed["world_size"] == 2
    assert done["status"] == "done"
    assert "stopped and resumable: queued again" in printed
    weights = load_safetensors(run / "model.safetensors")[0]
    undisturbed = load_safetensors(tmp_path / "undisturbed" / "runs" / "tiny" / "model.safetensors")[0]
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


@pytest.mark.slow
def test_a_run_that_a_person_stopped_is_not_queued_again(data: str, tmp_path: Path) -> None:
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    with SlurmCluster(tmp_path / "slurm", nodes=1) as slurm:
        launched = launch(slurm, config, "train.steps=100000", "--cluster", str(cluster_file(tmp_path)))
        job = submitted_job(launched)
        wait_until(lambda: bool(events(run, "metrics")), timeout_s=60)
        stopped = rddm("stop", str(run), cwd=tmp_path, env=slurm.env)
        assert stopped.code == 0 and "asked to save and stop" in stopped.stdout, stopped.text
        ended = slurm.wait(job, timeout_s=60)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0"), slurm.output(job)
        status = rddm("status", str(run), "--json", cwd=tmp_path, env=slurm.env)
        job_state = json.loads(status.stdout)["job"]
        assert (job_state["state"], job_state["exit_code"]) == ("stopped", 75)
        # Launched again, it goes on where it was.
        again = launch(slurm, config, "train.steps=100000", "--cluster", str(cluster_file(tmp_path)))
        job = submitted_job(again)
        wait_until(lambda: len(events(run, "resumed")) == 1, timeout_s=60)
        assert rddm("stop", str(run), "--now", cwd=tmp_path, env=slurm.env).code == 0
        slurm.wait(job, timeout_s=60)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nodes_are_looked_at_before_a_run_and_one_without_the_data_ends_the_job(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", count=20, size=(40, 48))
    config, keys = write_config(tmp_path, data), {"preflight": True, "env": {"PYTHONPATH": ROOT}}
    # n3 does not have the data.
    with SlurmCluster(tmp_path / "slurm", nodes=3, hidden={"n3": tmp_path / "data"}) as slurm:
        both = cluster_file(tmp_path, **keys, sbatch=["--nodelist=n[1-2]"])
        fit = launch(slurm, config, "--cluster", str(both), "--workers", "2", "--follow", timeout_s=200)
        assert fit.code == 0, fit.text
        for said in (
            " ok  n1 ", " ok  n2 ", f"{tmp_path}/runs: 2 nodes read what each of them wrote", "readable from 2 nodes",
            "64 MB over 2 processes", "ready to start", "training starts: global batch 6 = 2 worker(s)",
            "done (COMPLETED)",
        ):  # fmt: skip
            assert said in fit.stdout, fit.text
        assert fit.stdout.index("ready to start") < fit.stdout.index("training starts")
        unfit = cluster_file(tmp_path, **keys, sbatch=["--nodelist=n[1,3]"])
        options = ("--workers", "2", "--run", "unfit")
        refused = launch(slurm, config, "--cluster", str(unfit), *options, "--follow", timeout_s=200)
        job = slurm.job(submitted_job(refused, code=2))
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), refused.text
        [line] = [line for line in refused.stdout.splitlines() if "FIX  n3 " in line]
        assert f"{data} is no packed dataset" in line and "ready to start" not in refused.stdout, refused.text
    assert not (tmp_path / "runs" / "unfit" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_images_are_packed_in_a_job_that_stops_for_the_signal_and_goes_on(tmp_path: Path) -> None:
    folders = [tmp_path / "input", tmp_path / "target"]
    noise = np.random.default_rng(0).integers(0, 256, (len(folders), PAIRS, 256, 256, 3), np.uint8)
    for folder, images in zip(folders, noise, strict=True):
        folder.mkdir()
        for index, pixels in enumerate(images):
            Image.fromarray(pixels).save(folder / f"{index:03d}.png", compress_level=0)
    packed = tmp_path / "packed"
    pairs = ("--input", str(folders[0]), "--target", str(folders[1]), "--out", str(packed))
    with SlurmCluster(tmp_path / "slurm", nodes=1) as slurm:
        cluster = ("--cluster", str(cluster_file(tmp_path)), "--run", "packing")
        command = ["launch", "slurm", "--job", "pack", *cluster, *pairs, "--codec", "webp", "--shard-mb", "1"]
        job = submitted_job(rddm(*command, "--jobs", "1", cwd=tmp_path, env=slurm.env))
        wait_until(lambda: len(list(packed.rglob("*.tar"))) > 1, timeout_s=100)
        slurm.ask("scancel", "--batch", "--signal=USR1", job)
        ended = slurm.wait(job, timeout_s=150)
        printed = slurm.output(job)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), printed
    assert "stopped and resumable: queued again" in printed
    assert Manifest.load(str(packed)).num_samples == PAIRS


BAD: dict[str, tuple[dict[str, object], tuple[str, ...], str]] = {
    "no-partition": ({"partition": "gone"}, (), "partition=gone does not exist; this Slurm has cpu-only, gpu, main"),
    "nodes": ({}, ("--workers", "3"), "--workers 3 need 3 nodes (workers_per_node=1), partition main gives at most 2"),
    "gpus-on-cpus": ({}, ("--gpus-per-worker", "1"), "partition main has no GPUs"),
    "gpus": ({"partition": "gpu", "gpus_per_worker": 9}, (), "partition gpu has 8 GPUs a node"),
    "time": ({"time": "2:00:00"}, (), "time=2:00:00 is more than partition main allows (60 minutes)"),
    "storage": ({"storage": "/proc/none/runs"}, (), "/proc/none"),
    "signal": ({"time": "5"}, (), "signal_s=300 is not less than time=5"),
}


def test_what_slurm_can_never_give_is_said_before_anything_is_submitted(data: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    with SlurmCluster(tmp_path / "slurm", nodes=2, settings=GPU_PARTITION) as slurm:
        for keys, arguments, said in BAD.values():
            refused = launch(slurm, config, "--cluster", str(cluster_file(tmp_path, **keys)), *arguments)
            assert (refused.code, said in refused.stderr) == (2, True), refused.text
            assert len(refused.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists()
        assert slurm.ask("squeue", "--noheader") == ""
