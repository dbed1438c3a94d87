"""The look at nodes before a job on real groups of processes: several of them as nodes, and on Ray."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.support.datasets import make_dataset
from tests.support.processes import RDDM, Finished, finish, free_port, kill_group, rddm, run, run_workers, start
from tests.support.ray_nodes import RayNodes, why_not

pytestmark = [pytest.mark.timeout(120)]

PREFLIGHT = (sys.executable, "-m", "cluster.preflight")
LIMIT_S = 90.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


def write_config(path: Path, *, storage: Path, data: str, **sections: object) -> str:
    values = {"run": {"storage": str(storage)}, "data": {"uri": data}, "tracking": {"backend": "none"}, **sections}
    path.write_text(yaml.safe_dump(values))
    return str(path)


@contextmanager
def started(
    arguments: Sequence[Sequence[str]], *, cwd: Path, world_size: int = 0, **env: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each, as the first worker of a node of its own. world_size: of which these are the first."""
    common = {
        "WORLD_SIZE": str(world_size or len(arguments)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        **env,
    }
    processes = [
        start([*PREFLIGHT, *given], cwd=cwd, env={"RANK": str(rank), **common}) for rank, given in enumerate(arguments)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            kill_group(process)


def look(
    arguments: Sequence[Sequence[str]], *, cwd: Path, world_size: int = 0, timeout_s: float = LIMIT_S, **env: str
) -> list[Finished]:
    """What these processes print, by rank."""
    with (
        started(arguments, cwd=cwd, world_size=world_size, **env) as processes,
        ThreadPoolExecutor(len(processes)) as pool,
    ):
        return list(pool.map(partial(finish, timeout_s=timeout_s), processes))


def left_behind(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "preflight" in path.name or path.name.endswith(".token")]


def lines(result: Finished, mark: str) -> list[str]:
    """Names of findings with this mark."""
    return [line.split()[1] for line in result.stdout.splitlines() if line.split()[:1] == [mark]]


def test_two_fit_nodes_are_ready_and_nothing_stays_behind(data: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", storage=tmp_path / "runs", data=data)
    first, second = look([[config], [config]], cwd=tmp_path)
    assert first.code == second.code == 0, first.text + second.text
    assert second.stdout == second.stderr == first.stderr == ""
    host = socket.gethostname()
    for told in (
        f" ok  {host} (worker 0)", f" ok  {host} (worker 1)", "2 nodes read what each of them wrote",
        "readable from 2 nodes", "64 MB over 2 processes", "by gloo", "GB/s on each link", "clocks", "ready to start",
    ):  # fmt: skip
        assert told in first.stdout, first.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_another_storage_and_absent_data_on_one_node_are_told_with_that_node(data: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    one = write_config(tmp_path / "one.yaml", storage=tmp_path / "here", data=data)
    other = write_config(tmp_path / "other.yaml", storage=tmp_path / "there", data=str(tmp_path / "nothing"))
    first, second = look([[one], [other]], cwd=tmp_path)
    assert first.code == second.code == 2, first.text + second.text
    assert f"{tmp_path / 'there'} is another place here than on" in first.stdout
    assert f"data: {tmp_path / 'nothing'} is no packed dataset" in first.stdout
    assert f"{tmp_path / 'here'} is another place" in first.stdout and "3 thing(s) to fix" in first.stdout
    assert "mount one folder at that path on every node" in first.stdout
    assert not list((tmp_path / "here").iterdir()) and not list((tmp_path / "there").iterdir())


def test_a_node_that_cannot_write_or_read_its_configuration_holds_up_nobody(data: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one = write_config(tmp_path / "one.yaml", storage=tmp_path / "file" / "runs", data=data)
    first, second = look([[one], [str(tmp_path / "absent.yaml")]], cwd=tmp_path)
    assert first.code == second.code == 2, first.text + second.text
    assert "runs cannot be written" in first.stdout and "Not a directory" in first.stdout
    assert "configuration: config" in first.stdout and "absent.yaml does not exist" in first.stdout
    assert not left_behind(tmp_path)


def test_workers_of_one_node_report_once(data: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", storage=tmp_path / "runs", data=data)
    first, second = run_workers([*PREFLIGHT, config], 2, cwd=tmp_path, timeout_s=LIMIT_S)
    assert first.code == second.code == 0, first.text + second.text
    assert f" ok  {socket.gethostname()} " in first.stdout and "2 worker(s)" in first.stdout
    assert "clocks" not in lines(first, "ok") and "64 MB over 2 processes" in first.stdout


def test_mlflow_is_looked_for_from_the_first_node(data: str, tmp_path: Path) -> None:
    tracking = {"uri": "http://127.0.0.1:9"}
    config = write_config(tmp_path / "run.yaml", storage=tmp_path / "runs", data=data, tracking=tracking)
    (only,) = look([[config]], cwd=tmp_path)
    assert only.code == 2 and lines(only, "FIX") == ["MLflow"], only.text
    assert "http://127.0.0.1:9 cannot be used" in only.stdout and "change tracking.uri" in only.stdout


@pytest.mark.parametrize("missing", [0, 1])
def test_who_does_not_come_is_named_in_time(missing: int, tmp_path: Path) -> None:
    began = time.monotonic()
    options = ["--storage", str(tmp_path), "--wait", "4"]
    (only,) = look([options], cwd=tmp_path, world_size=2, RANK=str(1 - missing))
    assert time.monotonic() - began < 30
    assert only.code == 2 and "Traceback" not in only.stderr, only.text
    assert len(only.stderr.splitlines()) == 1 and "GLOO_SOCKET_IFNAME" in only.stderr
    if missing:
        assert "1 of 2 workers did not come within 4 s: 1 (here: 0 on" in only.stderr
        assert "waiting for 2 worker(s) to meet" in only.stdout
    else:
        assert "worker 1 did not reach the first worker at 127.0.0.1:" in only.stderr


def test_those_who_came_hear_at_once_who_did_not(tmp_path: Path) -> None:
    options = ["--storage", str(tmp_path), "--wait", "6"]
    first, second = look([options, options], cwd=tmp_path, world_size=4)
    assert first.code == second.code == 2
    assert "2 of 4 workers did not come within 6 s: 2-3 (here: 0-1 on" in first.stderr, first.text
    assert second.stderr == "", second.text  # told by the first one for all


def test_a_port_that_somebody_else_has_is_said_to_be_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        options = ["--storage", str(tmp_path), "--wait", "3"]
        first, second = look([options, options], cwd=tmp_path, MASTER_PORT=port)
    for result in (first, second):
        assert result.code == 2 and f"cannot use 127.0.0.1:{port}" in result.stderr, result.text
        assert "choose another port" in result.stderr


def test_an_interface_that_is_not_there_is_named(tmp_path: Path) -> None:
    options = ["--storage", str(tmp_path), "--wait", "10"]
    first, second = look([options, options], cwd=tmp_path, GLOO_SOCKET_IFNAME="nosuch0")
    for result in (first, second):
        assert result.code == 2 and "they do not reach each other" in result.stderr, result.text
        assert "nosuch0" in result.stderr and "name the interface" in result.stderr


def test_a_worker_that_is_lost_meanwhile_is_no_traceback(tmp_path: Path) -> None:
    options = ["--storage", str(tmp_path / "runs")]
    probe = (
        "import os\nfrom rddm_dist import comm\n"
        "comm.assemble(comm.topology_from_env(), name='lost', wait_s=30, timeout_s=30)\n"
        "comm.exchange_object(None)\nos._exit(1)"
    )
    port = str(free_port())
    env = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    lost = start([sys.executable, "-c", probe], cwd=tmp_path, env=env)
    try:
        (first,) = look([options], cwd=tmp_path, world_size=2, MASTER_PORT=port)
    finally:
        kill_group(lost)
    assert first.code == 1 and "worker 0 lost the others" in first.stderr, first.text
    assert "Traceback" not in first.stderr and not left_behind(tmp_path)


def test_under_torchrun_the_exit_code_is_that_of_the_look(data: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", storage=tmp_path / "runs", data=data)
    torchrun = [sys.executable, "-m", "rddm_dist.torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())]
    for override, code in ((), 0), (("data.uri=nothing",), 2):
        result = run([*torchrun, "-m", "cluster.preflight", config, *override], cwd=tmp_path, timeout_s=LIMIT_S)
        assert result.code == code, result.text


@pytest.mark.slow
@pytest.mark.ray
def test_on_this_machine_the_command_looks_through_ray(data: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", storage=tmp_path / "runs", data=data)
    fit = rddm("doctor", "cluster", config, "--workers", "2", cwd=tmp_path)
    assert fit.code == 0 and "ready to start" in fit.stdout, fit.text
    assert f" ok  {socket.gethostname()} " in fit.stdout and "2 worker(s)" in fit.stdout and fit.stderr == ""
    unfit = rddm("doctor", "cluster", config, "data.uri=nothing", "--json", cwd=tmp_path)
    assert unfit.code == 2, unfit.text
    told = json.loads(unfit.stdout)
    (found,) = [finding for finding in told["findings"] if finding["mark"] == "FIX"]
    assert "nothing is no packed dataset" in found["value"] and told["nodes"][0]["workers"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


@pytest.mark.ray
def test_more_than_the_ray_cluster_can_give_is_one_line(tmp_path: Path) -> None:
    result = rddm("doctor", "cluster", "--gpus-per-worker", "1", "--workers", "1000", cwd=tmp_path)
    assert result.code == 2 and result.stdout == "", result.text
    assert result.stderr.startswith("error: the Ray cluster has room for") and "add nodes" in result.stderr


def test_a_cluster_file_tells_what_a_submission_would_find_out(tmp_path: Path) -> None:
    path = tmp_path / "ray.yaml"
    path.write_text("kind: ray\naddress: http://127.0.0.1:9\nmax_workers: 2\n")
    too_many = rddm("doctor", "cluster", "--cluster", "ray.yaml", "--workers", "3", cwd=tmp_path)
    assert too_many.code == 2 and lines(too_many, "FIX") == ["ray"], too_many.text
    assert "--workers 3 is more than this cluster can ever give" in too_many.stdout
    silent = rddm("doctor", "cluster", "--cluster", "ray.yaml", cwd=tmp_path)
    assert silent.code == 2 and "http://127.0.0.1:9" in silent.stdout and "-> " in silent.stdout, silent.text
    path.write_text("kind: bus\n")
    unknown = rddm("doctor", "cluster", "--cluster", "ray.yaml", cwd=tmp_path)
    assert unknown.code == 2 and "kind=bus is no kind of cluster" in unknown.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["ray.yaml"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_nodes_of_a_ray_cluster_find_out_what_they_do_not_share() -> None:
    if reason := why_not():
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(prefix="rddm-shared-") as folder,
        RayNodes(Path(folder), nodes=2, cpus=2) as cluster,
    ):
        shared = cluster.shared
        config = write_config(shared / "run.yaml", storage=shared / "runs", data=make_dataset(shared))
        doctor = partial(cluster.run_on, 0, timeout_s=100.0, env={"RAY_ADDRESS": cluster.address})
        fit = doctor([*RDDM, "doctor", "cluster", config, "--workers", "4"])
        assert fit.code == 0, fit.text
        for told in (
            " ok  node0 ",
            " ok  node1 ",
            "2 nodes read what each of them wrote",
            "over 2 processes",
            "clocks",
        ):
            assert told in fit.stdout, fit.text
        assert fit.stdout.count("2 worker(s)") == 2 and not left_behind(shared)
        # /tmp is another disk on each.
        private = doctor([*RDDM, "doctor", "cluster", "--storage", "/tmp/private"])
        assert private.code == 2 and sorted(lines(private, "FIX")) == ["node0", "node1"], private.text
        assert "/tmp/private is another place here than on node" in private.stdout
        assert not any((cluster.disk(index) / "private").exists() for index in (0, 1))
