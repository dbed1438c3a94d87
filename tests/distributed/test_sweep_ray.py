"""Sweeps on a real local Ray cluster, by Tune: trials, their parent in MLflow, stops, failures and continuing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.settings import RayCluster
from cluster.submission import Job, Submitted, find_submitted, plan_record, record_files, write_record, write_submitted
from cluster.sweep import make_trials, split_sweep, with_parent
from cluster.sweep_end import table_of
from rddm_dist.config import load_config
from rddm_dist.tracking.store import default_uri, open_client
from rddm_dist.training.folder import run_folder
from rddm_dist.training.standing import folder_at, read_standing
from tests.support.datasets import make_dataset
from tests.support.processes import Finished, finish, kill_group, run, start
from tests.support.runs import write_config

CLUSTER = RayCluster(kind="ray", address="http://127.0.0.1:8265")
LIMIT_S = 200.0


def record_sweep(folder: Path, sweep: list[str], *overrides: str) -> Submitted:
    """What rddm launch leaves of a sweep `s` of tiny runs."""
    path = str(write_config(folder, make_dataset(folder)))
    fixed, swept = split_sweep(overrides, sweep)
    fixed.append("run.name=s")
    config = load_config(path, fixed)
    trials = make_trials(path, fixed, swept, name="s")
    job = with_parent(Job("train", "s", run_folder(config).home, (), 1, 0, config, trials))
    record = plan_record(job, CLUSTER)
    write_record(record, record_files(job, CLUSTER, {}, []))
    return write_submitted(record, job, CLUSTER, {})


def command(submitted: Submitted, *options: str) -> list[str]:
    return [sys.executable, "-m", "cluster.ray_tune", str(submitted.record.local / "sweep.json"), *options]


def tune(submitted: Submitted, *options: str) -> Finished:
    return run(command(submitted, *options), cwd=submitted.record.local, timeout_s=LIMIT_S)


def standings(submitted: Submitted) -> dict[str, tuple[str, int]]:
    table = table_of(submitted, submitted.home)
    return {row.name: (row.status, row.standing.step) for row in table.rows}


@pytest.mark.slow
def test_a_sweep_trains_all_combinations_as_children_of_one_run(tmp_path: Path) -> None:
    submitted = record_sweep(tmp_path, ["optim.lr=1e-4,2e-4"], "train.seed=0,1", "tracking.backend=mlflow")
    result = tune(submitted, "--workers", "1")
    assert result.code == 0, result.text
    assert standings(submitted) == {f"s-000{index}": ("done", 10) for index in range(4)}
    runs = Path(submitted.home).parent
    assert all((runs / f"s-000{index}" / "model.safetensors").is_file() for index in range(4))

    # Every trial has its own values, in its folder, in the record and in the table.
    found = find_submitted(submitted.home)
    assert found is not None
    table = table_of(found, submitted.home)
    for row, values in zip(table.rows, [(1e-4, 0), (1e-4, 1), (2e-4, 0), (2e-4, 1)], strict=True):
        assert tuple(row.values.values()) == values
        config = load_config(runs / row.name / "config.yaml")
        assert (config.optim.lr, config.train.seed) == values
    losses = {row.name: row.metric("train/loss") or 0.0 for row in table.rows}
    assert len(set(losses.values())) == 4
    assert table.best == min(losses, key=lambda name: losses[name])
    lines = result.stdout.splitlines()
    assert [line for line in lines if line in table.as_text().splitlines()] == table.as_text().splitlines()
    assert (Path(submitted.home) / "sweep.md").read_text() == table.as_markdown()
    assert len(lines) <= 2 * 4 + 5 + 2, result.stdout  # two lines per trial, the table, and a beginning

    # One parent with four children.
    client = open_client(default_uri(runs))
    experiment = client.get_experiment_by_name("rddm")
    everything = client.search_runs([experiment.experiment_id])
    (parent,) = [each for each in everything if each.data.tags.get("rddm.sweep") == submitted.home]
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"optim.lr": "0.0001, 0.0002", "train.seed": "0, 1"}
    assert parent.data.tags["rddm.best"] == table.best
    children = {each.info.run_name for each in everything if each.info.run_id != parent.info.run_id}
    assert children == set(losses)
    tags = {each.data.tags.get("mlflow.parentRunId") for each in everything if each.info.run_id != parent.info.run_id}
    assert tags == {parent.info.run_id}


def wait_for_step(run: str, step: int, process: subprocess.Popen[str], *, limit_s: float = 100.0) -> None:
    deadline = time.monotonic() + limit_s
    while read_standing(folder_at(run)).step < step:
        assert process.poll() is None, finish(process, timeout_s=10).text
        assert time.monotonic() < deadline, f"{run} did not get to step {step}"
        time.sleep(0.2)


def journal_of(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_a_trial_that_fails_holds_nobody_up(tmp_path: Path) -> None:
    submitted = record_sweep(tmp_path, ["optim.lr=1e-4,2e-4,1e30"], "train.steps=100", "train.checkpoint_every=100")
    second = f"{submitted.home}-0001"
    process = start(command(submitted, "--parallel", "1"), cwd=submitted.record.local)
    try:
        wait_for_step(second, 3, process)
        process.send_signal(signal.SIGTERM)
        stopped = finish(process, timeout_s=60)
    finally:
        kill_group(process)
    assert stopped.code == 75, stopped.text
    assert "stopping (SIGTERM)" in stopped.stdout
    found = standings(submitted)
    step = found["s-0001"][1]
    assert found == {"s-0000": ("done", 100), "s-0001": ("stopped", step), "s-0002": ("not started", 0)}
    assert 3 <= step < 100

    result = tune(submitted)
    assert result.code == 1, result.text
    assert "1 of 3 trials are complete already" in result.stdout
    assert standings(submitted)["s-0001"] == ("done", 100)
    assert "s-0002 failed: the loss is not finite" in result.stdout
    began = [event["step"] for event in journal_of(second) if event["event"] in ("started", "resumed")]
    assert began == [0, step]


@pytest.mark.slow
def test_a_trial_whose_driver_is_lost_goes_on_from_its_last_commit(tmp_path: Path) -> None:
    submitted = record_sweep(tmp_path, ["optim.lr=1e-4"], "train.steps=400", "train.checkpoint_every=20")
    trial = f"{submitted.home}-0000"
    process = start(command(submitted), cwd=submitted.record.local)
    try:
        wait_for_step(trial, 30, process)
        children = psutil.Process(process.pid).children(recursive=True)
        (driver,) = [child for child in children if "ImplicitFunc" in " ".join(child.cmdline())]
        driver.kill()
        result = finish(process, timeout_s=LIMIT_S)
    finally:
        kill_group(process)
    assert result.code == 0, result.text
    assert "s-0000 lost its driver and begins again" in result.stdout
    began = [event["step"] for event in journal_of(trial) if event["event"] in ("started", "resumed")]
    assert len(began) == 2 and began[1] >= 20 and began[1] % 20 == 0
    assert standings(submitted) == {"s-0000": ("done", 400)}
