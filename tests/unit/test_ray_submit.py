"""Jobs for a Ray cluster, without one: what is sent, by hand and by us, what fits, and what an end means."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.dashboard.modules.job.cli import submit as ray_job_submit
from ray.job_submission import JobStatus

from cluster.launch import JobState, Plan, make_plan
from cluster.ray_submit import (
    ENTRY_FILE,
    SUBMIT_FILE,
    RayJobs,
    check_room,
    last_words,
    probe,
    state_of,
    without_preamble,
)
from cluster.settings import RayCluster
from cluster.submission import Job, JobKind, Trial
from data_pipeline.errors import ConfigError, EnvironmentFault
from rddm_dist.cli.runs import CODES
from rddm_dist.config import load_config
from tests.support.processes import free_port
from tests.support.runs import write_config

ADDRESS = "http://head:8265"
RDDM = ["/venv/bin/python", "-m", "rddm_dist.cli.main"]


def cluster(**keys: Any) -> RayCluster:
    return RayCluster(kind="ray", address=ADDRESS, python="/venv/bin/python", **keys)


def plan_of(folder: Path, settings: RayCluster, *, kind: JobKind = "train", trials: bool = False) -> Plan:
    """Of a run called derain by two workers with a GPU each."""
    config = load_config(str(write_config(folder, str(folder / "data"))), ["run.name=derain"])
    home, runs = str(folder / "runs" / "derain"), (Trial("derain-1", config, {"optim.lr": 1e-4}),) if trials else ()
    arguments = () if kind == "train" else ("my model", "--data", "d")
    made = Job(kind, "derain", home, arguments, 2, 1, config if kind == "train" else None, runs)
    return make_plan(made, settings)


def lines(plan: Plan) -> list[list[str]]:
    """The commands of the entry point, as a shell takes them apart."""
    return [shlex.split(line) for line in plan.files[ENTRY_FILE].splitlines() if not line.startswith("#")]


def test_the_entry_point_looks_at_the_nodes_then_trains(tmp_path: Path) -> None:
    size = ["--workers", "2", "--gpus-per-worker", "1"]
    assert lines(plan_of(tmp_path, cluster(retries=5, cpus_per_worker=8, wait_s=90))) == [
        ["set", "-e"],
        [*RDDM, "doctor", "cluster", "config.yaml", *size],
        ["exec", *RDDM, "train", "config.yaml", *size, "--retries", "5", "--cpus-per-worker", "8", "--wait-s", "90"],
    ]
    bare = lines(plan_of(tmp_path, cluster(retries=0, preflight=False)))
    assert bare == [["set", "-e"], ["exec", *RDDM, "train", "config.yaml", *size, "--wait-s", "600"]]


def test_the_entry_point_of_another_job_counts_paths_from_here(tmp_path: Path) -> None:
    size = ["--actors", "2", "--gpus-per-actor", "1"]
    job = [*RDDM, "evaluate", "my model", "--data", "d", *size]
    here = lines(plan_of(tmp_path, cluster(preflight=False), kind="evaluate"))
    assert here == [["set", "-e"], ["cd", str(Path.cwd())], ["exec", *job]]
    away = cluster(here="none", storage="/runs")
    look = [*RDDM, "doctor", "cluster", "--storage", str(tmp_path / "runs"), "--workers", "2", "--gpus-per-worker", "1"]
    assert lines(plan_of(tmp_path, away, kind="evaluate")) == [["set", "-e"], look, ["exec", *job]]


def test_the_entry_point_of_a_sweep_is_ray_tune_after_a_look_with_the_first_trial(tmp_path: Path) -> None:
    look, tune = lines(plan_of(tmp_path, cluster(), trials=True))[1:]
    size = ["--workers", "2", "--gpus-per-worker", "1"]
    assert look == [*RDDM, "doctor", "cluster", "derain-1.yaml", *size]
    begin = ["exec", "/venv/bin/python", "-m", "cluster.ray_tune", "sweep.json"]
    assert tune == [*begin, *size, "--retries", "3", "--wait-s", "600"]


def test_the_script_is_taken_by_ray_s_own_tool_and_sends_what_we_send(tmp_path: Path) -> None:
    settings = cluster(
        env={"NCCL_SOCKET_IFNAME": "ib0"}, runtime_env={"pip": ["einops"]}, metadata={"team": "it's ours", "run": "x"},
        entrypoint_cpus=0.5, entrypoint_resources={"on-demand": 0.01},
    )  # fmt: skip
    plan = plan_of(tmp_path, settings)
    command = plan.files[SUBMIT_FILE].splitlines()[-1]
    words = shlex.split(command.replace('"${1:-derain-0001}"', "derain-0001"))
    before = ["exec", "env", "-u", "RAY_ADDRESS", "-u", "RAY_API_SERVER_ADDRESS", "ray", "job", "submit"]
    assert words[: len(before)] == before
    given = ray_job_submit.make_context("submit", words[len(before) :]).params
    assert (given["address"], given["submission_id"], given["entrypoint"]) == (
        ADDRESS, "derain-0001", ("sh", ENTRY_FILE),
    )  # fmt: skip
    assert given["working_dir"] == str(tmp_path / "runs" / "derain" / "launch" / "0001")
    backend = RayJobs(settings)
    assert plan.command == ["sh", f"{given['working_dir']}/{SUBMIT_FILE}"]
    env = {"env_vars": {"NCCL_SOCKET_IFNAME": "ib0", "RDDM_LAUNCH": "0001"}, "pip": ["einops"]}
    assert backend._runtime_env(plan.record) == env and json.loads(given["runtime_env_json"]) == env
    told = {
        "team": "it's ours",
        "run": "derain",
        "launch": "0001",
        "home": str(tmp_path / "runs/derain"),
        "job": "train",
    }
    assert backend._metadata(plan.job, plan.record) == told and json.loads(given["metadata_json"]) == told
    assert given["entrypoint_num_cpus"] == 0.5 and json.loads(given["entrypoint_resources"]) == {"on-demand": 0.01}


QUOTED = (
    "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):\n"
    "starting Ray and 2 worker(s)\nerror: data.uri=/data is not there; check it\nsome library says goodbye\n"
)


@pytest.mark.parametrize(
    ("status", "message", "exit_code", "state", "code"),
    [
        (JobStatus.PENDING, "Job has not started\n  yet.", None, JobState("pending", "Job has not started yet."), None),
        (JobStatus.RUNNING, "Job is currently running.", None, JobState("running"), None),
        (JobStatus.SUCCEEDED, "Job finished successfully.", 0, JobState("done", "", 0), 0),
        (JobStatus.STOPPED, "", None, JobState("stopped", "ended by ray job stop"), 75),
        (JobStatus.FAILED, QUOTED, 75, JobState("stopped", "", 75), 75),
        (JobStatus.FAILED, QUOTED, 2, JobState("failed", "error: data.uri=/data is not there; check it", 2), 2),
        (JobStatus.FAILED, "The node of the job died.", None, JobState("failed", "The node of the job died."), 1),
    ],
)
def test_what_ray_says_of_a_job_in_our_words(
    status: JobStatus, message: str, exit_code: int | None, state: JobState, code: int | None
) -> None:
    """A run that saved and stopped has failed for Ray, and for us it goes on with the next launch."""
    found = state_of(status, message, exit_code)
    assert found == state
    assert (found.exit_code if found.exit_code is not None else CODES.get(found.word)) == code


def test_the_last_words_of_a_job_are_its_error_else_its_last_line() -> None:
    assert last_words("one\n\ntwo\n") == "two" and last_words("") == ""
    assert len(last_words("x" * 1000)) == 200


PREAMBLE = (
    "2026-01-02 03:04:05,678\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
    "Running entrypoint for job derain-0001: sh entrypoint.sh\n"
)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_a_job_prints_is_shown_without_what_ray_says_before_it(size: int) -> None:
    said = "starting Ray\nRunning entrypoint for job x: quoted by the job\nno end of line"
    whole = PREAMBLE + said
    pieces = [whole[begin : begin + size] for begin in range(0, len(whole), size)]
    assert "".join(without_preamble(iter(pieces))) == said
    assert "".join(without_preamble(iter([PREAMBLE]))) == ""
    assert "".join(without_preamble(iter(["short"]))) == "short" and list(without_preamble(iter([]))) == []


GPUS, CPUS = {"CPU": 8.0, "GPU": 4.0}, {"CPU": 2.0}


@pytest.mark.parametrize(
    ("keys", "gpus", "workers", "nodes", "said"),
    [
        ({"cpus_per_worker": 2}, 1, 8, [GPUS, GPUS], ""),
        ({"cpus_per_worker": 2}, 1, 9, [GPUS, GPUS], "with 2 CPU and 1 GPU each do not fit: .* room for 8;"),
        ({}, 8, 1, [GPUS, GPUS], "2 node.s. with room for 0;"),  # a worker is on one node
        ({}, 1, 1, [CPUS, CPUS], "room for 0; lower --workers or --gpus-per-worker"),
        ({}, 0, 4, [CPUS, CPUS], ""),
        # The command that drives the workers takes a core of theirs, if there is no other.
        ({"entrypoint_cpus": 1}, 0, 4, [CPUS, CPUS], "--workers 4 .* room for 3;"),
        ({"entrypoint_cpus": 1}, 0, 4, [CPUS, CPUS, {"CPU": 1.0}], ""),
        ({"entrypoint_resources": {"head": 0.1}}, 0, 4, [CPUS, CPUS], "no node of the cluster has 0.1 head"),
        ({"entrypoint_resources": {"head": 0.1}}, 0, 4, [CPUS, {**CPUS, "head": 1.0}], ""),
        ({}, 0, 1, [], "no node of the cluster"),
    ],
)
def test_more_than_the_nodes_hold_is_refused(
    keys: dict[str, Any], gpus: int, workers: int, nodes: list[dict[str, float]], said: str
) -> None:
    job = Job("train", "derain", "/runs/derain", (), workers, gpus)
    if not said:
        check_room(job, cluster(**keys), nodes)
        return
    with pytest.raises(ConfigError, match=said) as caught:
        check_room(job, cluster(**keys), nodes)
    assert "\n" not in str(caught.value)


def test_who_answers_at_the_address_is_found_out() -> None:
    probe_of = {200: '{"ray_version": "2.60.0"}', 401: "", 403: ""}
    for status, text in probe_of.items():  # those who want a token are asked again, with it
        with server(status, text) as address:
            probe(address)
    for status, text in ((200, '{"version": 1}'), (200, "<html>"), (404, "")):
        with server(status, text) as address, pytest.raises(EnvironmentFault, match=f"answers at {address} "):
            probe(address)
    with pytest.raises(EnvironmentFault, match="Connection refused.*check address of the cluster file"):
        probe(f"http://127.0.0.1:{free_port()}")


@contextmanager
def server(status: int, text: str) -> Iterator[str]:
    """A web server that answers everything so.   -> its address"""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as answering:
        threading.Thread(target=answering.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{answering.server_port}"
        answering.shutdown()
