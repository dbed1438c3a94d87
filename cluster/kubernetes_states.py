"""What kubectl shows of jobs and pods, and its errors, in the launcher's words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.kubernetes_job import CONTAINER, RESUMABLE
from cluster.launch import JobState
from data_pipeline.errors import EnvironmentFault

DETAIL_CHARS = 200
INDEX = "batch.kubernetes.io/job-completion-index"
STUCK = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError")
UNREACHABLE = re.compile(r"was refused|unable to connect|no such host|i/o timeout|deadline exceeded|no route", re.I)


class Forbidden(EnvironmentFault):
    """The API server answers, and does not let us."""


def explain(said: str, what: str) -> EnvironmentFault:
    """An error of kubectl in one line, with what to do about it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    own = [line for line in lines if not re.match(r"[EWI]\d{4} |warning:", line, re.IGNORECASE)]
    text = (own or lines or ["no word"])[-1].removeprefix("error: ").removeprefix("Error in configuration: ")
    text = text.removesuffix(" - did you specify the right host or port?")[: 2 * DETAIL_CHARS].rstrip(". ")
    if UNREACHABLE.search(text):
        return EnvironmentFault(
            f"no Kubernetes API server answers ({text}); see kubectl config get-contexts, and set context of the "
            "cluster file"
        )
    if "context was not found" in text or "does not exist" in text and "context" in text:
        return EnvironmentFault(f"{text}; change context of the cluster file (kubectl config get-contexts lists them)")
    if "have a resource type" in text and "ray" in text:
        return EnvironmentFault(
            f"this cluster has no KubeRay ({text}); install its operator, or set form to torchrun in the cluster file"
        )
    if "have a resource type" in text:
        return EnvironmentFault(f"this cluster does not know what the cluster file asks for ({text}); remove that key")
    if re.search(r"\bforbidden\b", text, re.IGNORECASE):
        return Forbidden(f"{what}: {text}; ask for that right, or change namespace or context of the cluster file")
    if "Unauthorized" in text or "must be logged in" in text:
        return EnvironmentFault(f"{what}: the cluster does not know who asks ({text}); log in to it again")
    if "authOptions" in text:
        return EnvironmentFault(f"KubeRay of this cluster is older than 1.5.1 ({text}); upgrade it")
    return EnvironmentFault(f"{what}: {text}")


def is_first(pod: Mapping[str, Any]) -> bool:
    """Whether a pod is the one to ask: a head of Ray, or index 0 of a Job."""
    metadata = pod["metadata"]
    labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
    return labels.get("ray.io/node-type") == "head" or (annotations.get(INDEX) or labels.get(INDEX)) == "0"


def rayjob_state(rayjob: Mapping[str, Any]) -> JobState:
    """What KubeRay says of a RayJob."""
    spec, status = rayjob.get("spec", {}), rayjob.get("status", {})
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    said = status.get("message", "")
    if deployment == "ValidationFailed":
        return JobState("failed", f"KubeRay refuses it: {said}"[:DETAIL_CHARS])
    if deployment == "Failed" or (deployment == "Complete" and job == "FAILED"):
        reason = status.get("reason", "")
        return _ended(_exit_code(said), reason, _last_words(said))
    if deployment == "Complete":
        return JobState("done", exit_code=0) if job == "SUCCEEDED" else JobState("stopped", "ended by ray job stop")
    failed, starts = status.get("failed", 0), spec.get("backoffLimit", 0) + 1
    again = f"{failed} of {starts} starts {'has' if failed == 1 else 'have'} failed" if failed else ""
    if deployment == "Running" and job == "RUNNING":
        return JobState("running", again)
    if spec.get("suspend") or deployment in ("Suspending", "Suspended"):
        queue = rayjob.get("metadata", {}).get("labels", {}).get("kueue.x-k8s.io/queue-name", "")
        return JobState("pending", f"suspended, waits in queue {queue}" if queue else "suspended")
    cluster = status.get("rayClusterStatus", {})
    wanted, ready = cluster.get("desiredWorkerReplicas"), cluster.get("readyWorkerReplicas", 0)
    pods = f"{ready} of {wanted} worker pods are ready" if wanted else ""
    return JobState("pending", "; ".join(text for text in (again, pods) if text))


def job_state(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> JobState:
    """What Kubernetes says of a plain Job. pods: of it, the newest last."""
    spec, status = job.get("spec", {}), job.get("status", {})
    conditions = {each["type"]: each for each in status.get("conditions", []) if each["status"] == "True"}
    if "Complete" in conditions:
        return JobState("done", exit_code=0)
    if "Failed" in conditions:
        failed = conditions["Failed"]
        said = failed.get("message", "")
        code = _exit_code(said)
        return _ended(code if code is not None else _code_of_first(pods), failed.get("reason", ""), said)
    if spec.get("suspend") or "Suspended" in conditions:
        queue = job.get("metadata", {}).get("labels", {}).get("kueue.x-k8s.io/queue-name", "")
        return JobState("pending", f"suspended, waits in queue {queue}" if queue else "suspended")
    wanted, ready, lost = spec.get("completions", 1), status.get("ready", 0), status.get("failed", 0)
    again = f"{lost} {'pod has' if lost == 1 else 'pods have'} failed" if lost else ""
    if ready + status.get("succeeded", 0) >= wanted:
        return JobState("running", again)
    return JobState("pending", "; ".join(text for text in (again, f"{ready} of {wanted} pods are ready") if text))


def why_waiting(pods: Sequence[Mapping[str, Any]]) -> str:
    """Why pods do not run: no node takes them, their image cannot be had."""
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        if status.get("phase") != "Pending":
            continue
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return f"pod {name}: {' '.join(condition.get('message', '').split())}"[:DETAIL_CHARS]
        for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") in STUCK:
                return f"pod {name}: {waiting['reason']}: {' '.join(waiting.get('message', '').split())}"[:DETAIL_CHARS]
    return ""


def _ended(code: int | None, reason: str, said: str) -> JobState:
    if code == RESUMABLE:
        return JobState("stopped", "no starts are left; launch again to go on", code)
    return JobState("failed", ": ".join(text for text in (reason, said) if text)[:DETAIL_CHARS], code)


def _exit_code(message: str) -> int | None:
    """What Ray or Kubernetes says that a command ended with; of one that a signal ended what a shell would say."""
    found = re.search(r"exit code (-?\d+)", message)
    code = int(found.group(1)) if found else None
    return 128 - code if code is not None and code < 0 else code


def _code_of_first(pods: Sequence[Mapping[str, Any]]) -> int | None:
    """What the newest pod of index 0 ended with, if it is still there."""
    for pod in reversed([pod for pod in pods if is_first(pod)]):
        for container in pod.get("status", {}).get("containerStatuses", []):
            if container["name"] == CONTAINER and "terminated" in container.get("state", {}):
                return int(container["state"]["terminated"]["exitCode"])
    return None


def _last_words(message: str) -> str:
    """What a job that failed says itself: its error line, else the last line of what Ray quotes."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1]
