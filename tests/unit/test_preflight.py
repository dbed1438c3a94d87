"""The look at nodes before a job: what each finding says and advises, and what one node finds on itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest

from cluster.findings import Finding
from cluster.node_report import CODE, Needs, NodeReport, code_digest, needs_of, probe
from cluster.preflight import (
    ALL_REDUCE_BYTES,
    GroupReport,
    clock_offsets,
    examine,
    judge,
    judge_group,
    look_at_tracking,
    node_labels,
)
from cluster.settings import RayCluster, load_cluster
from cluster.shared_folder import SharedFolder
from data_pipeline.errors import ConfigError
from rddm_dist.comm import Topology, ranges
from rddm_dist.config import load_config, parse_config
from rddm_dist.limits import within
from tests.support.datasets import make_dataset

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "code": "0123456789ab"}


def report(node: str = "node0", rank: int = 0, **more: object) -> NodeReport:
    """Of a node that is fit, unless told otherwise."""
    fit = NodeReport(
        node, rank, 4, storage="/shared/runs", versions=VERSIONS, compiler="/usr/bin/c++", shared_gib=8.0,
        free_gb={"storage": 100.0}, fingerprints={"/shared/data": "f" * 64}, clock_bound_s=0.001 if rank else 0.0,
    )  # fmt: skip
    return dataclasses.replace(fit, **more)  # type: ignore[arg-type]


def named(findings: list[Finding], name: str) -> list[Finding]:
    return [finding for finding in findings if finding.name == name]


def only(findings: list[Finding]) -> Finding:
    """The one finding that is not well."""
    (found,) = [finding for finding in findings if finding.remedy]
    return found


def test_fit_nodes_have_one_line_each_and_nothing_to_mend() -> None:
    findings = judge([report(f"node{rank}", rank) for rank in range(3)])
    assert not [finding for finding in findings if finding.remedy]
    assert [finding.name for finding in findings] == [
        "node0", "node1", "node2", "storage", "data", "versions", "clocks",
    ]  # fmt: skip
    assert findings[0].value == "4 worker(s), no GPU, 100 GB free for storage, /dev/shm 8.0 GiB"
    assert findings[1].value.endswith(", clock +0.000 s")
    assert "/shared/runs" in findings[3].value and "3 nodes" in findings[3].value
    assert "ffffffffffff" in findings[4].value and "torch 2.13.0" in findings[5].value


def test_gpus_are_told_by_name_and_count() -> None:
    (line, *_) = judge([report(gpus=("H200", "H200", "L4"), driver="570.1")])
    assert "2 x H200, 1 x L4, driver 570.1" in line.value


def test_what_is_wrong_on_a_node_takes_the_place_of_its_line() -> None:
    problem = Finding("compiler", "no C++ compiler", "install one")
    findings = judge([report(), report("node1", 1, problems=(problem,))])
    assert named(findings, "node0")[0].mark == "ok"
    assert named(findings, "node1") == [Finding("node1", "compiler: no C++ compiler", "install one")]


def test_a_warning_leaves_a_node_fit() -> None:
    warning = Finding("disk", "4.0 GB free at /tmp", "free 5 GB", is_warning=True)
    findings = judge([report(problems=(warning,))])
    assert [finding.mark for finding in named(findings, "node0")] == ["ok", "warn"]


def test_what_is_wrong_on_many_nodes_is_one_line() -> None:
    problem = Finding("compiler", "no C++ compiler", "install one")
    everywhere = judge([report(f"node{rank}", rank, problems=(problem,)) for rank in range(64)])
    assert only(everywhere).name == "all 64 nodes"
    several = [report(f"node{rank}", rank, problems=(problem,) if rank < 6 else ()) for rank in range(64)]
    assert only(judge(several)).name == "node0, node1, node2, node3 and 2 more"


@pytest.mark.parametrize("name", ["python", "torch", "code"])
def test_other_versions_on_a_node_name_the_node_and_the_remedy(name: str) -> None:
    odd = report("node2", 2, versions={**VERSIONS, name: "9.9"})
    findings = judge([report(), report("node1", 1), odd])
    found = only(findings)
    assert found.name == f"version of {name}" and found.is_problem
    assert found.value == f"{VERSIONS[name]} on node0, node1; 9.9 on node2"
    assert ("checkout" if name == "code" else "environment") in found.remedy
    assert name not in named(findings, "versions")[0].value.split()


def test_other_data_under_the_same_path_is_found() -> None:
    found = only(judge([report(), report("node1", 1, fingerprints={"/shared/data": "e" * 64})]))
    assert found.name == "data" and found.is_problem
    assert found.value == "/shared/data has fingerprint ffffffffffff on node0; eeeeeeeeeeee on node1"
    assert "copy the dataset" in found.remedy


def test_data_that_one_node_cannot_read_are_not_called_readable() -> None:
    problem = Finding("data", "/shared/data: Permission denied", "make it readable")
    findings = judge([report(), report("node1", 1, fingerprints={}, problems=(problem,))])
    assert not named(findings, "data")
    assert only(findings).value == "data: /shared/data: Permission denied"


def test_storage_is_not_called_shared_where_a_node_says_otherwise() -> None:
    problem = Finding("storage", "/shared/runs is another place here than on node0", "mount one folder")
    assert not named(judge([report(), report("node1", 1, problems=(problem,))]), "storage")


def test_other_drivers_are_found() -> None:
    found = only(judge([report(gpus=("L4",), driver="1.0"), report("node1", 1, gpus=("L4",), driver="2.0")]))
    assert (found.name, found.value) == ("driver", "1.0 on node0; 2.0 on node1")
    assert "same NVIDIA driver" in found.remedy


def test_nodes_without_gpus_among_those_with_some_are_found() -> None:
    found = only(judge([report(gpus=("L4",)), report("node1", 1)]))
    assert (found.name, found.value) == ("GPUs", "none on node1, some on node0")
    assert "CUDA_VISIBLE_DEVICES" in found.remedy


@pytest.mark.parametrize("seconds", [-5.0, 2.1])
def test_a_clock_that_is_off_is_a_warning(seconds: float) -> None:
    found = only(judge([report(), report("node1", 1, clock_s=seconds, clock_bound_s=0.05)]))
    assert found.mark == "warn" and not found.is_problem
    assert f"{seconds:+.1f} s on node1" in found.value and "chrony" in found.remedy


def test_a_clock_is_not_blamed_for_a_slow_network() -> None:
    findings = judge([report(), report("node1", 1, clock_s=2.1, clock_bound_s=0.2)])
    assert named(findings, "clocks")[0].mark == "ok"


@pytest.mark.parametrize("skews", [(0.0, 0.0), (0.0, 7.0, -3.0)])
def test_clock_differences_lie_within_their_bounds(skews: tuple[float, ...]) -> None:
    # All come to a meeting at their own time and leave after the last one has come.
    comes = [[10.0 + 0.3 * rank, 20.0 - 0.1 * rank, 30.0 + 0.02 * rank] for rank in range(len(skews))]
    leaves = [[max(each[k] for each in comes) + 0.01 * (rank + 1) for k in range(3)] for rank in range(len(skews))]
    times = [
        [(a + skew, b + skew) for a, b in zip(comes[rank], leaves[rank], strict=True)]
        for rank, skew in enumerate(skews)
    ]
    offsets = clock_offsets(times)
    assert offsets[0] == (0.0, 0.0)
    for (offset, bound), skew in zip(offsets[1:], skews[1:], strict=True):
        assert abs(offset - skew) <= bound < 0.06  # that of the meeting at which they came closest together


def test_the_all_reduce_is_told_as_the_speed_of_a_link() -> None:
    (found,) = judge_group(GroupReport(4, "nccl", all_reduce_s=0.01))
    assert found.mark == "ok" and "64 MB over 4 processes in 10.0 ms by nccl: 9.60 GB/s" in found.value
    assert ALL_REDUCE_BYTES == 64_000_000


def test_an_all_reduce_that_fails_says_how_and_what_to_look_at() -> None:
    (found,) = judge_group(GroupReport(2, "nccl", fault="worker 1 on node1: no end within 90 s"))
    assert found.is_problem and found.value == "nccl failed: worker 1 on node1: no end within 90 s"
    assert "NCCL_SOCKET_IFNAME" in found.remedy and "NCCL_DEBUG" in found.remedy


def test_what_mlflow_says_is_a_line_of_the_group() -> None:
    silent = Finding("MLflow", "http://mlflow:5000 does not answer within 45 s", "start the server")
    assert judge_group(GroupReport(1, tracking=silent))[-1] is silent


@pytest.mark.parametrize("content", [None, "no database"])
def test_the_file_of_the_default_store_may_be_missing_but_not_damaged(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "mlflow.db"
    if content:
        path.write_text(content * 100)
    found = look_at_tracking(f"sqlite:///{path}")
    assert found.is_problem == bool(content) and str(path) in found.value
    assert path.exists() == bool(content)


def test_a_server_that_is_not_there_is_named_with_the_key() -> None:
    found = look_at_tracking("http://127.0.0.1:9")
    assert found.value == "http://127.0.0.1:9 cannot be used (ConnectionRefusedError: [Errno 111] Connection refused)"
    assert "tracking.uri" in found.remedy


def test_nodes_of_one_name_are_told_apart_by_their_workers() -> None:
    assert node_labels([(0, "a"), (4, "b"), (8, "a")]) == {0: "a (worker 0)", 4: "b", 8: "a (worker 8)"}


def test_numbers_of_workers_are_written_in_short() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""


def test_needs_are_those_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: {uri: [a, b], eval_uri: a, cache_gb: 2, cache_dir: scratch}\nrun: {storage: runs}\n"
        "diffusion: {num_timesteps: 10}\nsample: {steps: 5}\n"
    )
    config = load_config(path)
    needs = needs_of(config)
    here = Path.cwd()
    assert needs.datasets == (str(here / "a"), str(here / "b"))
    assert (needs.cache_dir, needs.cache_bytes) == (str(here / "scratch"), 2 * 10**9)
    assert needs.tracking == f"sqlite:///{here / 'runs' / 'mlflow.db'}"
    values = config.model_dump(mode="json")
    values["tracking"]["backend"] = "none"
    assert needs_of(parse_config(values, source="test")).tracking == ""


def test_a_node_finds_its_data_readable_and_says_what_is_not(tmp_path: Path) -> None:
    good, bad, cut = make_dataset(tmp_path, name="good"), str(tmp_path / "none"), make_dataset(tmp_path, name="cut")
    for tar in Path(cut).glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:600])
    found = probe(Needs(str(tmp_path), (good, bad, cut), str(tmp_path)), rank=0, workers=1, gpus=0)
    assert list(found.fingerprints) == [good]
    assert [problem.name for problem in found.problems] == ["data", "data"]
    assert "none is no packed dataset" in found.problems[0].value and "cut" in found.problems[1].value
    assert all("data.uri" in problem.remedy for problem in found.problems)
    assert set(found.versions) == {"python", "torch", "deepspeed", "ray", "rddm-dist", "code"}
    assert set(found.free_gb) == {"storage", "temporary"} and found.compiler and found.shared_gib > 0


def test_a_node_finds_too_few_gpus_and_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    # Nobody has as many.
    found = {problem.name: problem for problem in probe(Needs(), rank=0, workers=1, gpus=10_000).problems}
    assert "of 10000 are usable" in found["GPUs"].value and "nvidia-smi" in found["GPUs"].remedy
    assert "no-such-compiler" in found["compiler"].value and "apt-get install g++" in found["compiler"].remedy
    assert found["GPUs"].is_problem and not found["compiler"].is_problem  # GPUs do without one


def test_an_unreadable_configuration_is_a_problem_of_the_node() -> None:
    (problem, *_) = probe(Needs(fault="config x.yaml does not exist"), rank=0, workers=1, gpus=0).problems
    assert (problem.name, problem.value) == ("configuration", "config x.yaml does not exist")


def test_a_cache_that_the_disk_cannot_hold_is_a_warning(tmp_path: Path) -> None:
    needs = Needs(cache_dir=str(tmp_path), cache_bytes=10**18)
    (problem,) = probe(needs, rank=0, workers=1, gpus=0).problems
    assert problem.is_warning and "data.cache_gb=1e+09" in problem.remedy


def test_tokens_tell_one_folder_from_two_and_leave_nothing(tmp_path: Path) -> None:
    shared, private = tmp_path / "new" / "runs", tmp_path / "private"
    places = (shared, shared, private)
    nodes = [SharedFolder(str(place), "abc", rank, patience_s=0.2) for rank, place in enumerate(places)]
    assert [node.write() for node in nodes] == [None, None, None]
    assert nodes[0].look_for([(1, "node1")]) is None and nodes[1].look_for([(0, "node0")]) is None
    found = nodes[2].look_for([(0, "node0"), (1, "node1")])
    assert found and found.value == f"{private} is another place here than on node0, node1" and found.is_problem
    for node in reversed(nodes):
        node.clean()
    assert not list(tmp_path.iterdir())


def test_a_storage_that_was_there_stays(tmp_path: Path) -> None:
    node = SharedFolder(str(tmp_path), "abc", 0)
    node.write()
    assert len(list(tmp_path.iterdir())) == 1
    node.clean()
    node.clean()
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    node = SharedFolder(str(tmp_path / "file" / "runs"), "abc", 0)
    found = node.write()
    assert found and "cannot be written" in found.value and "Not a directory" in found.value
    assert "--storage" in found.remedy
    node.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_code_digest_sees_every_module(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    for package in CODE:
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = code_digest(tmp_path)
    (tmp_path / "cluster" / "notes.txt").write_text("no code")
    assert code_digest(tmp_path) == before
    module = tmp_path / "rddm_dist" / "training" / "step.py"
    module.write_text(module.read_text() + "\n")
    assert code_digest(tmp_path) != before


def test_work_that_does_not_end_is_left_behind() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        within(0.1, lambda: time.sleep(3))
    assert time.monotonic() - started < 2
    assert within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)


def test_one_process_alone_is_examined_and_its_report_is_json(tmp_path: Path) -> None:
    said: list[str] = []
    nodes, group = examine(Needs(storage=str(tmp_path)), Topology(), gpus=0, workers=2, tell=said.append)
    assert len(nodes) == 1 and not nodes[0].problems and group.processes == 1
    assert not list(tmp_path.iterdir()) and any("storage" in line for line in said)
    assert json.loads(json.dumps(dataclasses.asdict(nodes[0])))["workers"] == 2


def test_a_cluster_file_of_any_kind_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("kind: ray\naddress: http://head:8265\n")
    assert isinstance(load_cluster(path), RayCluster)
    path.write_text("kind: bus\n")
    with pytest.raises(ConfigError, match="kind=bus is no kind of cluster; choose one of ray, slurm, kubernetes"):
        load_cluster(path)
