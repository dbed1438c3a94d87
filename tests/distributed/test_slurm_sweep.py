"""A sweep as an array of a real Slurm: one task a run, one MLflow run above them that ends however they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rddm_dist.tracking.store import default_uri, open_client
from tests.distributed.test_slurm_launch import cluster_file, events, launch, submitted_job
from tests.support.datasets import make_dataset
from tests.support.processes import rddm
from tests.support.runs import write_config
from tests.support.servers import wait_until
from tests.support.slurm_cluster import SlurmCluster, why_not

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.slow, pytest.mark.timeout(500)]

SWEEP = ("--sweep", "optim.lr=1e-4,2e-4", "tracking.backend=mlflow", "--run", "s")


@pytest.fixture
def data(tmp_path: Path) -> str:
    return make_dataset(tmp_path / "data", count=20, size=(40, 48))


def mlflow_runs(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The run of the sweep in MLflow, and its children by name."""
    client = open_client(default_uri(folder / "runs"))
    found = client.search_runs([client.get_experiment_by_name("rddm").experiment_id])  # type: ignore[union-attr]
    [parent] = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(found) - 1
    return parent, {run.info.run_name: run for run in children}


def statuses(printed: str) -> dict[str, tuple[str, str]]:
    """Status and reason by run, of `rddm status --json`."""
    return {row["name"]: (row["status"], row["reason"]) for row in json.loads(printed)["trials"]}


def test_a_sweep_of_which_a_run_fails_ends_and_goes_on_when_launched_again(data: str, tmp_path: Path) -> None:
    config, home = write_config(tmp_path, data), tmp_path / "runs" / "s"
    # n2 does not have the data. Each run takes a whole node, so that one of them gets n2.
    with SlurmCluster(tmp_path / "slurm", nodes=2, hidden={"n2": tmp_path / "data"}) as slurm:
        cluster = str(cluster_file(tmp_path, exclusive=True))
        first = launch(slurm, config, *SWEEP, "--cluster", cluster, "--follow", timeout_s=240)
        assert first.code == 1, first.text
        assert "failed (1 failed, 1 done)" in first.stdout and "exit code 2; see rddm logs" in first.stdout
        parent, _ = mlflow_runs(tmp_path)
        assert parent.info.status == "FAILED", first.text
        told = rddm("status", str(home), "--json", cwd=tmp_path, env=slurm.env)
        failed = ("failed", "exit code 2; see rddm logs")
        assert sorted(statuses(told.stdout).values()) == [("done", ""), failed], told.text

        cluster = str(cluster_file(tmp_path, sbatch=["--nodelist=n1"]))
        again = launch(slurm, config, *SWEEP, "--cluster", cluster, "--follow", timeout_s=240)
        assert again.code == 0, again.text
    *_, done, titles, one, other = again.stdout.splitlines()
    assert done == "done (2 done)" and titles.split()[:3] == ["run", "optim.lr", "status"]
    assert " done " in one and " done " in other and "*" in one + other
    parent_now, children = mlflow_runs(tmp_path)
    assert (parent_now.info.run_id, parent_now.info.status) == (parent.info.run_id, "FINISHED")
    assert {name: run.info.status for name, run in children.items()} == {"s-0000": "FINISHED", "s-0001": "FINISHED"}
    assert {run.data.params["optim.lr"] for run in children.values()} == {"0.0001", "0.0002"}
    assert parent_now.data.tags["rddm.best"] in children
    assert (home / "sweep.md").read_text().count("| done |") == 2


def test_a_cancelled_sweep_is_ended_by_who_asks_and_one_that_is_refused_leaves_nothing_running(
    data: str, tmp_path: Path
) -> None:
    config, home = write_config(tmp_path, data), tmp_path / "runs" / "s"
    with SlurmCluster(tmp_path / "slurm", nodes=1) as slurm:
        refused = launch(slurm, config, *SWEEP, "--cluster", str(cluster_file(tmp_path, partition="gone")))
        assert (refused.code, len(refused.stderr.splitlines())) == (2, 1), refused.text
        assert not (tmp_path / "runs").exists()
        unsubmitted = launch(slurm, config, *SWEEP, "--cluster", str(cluster_file(tmp_path, sbatch=["--no-such-key"])))
        assert (unsubmitted.code, "sbatch failed: " in unsubmitted.stderr) == (2, True), unsubmitted.text
        parent, _ = mlflow_runs(tmp_path)
        assert parent.info.status == "FAILED"

        cluster = str(cluster_file(tmp_path, array_parallel=1))
        job = submitted_job(launch(slurm, config, *SWEEP, "train.steps=100000", "--cluster", cluster))
        run = tmp_path / "runs" / "s-0000"
        wait_until(lambda: bool(events(run, "metrics")), timeout_s=120)
        assert mlflow_runs(tmp_path)[0].info.status == "RUNNING"
        slurm.ask("scancel", job)
        wait_until(lambda: slurm.ask("squeue", "--noheader") == "", timeout_s=60)
        # The one that ran has saved and does not come back.
        assert events(run, "saved")
        assert " JobState=CANCELLED " in (shown := slurm.ask("scontrol", "--oneliner", "show", "job", f"{job}_0"))
        assert " Restarts=0 " in shown
        told = rddm("status", str(home), "--json", cwd=tmp_path, env=slurm.env)
        assert statuses(told.stdout) == {"s-0000": ("stopped", "SIGTERM"), "s-0001": ("not started", "")}, told.text
    assert mlflow_runs(tmp_path)[0].info.status == "KILLED"
