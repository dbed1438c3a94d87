"""What kubectl shows of a RayJob, a Job and their pods, put into the launcher's words; kubectl's errors in one line."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.kubernetes_states import Forbidden, explain, is_first, job_state, rayjob_state, why_waiting
from cluster.launch import JobState

QUEUE = {"labels": {"kueue.x-k8s.io/queue-name": "team-a"}}
WORKERS = {"desiredWorkerReplicas": 4, "readyWorkerReplicas": 1}
RAN = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\n{}"


def rayjob(deployment: str = "", job: str = "", *, spec: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    """A RayJob of four starts as `kubectl get --output=json` shows it."""
    words = {"jobDeploymentStatus": deployment, "jobStatus": job}
    return {
        "metadata": QUEUE,
        "spec": {"backoffLimit": 3, **(spec or {})},
        "status": {**{key: value for key, value in words.items() if value}, **status},
    }


RAYJOBS: dict[str, tuple[dict[str, Any], JobState]] = {
    "new": ({"spec": {}}, JobState("pending")),
    "pods come": (
        rayjob("Initializing", rayClusterStatus=WORKERS),
        JobState("pending", "1 of 4 worker pods are ready"),
    ),
    "not submitted yet": (rayjob("Running"), JobState("pending")),
    "runs": (rayjob("Running", "RUNNING"), JobState("running")),
    "runs again": (rayjob("Running", "RUNNING", failed=1), JobState("running", "1 of 4 starts has failed")),
    "between starts": (
        rayjob("Retrying", failed=2, rayClusterStatus=WORKERS),
        JobState("pending", "2 of 4 starts have failed; 1 of 4 worker pods are ready"),
    ),
    "queued": (rayjob("Suspended", spec={"suspend": True}), JobState("pending", "suspended, waits in queue team-a")),
    "done": (rayjob("Complete", "SUCCEEDED"), JobState("done", exit_code=0)),
    "ended by hand": (rayjob("Complete", "STOPPED"), JobState("stopped", "ended by ray job stop")),
    "bad input": (
        rayjob("Failed", "FAILED", reason="AppFailed", message=RAN.format(2, "x\nerror: data.uri is wrong\nbye")),
        JobState("failed", "AppFailed: error: data.uri is wrong", 2),
    ),
    "fault": (
        rayjob("Complete", "FAILED", message=RAN.format(1, "Traceback ...\nValueError: exit code 75")),
        JobState("failed", "ValueError: exit code 75", 1),
    ),
    "killed": (
        rayjob("Failed", "FAILED", message=RAN.format(-9, "the child ended with exit code 75")),
        JobState("failed", "the child ended with exit code 75", 137),
    ),
    "evicted too often": (
        rayjob("Failed", "FAILED", message=RAN.format(75, "stopped at step 10")),
        JobState("stopped", "no starts are left; launch again to go on", 75),
    ),
    "too late": (
        rayjob("Failed", "RUNNING", reason="DeadlineExceeded", message="The RayJob has passed activeDeadlineSeconds."),
        JobState("failed", "DeadlineExceeded: The RayJob has passed activeDeadlineSeconds."),
    ),
    "refused": (
        rayjob("ValidationFailed", reason="ValidationFailed", message="The RayJob spec is invalid: no entrypoint"),
        JobState("failed", "KubeRay refuses it: The RayJob spec is invalid: no entrypoint"),
    ),
}


@pytest.mark.parametrize("name", RAYJOBS)
def test_the_state_of_a_rayjob(name: str) -> None:
    shown, state = RAYJOBS[name]
    assert rayjob_state(shown) == state


def job(*conditions: tuple[str, str, str], spec: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    """A Job of four pods. conditions: (type, reason, message) of those that hold."""
    listed = [{"type": kind, "status": "True", "reason": why, "message": said} for kind, why, said in conditions]
    listed.append({"type": "FailureTarget", "status": "False"})
    return {
        "metadata": QUEUE,
        "spec": {"completions": 4, **(spec or {})},
        "status": {"conditions": listed, **status},
    }


def pod(index: int = 0, *, code: int | None = None, phase: str = "Running", **status: Any) -> dict[str, Any]:
    """A pod of a Job, ended with that code if one is given."""
    state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
    return {
        "metadata": {
            "name": f"derain-0001-{index}-x7k2p",
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
        },
        "status": {"phase": phase, "containerStatuses": [{"name": "rddm", "state": state}], **status},
    }


BACKOFF = ("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
POLICY = "Container rddm for pod vision/derain-0001-1-abcde failed with exit code 2 matching FailJob rule at index 0"
JOBS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], JobState]] = {
    "new": ({"spec": {"completions": 4}}, [], JobState("pending", "0 of 4 pods are ready")),
    "pods come": (job(active=4, ready=3), [], JobState("pending", "3 of 4 pods are ready")),
    "runs": (job(active=4, ready=4), [], JobState("running")),
    "ends": (job(active=1, ready=1, succeeded=3), [], JobState("running")),
    "runs again": (job(ready=4, failed=2), [], JobState("running", "2 pods have failed")),
    "queued": (job(spec={"suspend": True}), [], JobState("pending", "suspended, waits in queue team-a")),
    "done": (job(("Complete", "", "")), [], JobState("done", exit_code=0)),
    "bad input": (
        job(("Failed", "PodFailurePolicy", POLICY)),
        [pod(code=1)],
        JobState("failed", f"PodFailurePolicy: {POLICY}", 2),
    ),
    "fault": (
        job(BACKOFF),
        [pod(1, code=75), pod(code=75), pod(code=1)],
        JobState("failed", ": ".join(BACKOFF[1:]), 1),
    ),
    "pods are gone": (job(BACKOFF), [], JobState("failed", ": ".join(BACKOFF[1:]))),
    "evicted too often": (
        job(BACKOFF),
        [pod(code=1), pod(code=75), pod(1, code=1)],
        JobState("stopped", "no starts are left; launch again to go on", 75),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_the_state_of_a_job(name: str) -> None:
    shown, pods, state = JOBS[name]
    assert job_state(shown, pods) == state


def test_why_pods_wait() -> None:
    unplaced = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes:\n3 Insufficient nvidia.com/gpu."}
    no_image = {"name": "rddm", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
    comes = {"name": "rddm", "state": {"waiting": {"reason": "ContainerCreating"}}}
    assert why_waiting([]) == why_waiting([pod(), pod(1, phase="Pending", containerStatuses=[comes])]) == ""
    assert why_waiting([pod(), pod(1, phase="Pending", conditions=[unplaced])]) == (
        "pod derain-0001-1-x7k2p: 0/3 nodes: 3 Insufficient nvidia.com/gpu."
    )
    assert why_waiting([pod(2, phase="Pending", containerStatuses=[no_image])]) == (
        "pod derain-0001-2-x7k2p: ImagePullBackOff: not found"
    )


def test_the_first_pod_is_the_head_or_index_0() -> None:
    assert [is_first(pod(index)) for index in (0, 1, 10)] == [True, False, False]
    for kind in ("head", "worker"):
        assert is_first({"metadata": {"labels": {"ray.io/node-type": kind}}}) == (kind == "head")


# What kubectl 1.32 prints; what is made of it.
ERRORS = {
    "no server": (
        'E1129 08:39:35 31947 memcache.go:265] "Unhandled Error" err="dial tcp 127.0.0.1:9: connection refused"\n'
        "The connection to the server 127.0.0.1:9 was refused - did you specify the right host or port?",
        "no Kubernetes API server answers (The connection to the server 127.0.0.1:9 was refused); see kubectl config",
    ),
    "no such host": (
        "Unable to connect to the server: dial tcp: lookup lab on 10.0.0.2:53: no such host",
        "no Kubernetes API server answers (Unable to connect to the server: dial tcp: lookup lab",
    ),
    "context": ('error: context "moon" does not exist', 'context "moon" does not exist; change context of the cluster'),
    "no KubeRay": (
        'error: the server doesn\'t have a resource type "rayjobs"',
        "this cluster has no KubeRay (the server doesn't have a resource type \"rayjobs\"); install its operator, or",
    ),
    "no Kueue": (
        'error: the server doesn\'t have a resource type "localqueues"',
        "this cluster does not know what the cluster file asks for (",
    ),
    "not logged in": (
        "error: You must be logged in to the server (Unauthorized)",
        "kubectl get: the cluster does not know who asks (You must be logged in to the server (Unauthorized)); log in",
    ),
    "old KubeRay": (
        'Error from server (BadRequest): RayJob in version "v1" cannot be handled as a RayJob: strict decoding error: '
        'unknown field "spec.rayClusterSpec.authOptions"',
        "KubeRay of this cluster is older than 1.5.1 (",
    ),
    "silence": ("", "kubectl get: no word"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_kubectl_is_one_line(name: str) -> None:
    printed, said = ERRORS[name]
    error = explain(printed, "kubectl get")
    assert str(error).startswith(said) and "\n" not in str(error) and error.exit_code == 2


def test_a_right_that_is_missing_is_told_apart() -> None:
    printed = 'Error from server (Forbidden): secrets is forbidden: User "ann" cannot get resource "secrets"'
    error = explain(printed, "kubectl get secret")
    assert isinstance(error, Forbidden) and "ask for that right" in str(error)
