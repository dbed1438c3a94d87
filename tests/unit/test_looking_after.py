"""Looking after launched jobs: clusters that do not answer for a while, kinds of nodes, passwords, paths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.launch import Backend, JobState
from cluster.settings import SlurmCluster, find_password
from cluster.slurm import Slurm
from cluster.submission import Job, Record, Submitted
from data_pipeline.errors import ConfigError, EnvironmentFault
from rddm_dist.cli import launch, runs
from rddm_dist.config import Config
from rddm_dist.training.standing import folder_at
from rddm_dist.training.stopping import KEEP_ENV, LAUNCH_ENV, forget_earlier_request, request_stop, stopped_for_good


class Flaky(Backend):
    """A cluster that goes away after some answers; `script`: what each call for logs gives, None: no answer."""

    def __init__(self, *script: list[str | None]) -> None:
        self._script = iter(script)

    def logs(self, submitted: Submitted, *, follow: bool) -> Iterator[str]:
        for piece in next(self._script):
            if piece is None:
                raise EnvironmentFault("no answer")
            yield piece

    def state(self, submitted: Submitted) -> JobState:
        return JobState("done")


@pytest.fixture
def submitted(tmp_path: Path) -> Submitted:
    cluster = SlurmCluster(kind="slurm", partition="cpu")
    record = Record("0001", tmp_path / "launch" / "0001", str(tmp_path / "launch" / "0001"), True)
    return Submitted(record, "slurm", "train", "tiny", str(tmp_path), cluster, {"slurm job": "1"})


def follow(backend: Backend, submitted: Submitted) -> list[str]:
    return list(runs._pieces(backend, submitted, runs._Patience()))


def test_following_goes_on_where_the_cluster_fell_silent(submitted: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "FOLLOW_AGAIN_S", 0.0)
    backend = Flaky(["one\n", "two\n", None], [None], ["one\ntw", "o\nthree\n", None], ["one\ntwo\nthree\n", "four\n"])
    assert "".join(follow(backend, submitted)) == "one\ntwo\nthree\nfour\n"


def test_a_cluster_that_never_answered_or_not_for_long_is_an_error(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EnvironmentFault, match="no answer"):
        follow(Flaky([None]), submitted)
    monkeypatch.setattr(runs, "FOLLOW_PATIENCE_S", 0.0)
    with pytest.raises(EnvironmentFault, match="no answer"):
        follow(Flaky(["one\n", None]), submitted)


def test_a_job_that_cannot_be_asked_about_is_unknown(submitted: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    state = runs.state_or_why(submitted)
    assert (state.word, "scontrol is not on this machine" in state.detail) == ("unknown", True)


def test_a_stop_told_inside_needs_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCH_ENV, "0003")
    assert not stopped_for_good(folder_at(str(tmp_path)))
    assert runs.stop(str(tmp_path), number="0003", preempted="") == 0
    assert stopped_for_good(folder_at(str(tmp_path)))


def test_a_request_since_the_job_began_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_at(str(tmp_path))
    monkeypatch.setenv(KEEP_ENV, "1")
    request_stop(folder, "while it started")
    forget_earlier_request(folder)
    assert folder.read("stop-request") == b"while it started"
    monkeypatch.delenv(KEEP_ENV)
    forget_earlier_request(folder)
    assert folder.read("stop-request") is None


SINFO = """#!/bin/sh
echo 'mixed|1-00:00:00|1-infinite|2|16|(null)'
echo 'mixed|1-00:00:00|1-infinite|8|64|gpu:h100:8(S:0-1)'
echo 'small|1:00:00|1-1|4|8|(null)'
"""


@pytest.mark.parametrize(
    ("keys", "workers", "said"),
    [
        ({"partition": "mixed", "workers_per_node": 8, "gpus_per_worker": 1}, 64, ""),
        ({"partition": "mixed", "workers_per_node": 8, "gpus_per_worker": 1}, 72, "gives at most 8"),
        ({"partition": "mixed", "workers_per_node": 16, "gpus_per_worker": 1}, 16, "has 8 GPUs a node"),
        ({"partition": "mixed"}, 10, ""),
        ({"partition": "mixed"}, 11, "gives at most 10"),
        ({"partition": "small"}, 2, "gives at most 1"),
        ({"partition": "small", "gpus_per_worker": 1}, 1, "has no GPUs"),
        ({"partition": "none"}, 1, "this Slurm has mixed, small"),
    ],
)
def test_a_partition_of_several_kinds_of_nodes(
    keys: dict[str, Any], workers: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sinfo").write_text(SINFO)
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    cluster = SlurmCluster(kind="slurm", time="30", signal_s=60, **keys)
    job = Job("train", "tiny", str(tmp_path), (), workers, cluster.gpus_per_worker, Config())
    if not said:
        Slurm(cluster).check(job)
        return
    with pytest.raises(ConfigError, match=said):
        Slurm(cluster).check(job)


def test_what_sbatch_cannot_name_is_refused(tmp_path: Path) -> None:
    cluster = SlurmCluster(kind="slurm", partition="cpu")
    for bad in ("my runs", "runs%j", "runs'"):
        home = f"/{bad}/tiny"
        record = Record("0001", Path(f"{home}/launch/0001"), f"{home}/launch/0001", True)
        with pytest.raises(ConfigError, match="does not take in the path"):
            Slurm(cluster).files(Job("train", "tiny", home, (), 1, 0, Config()), record)


def test_passwords_in_urls_are_found_wherever_they_are() -> None:
    assert find_password({"a": {"b": ["x", "https://me:secret@host/x"]}}) == "a.b[1]"
    assert find_password({"a": ("s3://bucket", "http://host:80/x@y"), "b": 3}) == ""
    with pytest.raises(ConfigError, match=r"tracking.uri holds a URL with a password"):
        launch.check_passwords(
            Job("train", "t", "/r/t", (), 1, 0, Config.model_validate({"tracking": {"uri": "https://me:x@mlflow"}}))
        )
    with pytest.raises(ConfigError, match=r"ARGUMENTS\[1\] holds"):
        launch.check_passwords(Job("evaluate", "t", "/r/t", ("--data", "http://me:x@host/data"), 1, 0))


@pytest.mark.parametrize("argument", ["runs/mine", "--out=data/x", "here"])
def test_paths_that_count_from_here_are_refused_where_jobs_start_elsewhere(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    launch._check_paths(["models:/derain@champion", "--data", "/runs/data", "s3://b/x", "--steps", "1,2", "--num=5"])
    with pytest.raises(ConfigError, match="counts from this folder"):
        launch._check_paths(["--protocol", "y", argument])
