"""The cluster of namespaces that tests run on: its nodes share one folder alone, and it leaves nothing behind."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.processes import ROOT, kill_group, run, start
from tests.support.ray_nodes import QUICK_TO_NOTICE, RayNodes, why_not

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(120)]

_PYTHON = sys.executable
_DRAIN_S = 4


@pytest.fixture(scope="module")
def possible() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    env = {**QUICK_TO_NOTICE, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(_DRAIN_S)}
    with RayNodes(tmp_path_factory.mktemp("shared"), nodes=2, env=env) as nodes:
        yield nodes


def _shell(cluster: RayNodes, index: int, script: str) -> str:
    result = cluster.run_on(index, ["sh", "-c", script], timeout_s=20.0)
    assert result.code == 0, result.text
    return result.stdout


_SPREAD = """
import json, os, ray, socket
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1)
class Here:
    def tell(self):
        return [ray.util.get_node_ip_address(), socket.gethostname(), os.path.exists("/tmp/mine"), os.getpid()]

print(json.dumps(sorted(ray.get([here.tell.remote() for here in [Here.remote(), Here.remote()]]))))
"""


def test_nodes_share_one_folder_and_nothing_else(cluster: RayNodes) -> None:
    _shell(cluster, 0, "echo 1 > /tmp/mine; echo 1 > /dev/shm/mine; echo both > ours; sleep 300 > /dev/null 2>&1 &")
    assert not Path("/tmp/mine").exists() and not Path("/dev/shm/mine").exists()
    seen = _shell(cluster, 1, "cat ours; ls /tmp/mine /dev/shm/mine 2>&1 | grep -c 'No such'; pgrep -c sleep || true")
    assert seen.split() == ["both", "2", "0"]
    assert _shell(cluster, 0, "pgrep -c sleep").split() == ["1"]
    assert (cluster.shared / "ours").read_text() == "both\n" and (cluster.disk(0) / "mine").read_text() == "1\n"
    # What runs on a node sees the code as it is here.
    assert _shell(cluster, 1, f"ls {ROOT}/pyproject.toml").strip() == f"{ROOT}/pyproject.toml"


def test_actors_are_spread_over_nodes_of_different_addresses(cluster: RayNodes) -> None:
    result = cluster.run_on(0, [_PYTHON, "-c", _SPREAD], timeout_s=60.0, env={"RAY_ADDRESS": cluster.address})
    assert result.code == 0, result.text
    first, second = json.loads(result.stdout.splitlines()[-1])
    assert first[:2] == [cluster.ip(0), "node0"] and second[:2] == [cluster.ip(1), "node1"]


_SUBMIT = """
import sys, time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient(sys.argv[1])
job = client.submit_job(entrypoint="hostname; exit 75")
while not client.get_job_status(job).is_terminal():
    time.sleep(0.2)
print(client.get_job_info(job).driver_exit_code, "node0" in client.get_job_logs(job))
"""


def test_jobs_are_sent_from_outside_by_those_who_have_the_token(cluster: RayNodes, tmp_path: Path) -> None:
    result = run([_PYTHON, "-c", _SUBMIT, cluster.dashboard], cwd=tmp_path, timeout_s=60.0, env=cluster.env)
    assert result.stdout.splitlines()[-1:] == ["75 True"], result.text
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.dashboard}/api/version", timeout=10)


_HOLD = """
import ray, time
ray.init(log_to_driver=False)

@ray.remote(num_cpus=0, resources={"node:" + __import__("sys").argv[1]: 0.01})
class Held:
    def ready(self):
        return True

held = Held.remote()
ray.get(held.ready.remote())
print("held", flush=True)
time.sleep(60)
"""


def test_nodes_come_drain_and_die(cluster: RayNodes) -> None:
    both = {cluster.ip(0), cluster.ip(1)}
    assert cluster.alive() == both
    late = cluster.add_node()
    assert cluster.alive() == {*both, cluster.ip(late)}
    holder = cluster.start_on(0, [_PYTHON, "-c", _HOLD, cluster.ip(late)], env={"RAY_ADDRESS": cluster.address})
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        begin = time.monotonic()
        cluster.terminate_node(late)
        assert cluster.wait_ended(late, timeout_s=30.0) == 1
        # It is in use: it drains for as long as it may.
        assert time.monotonic() - begin >= _DRAIN_S
    finally:
        kill_group(holder)
    cluster.wait_alive(both, timeout_s=20.0)
    cluster.kill_node(1)
    cluster.wait_alive({cluster.ip(0)}, timeout_s=20.0)
    assert cluster.logs(1).is_dir()


def _processes_of(folder: str) -> list[psutil.Process]:
    processes = psutil.process_iter(["cmdline"])
    return [process for process in processes if any(folder in word for word in process.info["cmdline"] or [])]


def _is_linked(node: str) -> bool:
    """Whether this machine has an address in the network of the node of this address."""
    near = node.rsplit(".", 1)[0] + ".1"
    return any(one.address == near for link in psutil.net_if_addrs().values() for one in link)


def test_a_node_that_cannot_start_is_told_and_leaves_nothing(possible: None, tmp_path: Path) -> None:
    nodes = RayNodes(tmp_path, nodes=1, cpus=-1)
    with pytest.raises(RuntimeError, match="(?s)`ray start` ended with 1:.*must be nonnegative"), nodes:
        pytest.fail("a cluster of -1 CPUs started")
    assert not _is_linked(nodes.ip(0)) and not nodes.disk(0).exists() and not _processes_of(str(nodes.disk(0)))


_KILLED = """
import sys, time
from pathlib import Path
from tests.support.ray_nodes import RayNodes
with RayNodes(Path(sys.argv[1]), nodes=1) as nodes:
    print(nodes.disk(0), nodes.ip(0), flush=True)
    time.sleep(100)
"""


def test_a_cluster_does_not_outlive_a_killed_process(possible: None, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    command = [_PYTHON, "-c", _KILLED, str(tmp_path / "shared")]
    process = start(command, cwd=tmp_path, env={"TMPDIR": str(tmp_path)})  # where it leaves its folder
    try:
        assert process.stdout is not None
        folder, address = process.stdout.readline().split()
        assert _is_linked(address) and _processes_of(folder)
        process.kill()
        process.wait(timeout=10)
        deadline = time.monotonic() + 20.0
        while _processes_of(folder) or _is_linked(address):
            assert time.monotonic() < deadline, "the cluster lives on"
            time.sleep(0.1)
    finally:
        kill_group(process)
