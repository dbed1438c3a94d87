"""What the launcher asks kubectl, and what it makes of the answers; the answers are written here."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import cluster.kubernetes as module
from cluster.kubernetes import Kubernetes
from cluster.launch import JobState, make_plan
from cluster.launch import submit as launch
from cluster.settings import KubernetesCluster
from cluster.submission import Job, Submitted
from data_pipeline.errors import ConfigError, EnvironmentFault
from rddm_dist.training.stopping import STOPPED_FILE

NAMES = {
    "service_account": "rddm", "secrets": ("s3-credentials",), "pull_secrets": ("registry",),
    "auth_secret": "ray-token", "priority_class": "research", "queue": "team-a",
}  # fmt: skip
FORBIDDEN = 'Error from server (Forbidden): secrets "s3-credentials" is forbidden: User "ann" cannot get it'


class Kubectl:
    """Stands in for kubectl: prints what `answers` has for the first words of a command, else that it is there."""

    def __init__(self, **answers: str) -> None:
        self.answers = {key.replace("_", " "): text for key, text in answers.items()}
        self.asked: list[str] = []
        self.options: Sequence[str] = ()  # of the last command, where it went

    def __call__(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        words = re.sub(r"--(context|namespace) \S+ ", "", " ".join(arguments))
        self.asked.append(words)
        self.options = arguments[: len(arguments) - len(words.split())]
        found = [text for begin, text in self.answers.items() if words.startswith(begin)]
        said = found[0] if found else "there"
        is_error = said.startswith("Error")
        return subprocess.CompletedProcess([], int(is_error), "" if is_error else said, said if is_error else "")


@pytest.fixture
def kubectl(monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    """A cluster that has everything, and no job yet."""
    stand_in = Kubectl(get_rayjobs="", get_jobs="", get_persistentvolumeclaim=claim("ReadWriteMany"))
    monkeypatch.setattr(module, "_kubectl", stand_in)
    return stand_in


def claim(*modes: str) -> str:
    return json.dumps({"spec": {"accessModes": modes}})


def settings(folder: Path, **keys: Any) -> KubernetesCluster:
    values = {"kind": "kubernetes", "image": "rddm-dist:0.1.0", "namespace": "vision", "storage": str(folder)}
    return KubernetesCluster.model_validate({**values, "volumes": [{"claim": "runs", "mount": str(folder)}], **keys})


def job(folder: Path, workers: int = 2) -> Job:
    return Job("evaluate", "scores", str(folder / "scores"), ("model",), workers, 0)


def refusal(folder: Path, **keys: Any) -> str:
    with pytest.raises((ConfigError, EnvironmentFault)) as caught:
        Kubernetes(settings(folder, **keys)).check(job(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("get namespace vision", "namespace=vision does not exist"),
        ("get serviceaccount rddm", "change service_account"),
        ("get secret s3-credentials", "secret s3-credentials does not exist in namespace vision; create it, or change"),
        ("get secret registry", "change pull_secrets"),
        ("get secret ray-token", "change auth_secret"),
        ("get priorityclass research", "change priority_class"),
        ("get localqueues.kueue.x-k8s.io team-a", "change queue"),
        ("get persistentvolumeclaim runs", "persistentvolumeclaim runs does not exist in namespace vision"),
    ],
)
def test_what_the_cluster_file_names_has_to_be_there(missing: str, said: str, kubectl: Kubectl, tmp_path: Path) -> None:
    Kubernetes(settings(tmp_path, **NAMES)).check(job(tmp_path))
    assert any(words.startswith(missing) for words in kubectl.asked)
    kubectl.answers = {missing: "", **kubectl.answers}
    assert said in refusal(tmp_path, **NAMES)


def test_what_we_may_not_look_at_counts_as_there(kubectl: Kubectl, tmp_path: Path) -> None:
    kubectl.answers |= {"get secret": FORBIDDEN, "get namespace": FORBIDDEN}
    Kubernetes(settings(tmp_path, **NAMES)).check(job(tmp_path))


def test_a_volume_of_one_node_cannot_be_had_by_several_pods(kubectl: Kubectl, tmp_path: Path) -> None:
    kubectl.answers["get persistentvolumeclaim"] = claim("ReadWriteOnce")
    assert "claim=runs is ReadWriteOnce, so pods on several nodes cannot have it" in refusal(tmp_path)
    alone = {"form": "torchrun", "worker": {"workers": 2}}
    Kubernetes(settings(tmp_path, **alone)).check(job(tmp_path))


def test_a_name_that_is_taken_is_told_with_what_removes_it(kubectl: Kubectl, tmp_path: Path) -> None:
    kubectl.answers["get rayjobs"] = "rayjob.ray.io/scores-0001"
    said = refusal(tmp_path)
    assert "rayjob scores-0001 is in namespace vision already" in said
    assert "kubectl delete rayjob,configmap scores-0001 -n vision" in said


def test_a_launch_that_the_cluster_refuses_leaves_nothing(kubectl: Kubectl, tmp_path: Path) -> None:
    kubectl.answers["apply"] = "Error from server: admission webhook denied the request: no quota"
    with pytest.raises(EnvironmentFault, match="no quota"):
        launch(make_plan(job(tmp_path), settings(tmp_path)))
    assert kubectl.asked[-1].startswith("delete --filename") and list(tmp_path.iterdir()) == []


def submitted(folder: Path, **keys: Any) -> Submitted:
    return launch(make_plan(job(folder), settings(folder, **keys)))


def test_a_launch_is_found_again_where_it_was_made(kubectl: Kubectl, tmp_path: Path) -> None:
    kubectl.answers["config current-context"] = "lab\n"
    made = submitted(tmp_path)
    assert made.ids == {"rayjob": "scores-0001", "namespace": "vision", "context": "lab"}
    assert Kubernetes(settings(tmp_path, context="elsewhere")).state(made).word == "gone"
    assert kubectl.asked[-1].startswith("get rayjobs.ray.io scores-0001")
    assert list(kubectl.options) == ["--context", "lab", "--namespace", "vision"]


def test_a_job_that_a_person_stopped_is_told_from_one_that_is_done(kubectl: Kubectl, tmp_path: Path) -> None:
    made, cluster = submitted(tmp_path, context="lab"), Kubernetes(settings(tmp_path))
    done = {"status": {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}}
    kubectl.answers = {"get rayjobs": json.dumps(done)}
    assert cluster.state(made) == JobState("done", exit_code=0)
    (made.record.local / STOPPED_FILE).touch()
    assert cluster.state(made) == JobState("stopped", "by rddm stop")


def test_no_pod_to_tell_anything_to_is_one_line(kubectl: Kubectl, tmp_path: Path) -> None:
    made, cluster = submitted(tmp_path), Kubernetes(settings(tmp_path))
    kubectl.answers = {"get pods": json.dumps({"items": []})}
    with pytest.raises(EnvironmentFault, match="no pod of scores-0001 runs now"):
        cluster.run_inside(made, ["rddm", "stop", "x"])
