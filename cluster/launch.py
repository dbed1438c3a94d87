"""Submitting a job to any cluster, and looking after it: the part that Ray, Slurm and Kubernetes have in common."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.settings import ClusterSettings, KubernetesCluster, RayCluster, SlurmCluster
from cluster.submission import (
    Job,
    Record,
    Submitted,
    drop_record,
    plan_record,
    record_files,
    write_record,
    write_submitted,
)
from data_pipeline.errors import ConfigError

Word = Literal["pending", "running", "done", "stopped", "failed", "gone", "unknown"]
ENDED: tuple[Word, ...] = ("done", "stopped", "failed", "gone")


@dataclass(frozen=True)
class JobState:
    """What the cluster says of a job.

    word: `gone` where the cluster has forgotten it, `unknown` where it does not answer (backends raise EnvironmentFault
    then); detail: the cluster's own words, e.g. why it is pending;
    exit_code: of the job's command, None while it runs or where it cannot be known.
    """

    word: Word
    detail: str = ""
    exit_code: int | None = None


class Backend(Protocol):
    """One kind of cluster."""

    def check(self, job: Job) -> None:
        """Find out what can be found out before anything is submitted. Raises ConfigError or EnvironmentFault."""

    def files(self, job: Job, record: Record) -> dict[str, str]:
        """The script or manifest, by file name."""

    def command(self, job: Job, record: Record) -> list[str]:
        """What submits by hand, with standard tools."""

    def submit(self, job: Job, record: Record) -> dict[str, str]:
        """Submit.   -> what finds the job again"""

    def state(self, submitted: Submitted) -> JobState:
        """How the job is doing."""

    def logs(self, submitted: Submitted, *, follow: bool) -> Iterator[str]:
        """What the job has printed, in pieces; with follow until it ends."""

    def cancel(self, submitted: Submitted) -> None:
        """Take a job that waits out of the queue, or end one that runs at once."""

    def run_inside(self, submitted: Submitted, command: list[str]) -> None:
        """Run a short command where the run folder can be seen."""


@dataclass(frozen=True)
class Plan:
    """A submission as it would be made."""

    job: Job
    cluster: ClusterSettings
    record: Record
    files: dict[str, str]
    command: list[str]


def backend_of(cluster: ClusterSettings) -> Backend:
    """The door to a kind of cluster."""
    if isinstance(cluster, SlurmCluster):
        from cluster.slurm import Slurm

        return Slurm(cluster)
    if isinstance(cluster, RayCluster):
        from cluster.ray_submit import RayJobs

        return RayJobs(cluster)
    assert isinstance(cluster, KubernetesCluster)
    from cluster.kubernetes import Kubernetes

    return Kubernetes(cluster)


def make_plan(job: Job, cluster: ClusterSettings) -> Plan:
    """What would be submitted and recorded; the cluster is not asked, nothing is written.

    Raises ConfigError for what the cluster file alone says cannot be.
    """
    if cluster.max_workers and job.workers > cluster.max_workers:
        raise ConfigError(
            f"--workers {job.workers} is more than this cluster can ever give (max_workers={cluster.max_workers} in "
            "the cluster file); lower --workers"
        )
    backend, record = backend_of(cluster), plan_record(job, cluster)
    command = backend.command(job, record)
    files = record_files(job, cluster, backend.files(job, record), [shlex.quote(part) for part in command])
    return Plan(job, cluster, record, files, command)


def submit(plan: Plan) -> Submitted:
    """Check the cluster, write the record, submit. A submission that fails leaves no record."""
    backend = backend_of(plan.cluster)
    backend.check(plan.job)
    write_record(plan.record, plan.files)
    try:
        ids = backend.submit(plan.job, plan.record)
    except BaseException:
        drop_record(plan.record, plan.files)
        raise
    return write_submitted(plan.record, plan.job, plan.cluster, ids)
