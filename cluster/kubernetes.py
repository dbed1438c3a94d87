"""Kubernetes: jobs through kubectl, checked against the cluster before anything is submitted."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.kubernetes_job import CONTAINER
from cluster.kubernetes_manifest import MANIFEST_FILE, render
from cluster.kubernetes_rayjob import HEAD
from cluster.kubernetes_shape import Shape, check_seen, object_name, shape_of
from cluster.kubernetes_start import PYTHON
from cluster.kubernetes_states import Forbidden, explain, is_first, job_state, rayjob_state, why_waiting
from cluster.launch import ENDED, JobState
from cluster.settings import KubernetesCluster
from cluster.submission import Job, Record, Submitted, is_stopped, plan_record
from data_pipeline import storage
from data_pipeline.errors import ConfigError, EnvironmentFault

TIMEOUT_S = 60
FOLLOW_S = 2.0
RAY_JOB, PLAIN_JOB = "rayjob", "job"  # keys of what finds a job again, and kinds as kubectl knows them
OBJECTS = {RAY_JOB: "rayjob,configmap", PLAIN_JOB: "job,service,configmap"}
RESOURCES = {RAY_JOB: "rayjobs.ray.io", PLAIN_JOB: "jobs.batch"}
INSTANCE = "app.kubernetes.io/instance"
DASHBOARD = "http://127.0.0.1:8265"


class Kubernetes:
    """A namespace of a cluster that kubectl of this machine reaches."""

    def __init__(self, settings: KubernetesCluster) -> None:
        self._settings = settings

    def check(self, job: Job) -> None:
        """What the manifest names is there, and a launch of that name is not."""
        settings, shape = self._settings, shape_of(self._settings, job)
        kind, name = RAY_JOB if shape.is_ray else PLAIN_JOB, object_name(job, plan_record(job, settings))
        check_seen(settings, job)
        self._check_namespace()
        if self._ask("get", RESOURCES[kind], name, "--ignore-not-found", "--output=name"):
            raise ConfigError(
                f"{kind} {name} is in namespace {settings.namespace} already, from a launch whose record is gone or of "
                f"another storage; kubectl delete {OBJECTS[kind]} {name} -n {settings.namespace}, or choose another "
                "--run"
            )
        for resource, named, key in self._named():
            if not self._exists(resource, named):
                raise EnvironmentFault(
                    f"{resource} {named} does not exist in namespace {settings.namespace}; create it, or change {key} "
                    "of the cluster file"
                )
        self._check_volumes(shape)

    def _check_namespace(self) -> None:
        settings = self._settings
        if not self._exists("namespace", settings.namespace):
            raise EnvironmentFault(
                f"namespace={settings.namespace} does not exist; create it, or change namespace of the cluster file"
            )

    def _named(self) -> Iterator[tuple[str, str, str]]:
        """What has to be there besides volumes: (resource, name, key of the cluster file)."""
        settings = self._settings
        if settings.service_account:
            yield "serviceaccount", settings.service_account, "service_account"
        for key, names in (("secrets", settings.secrets), ("pull_secrets", settings.pull_secrets)):
            for name in names:
                yield "secret", name, key
        if settings.auth_secret:
            yield "secret", settings.auth_secret, "auth_secret"
        if settings.priority_class:
            yield "priorityclass", settings.priority_class, "priority_class"
        if settings.queue:
            yield "localqueues.kueue.x-k8s.io", settings.queue, "queue"

    def _exists(self, resource: str, name: str) -> bool:
        try:
            return bool(self._ask("get", resource, name, "--ignore-not-found", "--output=name"))
        except Forbidden:  # many may run jobs and not look at secrets, or at what belongs to no namespace
            return True

    def _check_volumes(self, shape: Shape) -> None:
        settings = self._settings
        for volume in settings.volumes:
            said = self._ask("get", "persistentvolumeclaim", volume.claim, "--ignore-not-found", "--output=json")
            if not said:
                raise EnvironmentFault(
                    f"persistentvolumeclaim {volume.claim} does not exist in namespace {settings.namespace}; create "
                    "it, or change claim in volumes of the cluster file"
                )
            modes = json.loads(said)["spec"].get("accessModes", [])
            needed = ["ReadWriteMany", *(["ReadOnlyMany"] if volume.read_only else [])]
            if shape.pods + shape.is_ray > 1 and not set(modes) & set(needed):
                raise ConfigError(
                    f"volumes: claim={volume.claim} is {', '.join(modes)}, so pods on several nodes cannot have it; it "
                    f"has to be {' or '.join(needed)}"
                )

    def files(self, job: Job, record: Record) -> dict[str, str]:
        return {MANIFEST_FILE: render(self._settings, job, record)}

    def command(self, job: Job, record: Record) -> list[str]:
        context = ["--context", self._settings.context] if self._settings.context else []
        return ["kubectl", *context, "apply", "-f", str(record.local / MANIFEST_FILE)]

    def submit(self, job: Job, record: Record) -> dict[str, str]:
        kind = RAY_JOB if shape_of(self._settings, job).is_ray else PLAIN_JOB
        name, path = object_name(job, record), str(record.local / MANIFEST_FILE)
        try:
            self._ask("apply", "--filename", path)
        except EnvironmentFault:
            with contextlib.suppress(EnvironmentFault):  # what went wrong first is what there is to tell
                self._ask("delete", "--filename", path, "--ignore-not-found", "--wait=false")
            raise
        context = self._settings.context or self._current_context()
        return {kind: name, "namespace": self._settings.namespace, **({"context": context} if context else {})}

    def _current_context(self) -> str:
        """Written down, because the job stays where it is when somebody turns to another cluster."""
        finished = _kubectl(["config", "current-context"])
        return finished.stdout.strip() if finished.returncode == 0 else ""

    def state(self, submitted: Submitted) -> JobState:
        kind, name = _target(submitted)
        said = self._ask("get", RESOURCES[kind], name, "--ignore-not-found", "--output=json", to=submitted)
        if not said:
            return JobState("gone", f"the cluster has no {kind} {name} any more")
        found = json.loads(said)
        state = rayjob_state(found) if kind == RAY_JOB else job_state(found, self._pods(submitted))
        if state.word == "pending":
            why = why_waiting(self._pods(submitted))
            return JobState("pending", why or state.detail)
        if state.word == "done" and is_stopped(submitted):
            return JobState("stopped", "by rddm stop")
        return state

    def logs(self, submitted: Submitted, *, follow: bool) -> Iterator[str]:
        """What the driver prints, or the first pod of a plain Job; with follow through all starts."""
        told: dict[str, int] = {}
        while True:
            # In this order: what a job that has ended printed before is there to be read.
            state = self.state(submitted)
            source = self._source(submitted)
            if source is None and not follow:
                raise EnvironmentFault(
                    f"no pod of {_target(submitted)[1]} has anything to show ({state.word}"
                    f"{f', {state.detail}' if state.detail else ''}); the run keeps logs of its own in "
                    f"{storage.join(submitted.home, 'logs')}"
                )
            if source is not None:
                name, command = source
                skipped = told.get(name, 0)
                for piece in _stream(self._command(command, submitted), may_break=follow):
                    told[name] = told.get(name, 0) + len(piece) if skipped <= 0 else told[name]
                    if skipped < len(piece):
                        yield piece[max(0, skipped) :]
                    skipped -= len(piece)
            if not follow or state.word in ENDED:
                return
            time.sleep(FOLLOW_S)

    def _source(self, submitted: Submitted) -> tuple[str, list[str]] | None:
        """Where the output of the newest start is: (a name for it, arguments of kubectl that show it)."""
        kind, name = _target(submitted)
        pod = self._first_pod(submitted)
        if pod is None:
            return None
        if kind == PLAIN_JOB:
            return pod, ["logs", "--follow", pod, f"--container={CONTAINER}"]
        said = self._ask("get", RESOURCES[kind], name, "--ignore-not-found", "--output=json", to=submitted)
        status = json.loads(said).get("status", {}) if said else {}
        if not status.get("jobStatus"):
            return None
        show = ["ray", "job", "logs", "--follow", "--address", DASHBOARD, status["jobId"]]
        return f"{pod}/{status['jobId']}", ["exec", pod, f"--container={HEAD}", "--", *show]

    def cancel(self, submitted: Submitted) -> None:
        kind, name = _target(submitted)
        self._ask("delete", OBJECTS[kind], name, "--ignore-not-found", "--wait=false", to=submitted)

    def run_inside(self, submitted: Submitted, command: list[str]) -> None:
        kind, name = _target(submitted)
        pod = self._first_pod(submitted)
        if pod is None:
            raise EnvironmentFault(f"no pod of {name} runs now, so nothing can be told to it; try again when one does")
        words = [PYTHON, "-m", "rddm_dist.cli.main", *command[1:]] if command[0] == "rddm" else command
        container = HEAD if kind == RAY_JOB else CONTAINER
        self._ask("exec", pod, f"--container={container}", "--", *words, to=submitted)

    def _pods(self, submitted: Submitted) -> list[dict[str, Any]]:
        """The pods of all starts, the newest last."""
        selector = f"--selector={INSTANCE}={_target(submitted)[1]}"
        pods = json.loads(self._ask("get", "pods", selector, "--output=json", to=submitted))["items"]
        return sorted(pods, key=lambda pod: pod["metadata"].get("creationTimestamp", ""))

    def _first_pod(self, submitted: Submitted) -> str | None:
        """The newest head pod, or pod of index 0, that runs; else, of a plain Job, the newest that has run."""
        pods = [pod for pod in self._pods(submitted) if is_first(pod)]
        running = [pod for pod in pods if pod["status"].get("phase") == "Running"]
        ended = [pod for pod in pods if pod["status"].get("phase") in ("Succeeded", "Failed")]
        usable = running or (ended if _target(submitted)[0] == PLAIN_JOB else [])
        return usable[-1]["metadata"]["name"] if usable else None

    def _command(self, arguments: Sequence[str], submitted: Submitted | None) -> list[str]:
        context = (submitted.ids.get("context") if submitted else "") or self._settings.context
        namespace = submitted.ids["namespace"] if submitted else self._settings.namespace
        return [*(["--context", context] if context else []), "--namespace", namespace, *arguments]

    def _ask(self, *arguments: str, to: Submitted | None = None) -> str:
        """Run kubectl.   -> what it prints. to: a submission, if the question is about one"""
        command = self._command(arguments, to)
        finished = _kubectl(command)
        if finished.returncode:
            raise explain(finished.stderr, shlex.join(["kubectl", *arguments[:3]]))
        return finished.stdout


def _kubectl(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which("kubectl") is None:
        raise EnvironmentFault("kubectl is not installed here; install it, or submit from a machine that has it")
    try:
        return subprocess.run(
            ["kubectl", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(
            f"{shlex.join(['kubectl', *arguments][:8])} has not answered within {TIMEOUT_S} s; is the API server busy?"
        ) from error


def _stream(arguments: Sequence[str], *, may_break: bool) -> Iterator[str]:
    """What a command of kubectl prints, as it does. may_break: whether the pod may go away meanwhile."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            ["kubectl", *arguments], stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        try:
            yield from process.stdout
            code = process.wait()
        finally:
            process.kill()
        errors.seek(0)
        if code and not may_break:
            raise explain(errors.read(), "kubectl logs")


def _target(submitted: Submitted) -> tuple[str, str]:
    """The kind and the name of what was submitted."""
    kind = RAY_JOB if RAY_JOB in submitted.ids else PLAIN_JOB
    return kind, submitted.ids[kind]
