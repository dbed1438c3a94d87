"""Jobs on a Ray cluster that is there, sent to its dashboard: what `ray job submit` does, checked and recorded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import aiohttp
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.runtime_env import RuntimeEnv
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from cluster.launch import JobState
from cluster.ray_session import actors_that_fit, may_grow
from cluster.settings import RayCluster
from cluster.submission import CONFIG_FILE, SWEEP_FILE, Job, Record, Submitted
from data_pipeline import storage
from data_pipeline.errors import ConfigError, EnvironmentFault
from rddm_dist.training.stopping import LAUNCH_ENV

ENTRY_FILE, SUBMIT_FILE = "entrypoint.sh", "submit.sh"
JOB_ID = "submission_id"  # key of what finds a job again
RESUMABLE = 75
PROBE_S = 10.0
INSIDE_S, INSIDE_POLL_S = 120.0, 0.5
MOST_NODES = 10_000  # the most that Ray's state API gives
DETAIL_CHARS = 200
# They tell on the console what they upload, and that a connection was closed.
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
# With these Ray begins what a job prints; `ray job logs` shows them.
PREAMBLE = re.compile(r"(\d{4}-\d\d-\d\d [\d:,]+\s+INFO job_manager\.py|Running entrypoint for job )")
# Where set, Ray's clients ask them and not the address that they are given.
ADDRESS_ENV = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


class RayJobs:
    """The jobs of a Ray cluster, by the REST interface of its dashboard."""

    def __init__(self, settings: RayCluster) -> None:
        self._settings = settings

    def check(self, job: Job) -> None:
        """The dashboard answers and takes our token, the versions fit, the cluster can hold the job."""
        settings = self._settings
        with _asking(settings.address):
            version = self._client()._server_ray_version  # what its public method of that name tells is another one
            with _ray_address_unset():
                nodes = list_nodes(address=settings.address, limit=MOST_NODES)
        if version != ray.__version__:
            raise EnvironmentFault(
                f"the cluster at {settings.address} runs Ray {version}, this machine has {ray.__version__}; have the "
                "same version on both"
            )
        alive = [node for node in nodes if node.state == "ALIVE"]
        if not may_grow(node.labels or {} for node in alive):
            check_room(job, settings, [node.resources_total for node in alive])

    def files(self, job: Job, record: Record) -> dict[str, str]:
        check_runtime_env(self._settings.runtime_env)
        return {ENTRY_FILE: self._entrypoint(job), SUBMIT_FILE: self._submit_script(job, record)}

    def command(self, job: Job, record: Record) -> list[str]:
        return ["sh", str(record.local / SUBMIT_FILE)]

    def submit(self, job: Job, record: Record) -> dict[str, str]:
        settings = self._settings
        with _asking(settings.address):
            client = self._client()
            # Ray never takes an id twice: a run of that name was launched there before, and its folder removed.
            taken = {details.submission_id for details in client.list_jobs()}
            job_id = plain = _job_id(job, record)
            while job_id in taken:
                job_id = f"{plain}-{uuid.uuid4().hex[:6]}"
            client.submit_job(
                entrypoint=f"sh {ENTRY_FILE}",
                submission_id=job_id,
                runtime_env={"working_dir": str(record.local), **self._runtime_env(record)},
                metadata=self._metadata(job, record),
                entrypoint_num_cpus=settings.entrypoint_cpus or None,
                entrypoint_resources=dict(settings.entrypoint_resources) or None,
            )
        return {JOB_ID: job_id}

    def state(self, submitted: Submitted) -> JobState:
        with _asking(self._settings.address):
            client = self._client()
            try:
                info = client.get_job_info(submitted.ids[JOB_ID])
            except RuntimeError as error:
                if "404" in str(error):
                    return JobState("gone", "the cluster does not know the job; it was started anew, or deleted it")
                raise
        return state_of(info.status, info.message or "", info.driver_exit_code)

    def logs(self, submitted: Submitted, *, follow: bool) -> Iterator[str]:
        job_id = submitted.ids[JOB_ID]
        with _asking(self._settings.address):
            client = self._client()
            pieces = _tail(client, job_id) if follow else iter([client.get_job_logs(job_id)])
            yield from without_preamble(pieces)

    def cancel(self, submitted: Submitted) -> None:
        with _asking(self._settings.address):
            self._client().stop_job(submitted.ids[JOB_ID])

    def run_inside(self, submitted: Submitted, command: list[str]) -> None:
        """By a second job, which is waited for. `rddm` of the command is that of the cluster."""
        job_id = f"{submitted.ids[JOB_ID]}-{command[1]}-{uuid.uuid4().hex[:6]}"
        words = [*self._rddm(), *command[1:]] if command[0] == "rddm" else command
        with _asking(self._settings.address):
            client = self._client()
            client.submit_job(
                entrypoint=shlex.join(words),
                submission_id=job_id,
                runtime_env={"env_vars": dict(self._settings.env), **self._settings.runtime_env},
            )
            deadline = time.monotonic() + INSIDE_S
            while not (info := client.get_job_info(job_id)).status.is_terminal():
                if time.monotonic() > deadline:
                    raise EnvironmentFault(
                        f"`{shlex.join(command)}` did not end within {INSIDE_S:.0f} s on the cluster; see ray job logs "
                        f"{job_id} --address {self._settings.address}"
                    )
                time.sleep(INSIDE_POLL_S)
        if info.status != JobStatus.SUCCEEDED:
            raise EnvironmentFault(f"`{shlex.join(command)}` failed on the cluster: {last_words(info.message or '')}")

    def _client(self) -> JobSubmissionClient:
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        probe(self._settings.address)
        with _ray_address_unset():
            return JobSubmissionClient(self._settings.address)

    def _rddm(self) -> list[str]:
        return [self._settings.python, "-m", "rddm_dist.cli.main"]

    def _entrypoint(self, job: Job) -> str:
        """What Ray runs, in a folder with a copy of the record: so it finds the config, whatever it sees of ours."""
        settings = self._settings
        size = ["--workers", str(job.workers), "--gpus-per-worker", str(job.gpus_per_worker)]
        config = f"{job.trials[0].name}.yaml" if job.trials else CONFIG_FILE
        lines = []
        if job.kind != "train" and settings.here == "same":
            lines.append(["cd", str(Path.cwd())])  # the paths of its arguments count from here
        if settings.preflight:
            of_what = [config] if job.kind == "train" else ["--storage", _parent(job.home)]
            lines.append([*self._rddm(), "doctor", "cluster", *of_what, *size])
        if job.trials:
            tune = [settings.python, "-m", "cluster.ray_tune", SWEEP_FILE, *size]
            lines.append(["exec", *tune, "--retries", str(settings.retries), *self._train_options()])
        else:
            command = job.command(settings.python, config=config, retries=settings.retries)
            lines.append(["exec", *command, *(self._train_options() if job.kind == "train" else [])])
        told = "# Runs on the cluster, in a folder with a copy of this one; sent by submit.sh."
        return "\n".join(["#!/bin/sh", told, "set -e", *map(shlex.join, lines)]) + "\n"

    def _train_options(self) -> list[str]:
        settings = self._settings
        cpus = ["--cpus-per-worker", str(settings.cpus_per_worker)] if settings.cpus_per_worker > 1 else []
        return [*cpus, "--wait-s", str(settings.wait_s)]

    def _submit_script(self, job: Job, record: Record) -> str:
        """The same submission with Ray's own tool."""
        settings = self._settings
        options = [
            "--address", settings.address,
            "--working-dir", str(record.local),
            "--runtime-env-json", json.dumps(self._runtime_env(record)),
            "--metadata-json", json.dumps(self._metadata(job, record)),
        ]  # fmt: skip
        if settings.entrypoint_cpus:
            options += ["--entrypoint-num-cpus", f"{settings.entrypoint_cpus:g}"]
        if settings.entrypoint_resources:
            options += ["--entrypoint-resources", json.dumps(settings.entrypoint_resources)]
        unset = [word for name in ADDRESS_ENV for word in ("-u", name)]
        command = shlex.join(["env", *unset, "ray", "job", "submit", *options])
        return (
            "#!/bin/sh\n"
            "# The submission by hand. Ray takes an id once: give another one as the argument to submit it again.\n"
            "# A cluster that asks for a token wants RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.\n"
            f'exec {command} --submission-id "${{1:-{_job_id(job, record)}}}" -- sh {ENTRY_FILE}\n'
        )

    def _runtime_env(self, record: Record) -> dict[str, Any]:
        return {"env_vars": {**self._settings.env, LAUNCH_ENV: record.number}, **self._settings.runtime_env}

    def _metadata(self, job: Job, record: Record) -> dict[str, str]:
        ours = {"run": job.name, "launch": record.number, "home": job.home, "job": job.kind}
        return {**self._settings.metadata, **ours}


def _job_id(job: Job, record: Record) -> str:
    return f"{job.name}-{record.number}"


def _parent(home: str) -> str:
    """The storage that a run folder is in."""
    return str(Path(home).parent) if storage.is_local(home) else home.rstrip("/").rpartition("/")[0]


def check_runtime_env(given: Mapping[str, Any]) -> None:
    """Raise ConfigError where Ray would pass over a key, or take none of it."""
    unknown = sorted(set(given) - RuntimeEnv.known_fields)
    if unknown:
        ours = {"working_dir", "env_vars"}
        known = ", ".join(sorted(name for name in RuntimeEnv.known_fields - ours if not name.startswith("_")))
        raise ConfigError(f"unknown key runtime_env.{unknown[0]} of the cluster file; Ray knows {known}")
    try:
        RuntimeEnv(**given)
    except (TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:DETAIL_CHARS]
        raise ConfigError(f"runtime_env of the cluster file is none that Ray takes: {said}") from error


def check_room(job: Job, settings: RayCluster, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ConfigError where nodes with these resources, when they are idle, cannot hold the job.

    How many CPUs the actors of other jobs than training take is theirs to know; of those only GPUs are looked at.
    """
    asked = {**settings.entrypoint_resources, **({"CPU": settings.entrypoint_cpus} if settings.entrypoint_cpus else {})}
    hosts = [node for node in nodes if all(node.get(name, 0.0) >= amount for name, amount in asked.items())]
    if not hosts:
        raise ConfigError(
            f"no node of the cluster has {_listed(asked)} for the command that drives the workers; change "
            "entrypoint_cpus or entrypoint_resources of the cluster file"
        )
    cpus = settings.cpus_per_worker if job.kind == "train" else 0
    gpus = job.gpus_per_worker
    if not (cpus or gpus):
        return

    def fit(node: Mapping[str, float]) -> int:
        return actors_that_fit([node], cpus=cpus, gpus=gpus)

    def fit_beside(node: Mapping[str, float]) -> int:
        return fit({**node, "CPU": node.get("CPU", 0.0) - settings.entrypoint_cpus})

    room = sum(map(fit, nodes)) - min(fit(node) - fit_beside(node) for node in hosts)
    if room < job.workers:
        each = _listed({"CPU": cpus, **({"GPU": gpus} if gpus else {})})
        raise ConfigError(
            f"--workers {job.workers} with {each} each do not fit: the cluster at {settings.address} has "
            f"{len(nodes)} node(s) with room for {room}; lower --workers or --gpus-per-worker, or add nodes"
        )


def _listed(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def state_of(status: JobStatus, message: str, exit_code: int | None) -> JobState:
    """Ray's word for how a job is doing, in ours. A command that saved and stopped has failed for Ray."""
    if status == JobStatus.PENDING:
        return JobState("pending", " ".join(message.split())[:DETAIL_CHARS])
    if status == JobStatus.RUNNING:
        return JobState("running")
    if status == JobStatus.SUCCEEDED:
        return JobState("done", exit_code=0)
    if status == JobStatus.STOPPED:
        return JobState("stopped", "ended by ray job stop")
    if exit_code == RESUMABLE:
        return JobState("stopped", exit_code=exit_code)
    return JobState("failed", last_words(message), exit_code)


def last_words(message: str) -> str:
    """What a job that failed says itself: its error line, else the last line of what Ray quotes."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:DETAIL_CHARS]


def probe(address: str) -> None:
    """Find out, within PROBE_S, whether a Ray dashboard answers. Raises EnvironmentFault."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=PROBE_S) as response:
            is_ray = "ray_version" in json.load(response)
    except urllib.error.HTTPError as error:
        is_ray = error.code in (401, 403)  # it wants a token
    except (OSError, ValueError) as error:  # ValueError: not JSON
        reason = getattr(error, "reason", error)
        raise _unreachable(address, str(getattr(reason, "strerror", None) or reason)) from error
    if not is_ray:
        raise _unreachable(address, "another server does")


def _unreachable(address: str, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"no Ray dashboard answers at {address} ({why}); check address of the cluster file, and that the cluster runs "
        "(ray start --head --dashboard-host)"
    )


@contextlib.contextmanager
def _asking(address: str) -> Iterator[None]:
    """What goes wrong between us and the dashboard, in one line."""
    try:
        yield
    except AuthenticationError as error:
        is_refused = "invalid" in str(error).lower()
        raise EnvironmentFault(
            f"the Ray cluster at {address} {'refuses our token' if is_refused else 'asks for a token'}; set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it"
        ) from error
    except (OSError, RuntimeError, aiohttp.ClientError, RayStateApiException) as error:
        said = " ".join(str(error).split())[:DETAIL_CHARS]
        raise EnvironmentFault(f"the Ray dashboard at {address} does not do as asked: {said}") from error


@contextlib.contextmanager
def _ray_address_unset() -> Iterator[None]:
    """Without the variables that Ray's clients prefer to the address that they are given."""
    kept = {name: os.environ.pop(name) for name in ADDRESS_ENV if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def without_preamble(pieces: Iterator[str]) -> Iterator[str]:
    """What a job prints, without the lines that Ray puts before it."""
    begin = ""
    for piece in pieces:
        begin += piece
        while (line := begin.partition("\n"))[1] and PREAMBLE.match(line[0]):
            begin = line[2]
        if line[1]:  # a whole line, of the job
            break
    if begin and not PREAMBLE.match(begin):
        yield begin
    yield from pieces


def _tail(client: JobSubmissionClient, job_id: str) -> Iterator[str]:
    """What a job prints, until it ends."""
    loop = asyncio.new_event_loop()
    pieces = cast(AsyncGenerator[str, None], client.tail_job_logs(job_id))
    try:
        while (piece := loop.run_until_complete(anext(pieces, None))) is not None:
            yield piece
    finally:
        loop.run_until_complete(pieces.aclose())
        loop.close()
