"""What is submitted, and the record of it: `<run>/launch/<number>/` with everything that repeats it by hand."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from cluster.settings import KINDS, ClusterSettings
from cluster.settings import to_yaml as cluster_yaml
from data_pipeline import storage
from data_pipeline.errors import ConfigError, EnvironmentFault
from rddm_dist.config import Config, to_yaml
from rddm_dist.training.stopping import LAUNCHES, STOPPED_FILE

RECORD_FILE, CONFIG_FILE, CLUSTER_FILE, COMMAND_FILE, PATCH_FILE = (
    "launch.json", "config.yaml", "cluster.yaml", "command.txt", "code.patch",
)  # fmt: skip
SWEEP_FILE = "sweep.json"
LOCAL_RECORDS = "launches"  # beside the caller, of runs whose folder this machine cannot see
FORMAT = 1
JobKind = Literal["train", "evaluate", "restore", "pack"]
JOB_KINDS: tuple[JobKind, ...] = ("train", "evaluate", "restore", "pack")
# Slurm, Kubernetes (with what it appends) and Ray all take names of this form.
RUN_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. values: the keys that it sets apart."""

    name: str
    config: Config
    values: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What is to be run, whatever the cluster.

    name: of the run; home: its folder or URL as jobs see it; arguments: what follows `rddm KIND` (of train: nothing,
    its config is a file of the record); trials: of a sweep, whose `config` is what they have in common.
    """

    kind: JobKind
    name: str
    home: str
    arguments: tuple[str, ...]
    workers: int
    gpus_per_worker: int
    config: Config | None = None
    trials: tuple[Trial, ...] = ()

    def __post_init__(self) -> None:
        if not RUN_NAME.fullmatch(self.name):
            raise ConfigError(
                f"run.name={self.name} cannot name a job; use letters, digits, '-', '_' and '.', at most 63, e.g. "
                "--run derain-1"
            )

    def command(self, python: str, *, config: str, retries: int = 0, with_ray: bool = True) -> list[str]:
        """The `rddm` command that does the job. config: path or URL of the config file, of train."""
        rddm = [python, "-m", "rddm_dist.cli.main", self.kind]
        if self.kind == "train":
            options = ["--workers", str(self.workers), "--gpus-per-worker", str(self.gpus_per_worker)]
            return [*rddm, config, *options, *(["--retries", str(retries)] if retries else [])]
        given = list(self.arguments)
        if self.kind == "evaluate" and "--actors" not in given:
            given += ["--actors", str(self.workers)]
            if self.gpus_per_worker and "--gpus-per-actor" not in given:
                given += ["--gpus-per-actor", str(self.gpus_per_worker)]
        if self.kind == "pack" and with_ray and "--ray" not in given:
            given += ["--ray", "--jobs", str(self.workers)]
        return [*rddm, *given]


@dataclass(frozen=True)
class Record:
    """Where the files of one submission lie.

    local: on this machine; home: as jobs name the same folder; is_shared: whether jobs find the files there. Where they
    do not, the backend brings them along.
    """

    number: str
    local: Path
    home: str
    is_shared: bool

    def job_path(self, name: str) -> str:
        """A file of the record as jobs name it."""
        return storage.join(self.home, name)


@dataclass(frozen=True)
class Submitted:
    """A submission that has been made: what launch.json says."""

    record: Record
    backend: str
    kind: JobKind
    name: str
    home: str
    cluster: ClusterSettings
    ids: dict[str, str]
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)


def plan_record(job: Job, cluster: ClusterSettings) -> Record:
    """Where the next submission of a run is to be recorded; nothing is written."""
    launches, is_shared = _launches_here(job, cluster)
    taken = [int(path.name) for path in launches.glob("[0-9]*") if path.name.isdigit()] if launches.is_dir() else []
    if not storage.is_local(job.home):
        taken += [int(name) for name in storage.list_names(storage.join(job.home, LAUNCHES)) if name.isdigit()]
    number = f"{max(taken, default=0) + 1:04d}"
    return Record(number, launches / number, storage.join(job.home, f"{LAUNCHES}/{number}"), is_shared)


def _launches_here(job: Job, cluster: ClusterSettings) -> tuple[Path, bool]:
    """The folder of a run's records on this machine, and whether jobs see the records."""
    beside = Path(LOCAL_RECORDS).absolute() / job.name / LAUNCHES
    if not storage.is_local(job.home):
        return beside, True
    if cluster.here == "none":
        return beside, False
    home = Path(job.home) if cluster.here == "same" else Path(cluster.here).absolute() / job.name
    return home / LAUNCHES, True


def record_files(job: Job, cluster: ClusterSettings, made: Mapping[str, str], submit: list[str]) -> dict[str, str]:
    """Everything a record holds except launch.json: configs, what the backend made, the command, uncommitted code."""
    files = dict(made)
    files[CLUSTER_FILE] = cluster_yaml(cluster)
    files[COMMAND_FILE] = " ".join(submit) + "\n"
    if job.config is not None and not job.trials:
        files[CONFIG_FILE] = to_yaml(job.config)
    for trial in job.trials:
        files[f"{trial.name}.yaml"] = to_yaml(trial.config)
    if job.trials:
        files[SWEEP_FILE] = json.dumps({trial.name: trial.values for trial in job.trials}, indent=1)
    patch = code_version()[1]
    if patch:
        files[PATCH_FILE] = patch
    return files


def write_record(record: Record, files: Mapping[str, str]) -> None:
    """Write the files of a record, here and, where run folders are at a URL, there. EnvironmentFault if that fails."""
    try:
        record.local.mkdir(parents=True)
        for name, text in files.items():
            (record.local / name).write_text(text)
            if not storage.is_local(record.home):
                storage.write_bytes_atomic(record.job_path(name), text.encode())
    except FileExistsError as error:
        raise EnvironmentFault(f"{record.local} was taken by another launch just now; launch again") from error
    except OSError as error:
        drop_record(record, files)
        raise EnvironmentFault(
            f"{error.filename or record.home} cannot be written ({error.strerror or error}); change storage (or here) "
            "of the cluster file, or --storage"
        ) from error


def drop_record(record: Record, files: Mapping[str, str]) -> None:
    """Remove what a submission that failed has written, and folders that are empty then."""
    shutil.rmtree(record.local, ignore_errors=True)
    for parent in list(record.local.parents)[:2]:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
    if not storage.is_local(record.home):
        for name in files:
            storage.remove(record.job_path(name))


def write_submitted(record: Record, job: Job, cluster: ClusterSettings, ids: Mapping[str, str]) -> Submitted:
    """Write launch.json, by which status, logs and stop find the job."""
    commit, _ = code_version()
    content = {
        "format": FORMAT,
        "backend": cluster.kind,
        "job": job.kind,
        "name": job.name,
        "home": job.home,
        "number": record.number,
        "record_home": record.home,
        "is_shared": record.is_shared,
        "local": str(record.local.absolute()),
        "ids": dict(ids),
        "workers": job.workers,
        "gpus_per_worker": job.gpus_per_worker,
        "trials": {trial.name: trial.values for trial in job.trials},
        "code": {"version": version("rddm-dist"), "commit": commit},
        "submitted": {"time": time.time(), "by": getpass.getuser(), "from": socket.gethostname()},
        "cluster": cluster.model_dump(mode="json"),
    }
    text = json.dumps(content, indent=1)
    (record.local / RECORD_FILE).write_text(text)
    if not storage.is_local(record.home):
        storage.write_bytes_atomic(record.job_path(RECORD_FILE), text.encode())
    return _submitted(content, record.local)


def find_submitted(run: str) -> Submitted | None:
    """The newest submission of a run: its folder or URL, or `launches/NAME`. None where there is none."""
    launches = storage.join(run, LAUNCHES)
    try:
        numbers = sorted(name for name in storage.list_names(launches) if name.isdigit())
    except OSError as error:
        raise EnvironmentFault(f"{launches} cannot be read ({error.strerror or error}); check RUN") from error
    for number in reversed(numbers):
        place = storage.join(launches, number)
        try:
            content = json.loads(storage.read_bytes(storage.join(place, RECORD_FILE)))
        except FileNotFoundError:
            continue  # a submission that came to nothing
        return _submitted(content, Path(place if storage.is_local(run) else content["local"]))
    return None


def is_stopped(submitted: Submitted) -> bool:
    """Whether a person stopped it, as far as can be seen here."""
    if not storage.is_local(submitted.home):
        return storage.exists(submitted.record.job_path(STOPPED_FILE))
    return (submitted.record.local / STOPPED_FILE).exists()


def _submitted(content: Mapping[str, Any], local: Path) -> Submitted:
    record = Record(content["number"], local, content["record_home"], content["is_shared"])
    cluster = KINDS[content["backend"]].model_validate(content["cluster"])
    return Submitted(
        record, content["backend"], content["job"], content["name"], content["home"], cluster, content["ids"],
        content["trials"],
    )  # fmt: skip


def code_version() -> tuple[str, str]:
    """The commit of this code, and what has been changed since: ("", "") outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return "", ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout

    return git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--", "*.py")
