"""Jobs sent to a Ray cluster of several nodes by its dashboard: what is launched is what a local command does."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.datasets import make_dataset
from tests.support.evaluation import tiny_model
from tests.support.processes import Finished, finish, kill_group, rddm, run, start
from tests.support.ray_launches import (
    ONE_THREAD,
    Launches,
    cluster_file,
    events,
    losses,
    same_state,
    undisturbed,
    workers_on,
)
from tests.support.ray_nodes import RayNodes, why_not
from tests.support.servers import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

NODES = 2
LONG = "train.steps=2000"  # longer than any test waits


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """Two nodes of one core each, so that two workers are on two nodes."""
    if reason := why_not():
        pytest.skip(reason)
    with RayNodes(tmp_path_factory.mktemp("shared"), nodes=NODES) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def data(cluster: RayNodes) -> str:
    return make_dataset(cluster.shared, count=20, size=(40, 48))


def ended(result: Finished, code: int, *words: str) -> Finished:
    assert result.code == code, result.text
    for word in words:
        assert word in result.stdout + result.stderr, f"no {word!r} in {result.text}"
    return result


def refused(result: Finished, *words: str) -> None:
    """Bad input: one line, nothing else."""
    ended(result, 2, *words)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.text


def test_a_training_on_two_nodes_is_the_one_of_two_local_workers(cluster: RayNodes, data: str) -> None:
    launches = Launches(cluster, "two-nodes", data)
    result = ended(launches.run(), 0, "submitted submission_id two-nodes-0001;", "trained to step 10", "\ndone\n")
    assert result.stderr == ""
    expected = undisturbed(launches.folder / "local", data)
    assert same_state(launches.run_dir, expected) and losses(launches.run_dir) == losses(expected)
    # Each worker had a node of its own, with a disk of its own.
    assert all(list(cluster.logs(index).glob("train/ray-train-app-worker-*")) for index in range(NODES))

    names = {path.name for path in (launches.run_dir / "launch" / "0001").iterdir()}
    assert names >= {"submit.sh", "entrypoint.sh", "config.yaml", "cluster.yaml", "command.txt", "launch.json"}
    status = launches.rddm("status", str(launches.run_dir))
    ended(status, 0, "submission_id two-nodes-0001: done, exit code 0", "step     10 of 10 (100 %)")
    ended(launches.rddm("logs", str(launches.run_dir)), 0, "new run ", "trained to step 10")


@pytest.mark.slow
def test_stop_saves_and_ends_the_job_which_nothing_starts_again(cluster: RayNodes, data: str) -> None:
    launches = Launches(cluster, "stopped", data)
    process, run_dir = launches.start(LONG), launches.run_dir
    try:
        launches.wait_for_step(5, process)
        ended(launches.rddm("status", str(run_dir)), 0, "submission_id stopped-0001: running", "state    running")
        refused(launches.run(LONG), "run stopped is running already (submission_id stopped-0001)", "rddm stop")
        ended(launches.rddm("stop", str(run_dir)), 0, "asked to save and stop")
        result = ended(finish(process, timeout_s=60.0), 75, "the same command continues", "\nstopped\n")
    finally:
        kill_group(process)
    assert "starting again" not in result.stdout
    finished = events(run_dir, "finished")[-1]
    assert finished["status"] == "stopped" and finished["reason"].startswith("stopped by ")
    assert events(run_dir, "saved")[-1]["step"] == finished["step"]
    ended(launches.rddm("status", str(run_dir)), 0, "submission_id stopped-0001: stopped, exit code 75")
    ended(launches.rddm("stop", str(run_dir)), 0, "nothing to stop: the job has ended (stopped)")


def test_what_the_cluster_cannot_do_is_one_line_before_anything_is_submitted(cluster: RayNodes, data: str) -> None:
    launches = Launches(cluster, "refused", data)
    folder = launches.folder
    refused(launches.run("--workers", "3"), "--workers 3 with 1 CPU each do not fit", "2 node(s) with room for 2")
    gpus = launches.run("--gpus-per-worker", "1")
    refused(gpus, "--workers 2 with 1 CPU and 1 GPU each do not fit", "with room for 0; lower --workers")
    (folder / "file").touch()
    refused(launches.run("--storage", str(folder / "file")), f"{folder / 'file'}", "cannot be written", "--storage")

    def launch(address: str, env: dict[str, str]) -> Finished:
        file = cluster_file(folder, address)
        return rddm("launch", "ray", str(launches.config), "--cluster", str(file), cwd=folder, env=env)

    token = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
    refused(launch(cluster.dashboard, wrong), f"the Ray cluster at {cluster.dashboard} refuses our token; {token}")
    refused(launch(cluster.dashboard, {"RAY_AUTH_MODE": "disabled"}), "asks for a token", token)
    nobody = f"http://{cluster.ip(1)}:8265"  # a node, but not the head
    refused(launch(nobody, cluster.env), f"no Ray dashboard answers at {nobody} (Connection refused)", "check address")
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_ray_job_submit_by_hand_does_the_same(cluster: RayNodes, data: str) -> None:
    """The recorded script, and the plain command of the documents."""
    launches = Launches(cluster, "by-hand", data)
    folder, submit = launches.folder, ["ray", "job", "submit", "--address", cluster.dashboard]
    env = {**cluster.env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # activated
    ended(launches.run(), 0)
    by_hand = run(["sh", str(launches.run_dir / "launch" / "0001" / "submit.sh"), "again"], cwd=folder, env=env)
    ended(by_hand, 0, "reusing", "complete at step 10", "Job 'again' succeeded")

    (folder / "code").mkdir()
    (folder / "code" / "mine.yaml").write_text(launches.config.read_text())
    train = [sys.executable, "-m", "rddm_dist.cli.main", "train", "mine.yaml", "--workers", "2", "--run", "plain"]
    plain = run([*submit, "--working-dir", "code", "--", *train, ONE_THREAD], cwd=folder, env=env)
    ended(plain, 0, "trained to step 10", "succeeded")
    assert same_state(folder / "runs" / "plain", undisturbed(folder / "local", data))


@pytest.mark.slow
def test_a_run_launched_again_after_its_folder_was_removed_has_an_id_of_its_own(cluster: RayNodes, data: str) -> None:
    launches = Launches(cluster, "removed", data)
    ended(launches.run(), 0, "submitted submission_id removed-0001;")
    shutil.rmtree(launches.run_dir)
    ended(launches.run(), 0, "submitted submission_id removed-0001-", "trained to step 10")


@pytest.mark.slow
def test_a_stop_where_the_run_folder_cannot_be_seen_goes_through_the_cluster(cluster: RayNodes, data: str) -> None:
    unseen = cluster.shared / "unseen-runs"
    launches = Launches(cluster, "unseen", data, here="none", storage=str(unseen))
    process, record = launches.start(LONG), launches.folder / "launches" / "unseen"
    launches.run_dir = unseen / "unseen"
    try:
        launches.wait_for_step(5, process)
        assert (record / "launch" / "0001" / "submit.sh").is_file() and not (launches.run_dir / "launch").exists()
        ended(launches.rddm("stop", "launches/unseen"), 0, "asked to save and stop")
        ended(finish(process, timeout_s=60.0), 75, "the same command continues")
    finally:
        kill_group(process)
    ended(launches.rddm("status", "launches/unseen"), 0, "submission_id unseen-0001: stopped, exit code 75")


@pytest.mark.slow
def test_an_evaluation_is_spread_over_nodes_and_writes_the_same_report(cluster: RayNodes, data: str) -> None:
    launches = Launches(cluster, "evaluated", data)
    folder = launches.folder
    what = [str(tiny_model(folder)), "--data", data, "--steps", "8", "--batch-size", "1"]
    ended(rddm("evaluate", *what, "--actors", "0", "--out", "here", cwd=folder), 0)
    process = start(launches.command(*what, "--out", "there", job="evaluate"), cwd=folder, env=cluster.env)
    try:
        wait_until(
            lambda: process.poll() is not None or all(workers_on(cluster, index, "ray::MapWorker") for index in (0, 1)),
            timeout_s=90.0,
        )
        assert process.poll() is None, "it ended before there were actors on both nodes"
    finally:
        result = finish(process, timeout_s=100.0)
    ended(result, 0)
    assert (folder / "there" / "report.json").read_bytes() == (folder / "here" / "report.json").read_bytes()


@pytest.mark.slow
def test_a_job_that_waits_for_its_place_and_was_stopped_never_trains(cluster: RayNodes, data: str) -> None:
    """Its command wants a core, and another job has both: one for its command, one for its worker."""
    first = Launches(cluster, "first", data, entrypoint_cpus=1)
    second = Launches(cluster, "second", data, entrypoint_cpus=1)
    process = first.start(LONG, "--workers", "1")
    waiting = None
    try:
        first.wait_for_step(1, process)
        waiting, run_dir = second.start(LONG, "--workers", "1"), str(second.run_dir)
        wait_until(lambda: "second-0001: pending" in second.rddm("status", run_dir).stdout, timeout_s=30.0)
        ended(second.rddm("stop", run_dir), 0, "taken out of the queue")
        ended(first.rddm("stop", str(first.run_dir), "--now"), 0, "ended at once")
        ended(finish(process, timeout_s=30.0), 75, "stopped (ended by ray job stop)")
        # Ray keeps a waiting job until there is room for its command, which then finds that it was stopped.
        ended(finish(waiting, timeout_s=60.0), 75, "stopped")
        assert not (second.run_dir / "metrics.jsonl").exists()
    finally:
        for each in (process, waiting):
            if each is not None:
                kill_group(each)
