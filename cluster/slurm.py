"""Slurm: jobs through sbatch, asked about through scontrol, checked against sinfo before anything is submitted."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.launch import ENDED, JobState, Word
from cluster.settings import SlurmCluster
from cluster.slurm_script import SCRIPT_FILE, check_path, nodes_of, render
from cluster.submission import Job, Record, Submitted, is_stopped
from data_pipeline import storage
from data_pipeline.errors import ConfigError, EnvironmentFault

TIMEOUT_S = 60.0
FOLLOW_S = 1.0
PARTITION = "%R|%l|%s|%D|%c|%G"  # name, time limit, job size, nodes, CPUs of a node, generic resources
WORDS: dict[str, Word] = {
    "PENDING": "pending", "CONFIGURING": "pending", "REQUEUED": "pending", "SUSPENDED": "pending",
    "RUNNING": "running", "COMPLETING": "running", "STOPPED": "running", "SIGNALING": "running",
    "COMPLETED": "done",
}  # fmt: skip


@dataclass(frozen=True)
class Partition:
    """What sinfo says of the nodes of one kind in a partition. max_nodes and minutes: None where unlimited; cpus, gpus:
    of a node."""

    name: str
    minutes: int | None
    max_nodes: int | None
    nodes: int
    cpus: int
    gpus: int


class Slurm:
    """The cluster that sbatch of this machine submits to."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self._cluster = cluster

    def check(self, job: Job) -> None:
        self._check_form(job)
        asked = _slurm("sinfo", "--noheader", f"--format={PARTITION}")
        partitions = [_partition(line) for line in asked.splitlines()]
        self._check_partition(job, partitions)

    def _check_form(self, job: Job) -> None:
        cluster = self._cluster
        if storage.is_local(job.home) and cluster.here == "none":
            raise ConfigError(
                "here=none does not fit Slurm, whose scripts and logs lie on a file system that nodes share; set here "
                "to the path of storage on this machine"
            )
        nodes = nodes_of(cluster, job)
        if nodes > 1 and job.workers % cluster.workers_per_node:
            raise ConfigError(
                f"--workers {job.workers} is no multiple of workers_per_node={cluster.workers_per_node}; nodes would "
                f"be unequal, so ask for {nodes * cluster.workers_per_node}"
            )
        if cluster.form == "torchrun" and job.kind != "train" and nodes > 1:
            raise ConfigError(
                f"--job {job.kind} on {nodes} nodes needs Ray; set form to ray in the cluster file, or ask for at most "
                f"--workers {cluster.workers_per_node}"
            )
        if cluster.form == "torchrun" and job.kind == "restore" and job.workers > 1:
            raise ConfigError(f"--job restore is one process, --workers {job.workers} are asked for; leave it out")

    def _check_partition(self, job: Job, partitions: list[Partition]) -> None:
        cluster = self._cluster
        groups = [each for each in partitions if each.name == cluster.partition]
        if not groups:
            known = ", ".join(sorted({each.name for each in partitions}))
            raise ConfigError(f"partition={cluster.partition} does not exist; this Slurm has {known}")
        of_node = min(job.workers, cluster.workers_per_node)
        cpus, gpus = of_node * cluster.cpus_per_worker, of_node * job.gpus_per_worker
        fit = [each for each in groups if each.cpus >= cpus and each.gpus >= gpus]
        found = max(fit or groups, key=lambda each: (each.gpus, each.cpus))
        nodes, most = nodes_of(cluster, job), sum(each.nodes for each in fit or groups)
        most = min(most, found.max_nodes or most)
        if nodes > most:
            raise ConfigError(
                f"--workers {job.workers} need {nodes} nodes (workers_per_node={cluster.workers_per_node}), partition "
                f"{found.name} gives at most {most}; lower --workers"
            )
        if of_node * job.gpus_per_worker > found.gpus:
            has = f"{found.gpus} GPUs a node" if found.gpus else "no GPUs"
            raise ConfigError(
                f"--gpus-per-worker {job.gpus_per_worker} with {of_node} workers a node asks for "
                f"{of_node * job.gpus_per_worker} GPUs, partition {found.name} has {has}; change partition or "
                "gpus_per_worker"
            )
        if of_node * cluster.cpus_per_worker > found.cpus:
            raise ConfigError(
                f"cpus_per_worker={cluster.cpus_per_worker} with {of_node} workers a node asks for "
                f"{of_node * cluster.cpus_per_worker} CPUs, nodes of partition {found.name} have {found.cpus}; "
                "lower one"
            )
        asked = minutes(cluster.time)
        if found.minutes is not None and asked is not None and asked > found.minutes:
            raise ConfigError(
                f"time={cluster.time} is more than partition {found.name} allows ({found.minutes} minutes); lower it: "
                "the run goes on in the next start"
            )
        if asked is not None and asked * 60 <= cluster.signal_s:
            raise ConfigError(
                f"signal_s={cluster.signal_s} is not less than time={cluster.time}; the run would be stopped at once"
            )

    def files(self, job: Job, record: Record) -> dict[str, str]:
        self._check_form(job)
        check_path(job, record)
        return {SCRIPT_FILE: render(self._cluster, job, record)}

    def command(self, job: Job, record: Record) -> list[str]:
        return ["sbatch", str(record.local / SCRIPT_FILE)]

    def submit(self, job: Job, record: Record) -> dict[str, str]:
        said = _slurm("sbatch", "--parsable", str(record.local / SCRIPT_FILE))
        return {"slurm job": said.strip().partition(";")[0]}

    def state(self, submitted: Submitted) -> JobState:
        job_id = submitted.ids["slurm job"]
        finished = _run("scontrol", "--oneliner", "show", "job", job_id)
        if finished.returncode:
            return self._remembered(submitted, finished.stderr)
        states = [_state(_fields(line)) for line in finished.stdout.splitlines() if line.startswith("JobId=")]
        state = states[0] if len(states) == 1 else _together(states)
        # Of a run at a URL its exit code is 0 then, see the script.
        return replace(state, word="stopped", exit_code=75) if state.word == "done" and is_stopped(submitted) else state

    def _remembered(self, submitted: Submitted, said: str) -> JobState:
        """The state of a job that Slurm has forgotten, by what its script has left."""
        if "Invalid job id" not in said:
            raise EnvironmentFault(f"scontrol: {_one_line(said)}")
        codes = [int(path.read_text()) for path in submitted.record.local.glob("ended-*")]
        if not codes or (submitted.trials and len(codes) < len(submitted.trials)):
            return JobState("gone", "Slurm has forgotten the job, and its script left no exit code")
        return _together([_of_code(code) for code in codes]) if submitted.trials else _of_code(codes[0])

    def logs(self, submitted: Submitted, *, follow: bool) -> Iterator[str]:
        """The output of the batch script; of an array, that of its tasks one after the other."""
        read: dict[Path, int] = {}
        while True:
            is_over = not follow or self.state(submitted).word in ENDED
            for path in sorted(submitted.record.local.glob("slurm-*.log")):
                with open(path, errors="replace") as file:
                    file.seek(read.get(path, 0))
                    piece = file.read()
                    read[path] = file.tell()
                if piece:
                    yield piece
            if is_over:
                return
            time.sleep(FOLLOW_S)

    def cancel(self, submitted: Submitted) -> None:
        _slurm("scancel", submitted.ids["slurm job"])

    def run_inside(self, submitted: Submitted, command: list[str]) -> None:
        raise EnvironmentFault(f"{submitted.home} cannot be seen from here; run this where it can: {' '.join(command)}")


def minutes(text: str) -> int | None:
    """A time limit as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.   -> minutes, None for no limit"""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        return None  # infinite, n/a
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, mins = (*parts, 0)[:2]
    elif len(parts) == 3:
        hours, mins = parts[:2]
    else:
        hours, mins = 0, parts[0]
    return int(days or 0) * 1440 + hours * 60 + mins


def _partition(line: str) -> Partition:
    name, limit, size, nodes, cpus, resources = line.strip().split("|")
    most = re.search(r"(\d+)$", size)
    gpus = [int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", resources)]
    cores = re.match(r"\d+", cpus)
    return Partition(
        name,
        minutes(limit),
        int(most.group()) if most else None,
        int(nodes),
        int(cores.group()) if cores else 0,
        max(gpus, default=0),
    )


def _state(fields: dict[str, str]) -> JobState:
    """What scontrol says of one job or one task of an array."""
    state = fields["JobState"].split()[0]
    word = WORDS.get(state, "failed")
    code = int(fields["ExitCode"].partition(":")[0])
    restarts = f", started again {fields['Restarts']} time(s)" if fields.get("Restarts", "0") != "0" else ""
    if word == "pending":
        return JobState(word, f"{state}, {fields['Reason']}{restarts}")
    if word == "running":
        return JobState(word, f"on {fields['NodeList']}{restarts}")
    if state in ("COMPLETED", "FAILED"):
        of_code = _of_code(code)
        return JobState(of_code.word, f"{state}{restarts}", code)
    return JobState("failed", f"{state}{restarts}")


def _of_code(code: int) -> JobState:
    word: Word = {0: "done", 75: "stopped"}.get(code, "failed")  # type: ignore[assignment]
    return JobState(word, exit_code=code)


def _together(states: list[JobState]) -> JobState:
    """The state of an array: it runs while one task does, and has failed when one has."""
    counts = {each: sum(state.word == each for state in states) for each in WORDS_IN_ORDER}
    detail = ", ".join(f"{count} {each}" for each, count in counts.items() if count)
    word: Word = next((each for each in WORDS_IN_ORDER if counts[each]), "gone")
    codes: dict[Word, int] = {"done": 0, "stopped": 75, "failed": 1}
    return JobState(word, detail, codes.get(word))


WORDS_IN_ORDER: tuple[Word, ...] = ("running", "pending", "failed", "stopped", "done")


def _fields(line: str) -> dict[str, str]:
    """The Key=Value pairs of one line of scontrol; values may hold spaces and equal signs."""
    parts = re.split(r"(?:^|\s)([A-Z][A-Za-z_:/]*)=", line.strip())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _slurm(*command: str) -> str:
    """What a command of Slurm prints. EnvironmentFault in its own words where it fails."""
    finished = _run(*command)
    if finished.returncode:
        raise EnvironmentFault(f"{command[0]} failed: {_one_line(finished.stderr)}")
    return finished.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise EnvironmentFault(f"{command[0]} is not on this machine; launch from a node of the Slurm cluster")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(f"{command[0]} did not answer in {TIMEOUT_S:.0f} s; is slurmctld up?") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
