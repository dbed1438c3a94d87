"""Nodes of a Ray cluster that die, drain or get notice under a job: it goes on elsewhere, or stops and goes on later,
and ends with the bits of one that nothing happened to.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.datasets import make_dataset
from tests.support.evaluation import tiny_model
from tests.support.processes import Finished, finish, kill_group, rddm
from tests.support.ray_launches import Launches, events, last_step, losses, same_state, undisturbed, workers_on
from tests.support.ray_nodes import QUICK_TO_NOTICE, RayNodes, why_not
from tests.support.servers import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]

IMAGES = 20
STEPS, SAVES = 200, 40
LENGTH = (f"train.steps={STEPS}", f"train.checkpoint_every={SAVES}")
# What Ray itself says of lost nodes and processes; it is in logs/driver.log, and in Ray's own logs.
CHATTER = re.compile(r"Traceback|\(raylet|\(pid=|job_manager|\b(INFO|WARNING|ERROR)\b")
LIMIT_S = 120.0  # from a fault to the end of the run
AGAIN = "starting again from the last checkpoint (1 of 3)"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_not():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def data(shared: Path) -> str:
    return make_dataset(shared, count=IMAGES, size=(40, 48))


@pytest.fixture(scope="module")
def expected(shared: Path, data: str) -> Path:
    """The run that nothing happens to, by two workers without Ray."""
    return undisturbed(shared / "local", data, *LENGTH)


def cluster_of(shared: Path, nodes: int) -> RayNodes:
    """Nodes of one core each, so that each holds one worker; a lost one is noticed soon."""
    return RayNodes(shared, nodes=nodes, env=QUICK_TO_NOTICE)


class Disturbed:
    """A launch that something happens to in the middle."""

    def __init__(self, launches: Launches, *arguments: str, job: str = "train") -> None:
        self._launches = launches
        self._process = launches.start(*(arguments or LENGTH), job=job)

    def __enter__(self) -> Disturbed:
        return self

    def __exit__(self, *_: Any) -> None:
        kill_group(self._process)

    def wait_for_step(self, step: int) -> None:
        self._launches.wait_for_step(step, self._process)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_until_resumed(self) -> None:
        wait_until(lambda: self.has_ended() or bool(events(self._launches.run_dir, "resumed")), timeout_s=LIMIT_S)
        assert not self.has_ended(), finish(self._process, timeout_s=LIMIT_S).text

    def end(self, code: int, *words: str) -> Finished:
        """Wait for the end of the launch, which ended with this code and told these words."""
        result = finish(self._process, timeout_s=LIMIT_S)
        assert result.code == code, result.text
        for word in words:
            assert word in result.stdout, f"no {word!r} in {result.text}"
        assert not CHATTER.search(result.stdout) and not result.stderr, result.text
        return result


def check_bits(launches: Launches, expected: Path) -> None:
    assert losses(launches.run_dir) == losses(expected)
    assert same_state(launches.run_dir, expected)


def test_a_node_that_dies_is_replaced_by_one_that_comes(shared: Path, data: str, expected: Path) -> None:
    with cluster_of(shared, 2) as cluster:
        launches = Launches(cluster, "replaced", data)
        with Disturbed(launches) as launch:
            launch.wait_for_step(SAVES + 10)
            assert launches.nodes_with_workers(2) == [0, 1]
            cluster.kill_node(1)
            late = cluster.add_node()
            launch.wait_until_resumed()
            assert launches.nodes_with_workers(3) == [0, late]
            launch.end(0, "workers lost (", AGAIN, f"resumed at step {SAVES}:")
        check_bits(launches, expected)


def test_a_node_that_falls_silent_leaves_its_work_to_those_that_are_left(
    shared: Path, data: str, expected: Path
) -> None:
    """No connection to it is closed: that it is gone is for Ray to find out."""
    with cluster_of(shared, 3) as cluster:
        launches = Launches(cluster, "silent", data)
        with Disturbed(launches) as launch:
            launch.wait_for_step(SAVES + 10)
            lost = max(launches.nodes_with_workers(3))
            cluster.kill_node(lost, silently=True)
            launch.wait_until_resumed()
            assert launches.nodes_with_workers(3) == [index for index in range(3) if index != lost]
            launch.end(0, f"workers lost (node {cluster.ip(lost)} is gone; worker ", AGAIN, f"resumed at step {SAVES}:")
        check_bits(launches, expected)


def test_without_a_replacement_the_run_stops_and_is_launched_again(shared: Path, data: str, expected: Path) -> None:
    with cluster_of(shared, 2) as cluster:
        launches = Launches(cluster, "waiting", data, wait_s=45)
        with Disturbed(launches) as launch:
            launch.wait_for_step(SAVES + 10)
            cluster.kill_node(1)
            launch.end(75, AGAIN, "(0 of 2 workers came within 45 s); the same command continues", "\nstopped\n")
        cluster.add_node()
        with Disturbed(launches) as launch:
            launch.end(0, f"resumed at step {SAVES}:", f"trained to step {STEPS}")
        check_bits(launches, expected)


def test_a_node_that_drains_costs_no_step(shared: Path, data: str, expected: Path) -> None:
    with cluster_of(shared, 3) as cluster:
        launches = Launches(cluster, "drained", data)
        with Disturbed(launches) as launch:
            launch.wait_for_step(SAVES + 10)
            going = max(launches.nodes_with_workers(3))
            drain(cluster, going)
            launch.wait_until_resumed()
            assert launches.nodes_with_workers(3) == [index for index in range(3) if index != going]
            said = f"preempted: node {cluster.ip(going)} drains"
            launch.end(0, f"({said})", "starting again from step", "without the nodes that drain")
        stopped, _ = events(launches.run_dir, "finished")
        assert stopped["status"] == "stopped" and stopped["reason"] == said
        check_each_step_once(launches.run_dir)
        check_bits(launches, expected)


def test_when_the_driver_s_own_node_drains_the_run_stops_and_is_launched_again(
    shared: Path, data: str, expected: Path
) -> None:
    with cluster_of(shared, 3) as cluster:
        on_spot = {f"node:{cluster.ip(1)}": 0.01}
        launches = Launches(cluster, "own", data, entrypoint_resources=on_spot)
        with Disturbed(launches) as launch:
            launch.wait_for_step(SAVES + 10)
            cluster.terminate_node(1)  # as a pod is told to end: it drains, and is gone half a minute later
            launch.end(75, f"(preempted: node {cluster.ip(1)} drains); the same command continues", "\nstopped\n")
        launches.place_anywhere()
        with Disturbed(launches) as launch:
            launch.end(0, "resumed at step", f"trained to step {STEPS}")
        check_each_step_once(launches.run_dir)
        check_bits(launches, expected)


def test_a_time_limit_and_a_notice_to_one_node_stop_all_workers_at_one_step(shared: Path, data: str) -> None:
    with cluster_of(shared, 2) as cluster:
        launches = Launches(cluster, "limits", data)
        with Disturbed(launches, "train.steps=100000", "train.max_hours=0.0125") as launch:
            launch.end(75, "(train.max_hours=0.0125 are over); the same command continues", "\nstopped\n")
        reached = last_step(launches.run_dir)
        assert reached > 0
        with Disturbed(launches, "train.steps=100000", "train.notice_file=/tmp/notice") as launch:
            launch.wait_for_step(reached + 10)
            (cluster.disk(1) / "notice").touch()  # as the agent of a spot machine does
            launch.end(75, f"resumed at step {reached}:", "(preempted: /tmp/notice is there)", "\nstopped\n")
        steps = last_step(launches.run_dir) + 10
        with Disturbed(launches, f"train.steps={steps}") as launch:
            launch.end(0, f"resumed at step {steps - 10}:", f"trained to step {steps}")
        check_each_step_once(launches.run_dir)


def test_an_evaluation_goes_on_without_a_node_that_dies_and_writes_the_same_report(shared: Path, data: str) -> None:
    with cluster_of(shared, 2) as cluster:
        launches = Launches(cluster, "evaluated", data)
        folder = launches.folder
        what = [str(tiny_model(folder)), "--data", data, "--steps", "16", "--batch-size", "1"]
        here = rddm("evaluate", *what, "--actors", "0", "--out", "here", cwd=folder)
        assert here.code == 0, here.text
        with Disturbed(launches, *what, "--out", "there", job="evaluate") as launch:
            wait_until(lambda: launch.has_ended() or done(folder / "there") >= 4, timeout_s=LIMIT_S)
            assert workers_on(cluster, 1, "ray::MapWorker") and done(folder / "there") < IMAGES
            cluster.kill_node(1)
            launch.end(0)
        assert (folder / "there" / "report.json").read_bytes() == (folder / "here" / "report.json").read_bytes()


def done(report: Path) -> int:
    """How many images an evaluation has scored."""
    return len(list(report.glob("results/*/*.parquet")))


def drain(cluster: RayNodes, index: int) -> None:
    """As those who manage nodes take one back: Ray is told, and by when it will be gone."""
    ray = str(Path(sys.executable).with_name("ray"))
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
    which = ["--address", cluster.address, "--node-id", cluster.node_id(index)]
    result = cluster.run_on(0, [ray, "drain-node", *which, *reason, "--deadline-remaining-seconds", "60"])
    assert result.code == 0, result.text


def check_each_step_once(run_dir: Path) -> None:
    """No step was taken twice: each stop saved what there was."""
    steps = [record["step"] for record in events(run_dir, "metrics")]
    assert steps == list(range(1, len(steps) + 1))
