"""The check of Kubernetes manifests takes good ones and names the one thing wrong with bad ones."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml

from tests.support.manifests import load_all, problems, problems_together

RAY_JOB = """
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: denoise-1
  namespace: research
  labels: {kueue.x-k8s.io/queue-name: gpu-queue, kueue.x-k8s.io/priority-class: low}
spec:
  submissionMode: HTTPMode
  entrypoint: rddm train /etc/rddm/config.yaml --run denoise-1
  backoffLimit: 3
  suspend: true
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: 600
  rayClusterSpec:
    rayVersion: 2.60.0
    authOptions: {mode: token, secretName: ray-token}
    enableInTreeAutoscaling: true
    autoscalerOptions:
      version: v2
      idleTimeoutSeconds: 120
    headGroupSpec:
      rayStartParams: {dashboard-host: 0.0.0.0, num-cpus: "0"}
      template:
        metadata: {labels: {app: rddm}}
        spec:
          serviceAccountName: rddm
          restartPolicy: Never
          terminationGracePeriodSeconds: 130
          containers:
          - name: ray-head
            image: registry.example:5000/rddm:0.1.0
            env:
            - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "120"}
            - name: AWS_SECRET_ACCESS_KEY
              valueFrom: {secretKeyRef: {name: bucket, key: secret}}
            - {name: RAY_AUTH_TOKEN_PATH, value: /var/run/token}
            ports:
            - {containerPort: 6379, name: gcs-server}
            - {containerPort: 8265, name: dashboard}
            resources: {requests: {cpu: 1, memory: 4Gi}, limits: {cpu: "2", memory: 4Gi}}
            volumeMounts: [{name: runs, mountPath: /runs}, {name: config, mountPath: /etc/rddm, readOnly: true}]
          volumes:
          - {name: runs, persistentVolumeClaim: {claimName: runs}}
          - {name: config, configMap: {name: denoise-1}}
    workerGroupSpecs:
    - groupName: gpu
      replicas: 2
      minReplicas: 0
      maxReplicas: 4
      rayStartParams: {}
      template:
        spec:
          restartPolicy: Never
          priorityClassName: low
          nodeSelector: {accelerator: h200}
          tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
          terminationGracePeriodSeconds: 40
          initContainers:
          - {name: warm, image: registry.example/rddm:0.1.0}
          containers:
          - name: ray-worker
            image: registry.example/rddm:0.1.0
            resources:
              requests: {cpu: 8, memory: 1.5Gi}
              limits: {cpu: 8, memory: "32e9", nvidia.com/gpu: 1}
            volumeMounts: [{name: shm, mountPath: /dev/shm}]
          volumes: [{name: shm, emptyDir: {medium: Memory, sizeLimit: 8Gi}}]
"""

TORCHRUN = """
apiVersion: v1
kind: Service
metadata: {name: denoise-2}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector: {job-name: denoise-2}
  ports: [{name: rendezvous, port: 29400}, {name: metrics, port: 8080, targetPort: metrics}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: denoise-2}
data: {config.yaml: "train: {steps: 10}"}
---
apiVersion: batch/v1
kind: Job
metadata: {name: denoise-2}
spec:
  completionMode: Indexed
  completions: 2
  parallelism: 2
  backoffLimit: 8
  podReplacementPolicy: Failed
  podFailurePolicy:
    rules:
    - {action: Ignore, onPodConditions: [{type: DisruptionTarget, status: "True"}]}
    - {action: FailJob, onExitCodes: {containerName: train, operator: In, values: [2]}}
  ttlSecondsAfterFinished: 600
  template:
    metadata: {labels: {app: rddm}}
    spec:
      restartPolicy: Never
      subdomain: denoise-2
      containers:
      - name: train
        image: registry.example/rddm:0.1.0
        command: [torchrun, -m, rddm_dist.training, /etc/rddm/config.yaml, optim.lr=1e-4]
        ports: [{containerPort: 8080, name: metrics}]
        volumeMounts: [{name: config, mountPath: /etc/rddm}]
      volumes: [{name: config, configMap: {name: denoise-2}}]
"""

ABSENT = object()
HEAD = "spec.rayClusterSpec.headGroupSpec"
HEAD_POD, HEAD_CONTAINER = f"{HEAD}.template.spec", f"{HEAD}.template.spec.containers[0]"
GROUP = "spec.rayClusterSpec.workerGroupSpecs[0]"
WORKER_POD, WORKER = f"{GROUP}.template.spec", f"{GROUP}.template.spec.containers[0]"
POD = "spec.template.spec"
RULE = "spec.podFailurePolicy.rules[1]"


def set_at(manifest: dict[str, Any], path: str, value: Any) -> None:
    """Set, append or take away what stands at a path; what follows a `|` is one key."""
    front, bar, key = path.partition("|")
    keys = [int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", front)]
    *parents, last = [*keys, key] if bar else keys
    place: Any = manifest
    for part in parents:
        place = place[part]
    if value is ABSENT:
        del place[last]
    elif isinstance(place, list) and last == len(place):
        place.append(value)
    else:
        place[last] = value


def changed(text: str, changes: dict[str, Any], kind: str) -> dict[str, Any]:
    manifest = next(copy.deepcopy(document) for document in load_all(text) if document["kind"] == kind)
    for path, value in changes.items():
        set_at(manifest, path, value)
    return manifest


def container(**fields: Any) -> dict[str, Any]:
    return {"name": "other", "image": "registry.example/rddm:0.1.0", **fields}


# (changes of the good manifest, the path and some words of the only problem)
RAY_JOB_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    # schema
    ({"kind": "Pod"}, "kind", "'Pod' is not one of RayJob"),
    ({"apiVersion": "ray.io/v1alpha1"}, "apiVersion", "ray.io/v1"),
    ({"metadata.name": ABSENT}, "metadata.name", "missing"),
    ({"metadata.generateName": "denoise-"}, "metadata.generateName", "unknown field"),
    ({"spec": ABSENT}, "spec", "missing"),
    ({"status": {}}, "status", "unknown field"),
    ({"spec.entryPoint": "rddm"}, "spec.entryPoint", "near: entrypoint"),
    ({"spec.backoffLimit": "3"}, "spec.backoffLimit", "'3' is not of type 'integer'"),
    ({"spec.backoffLimit": 3.0}, "spec.backoffLimit", "3.0 is not of type 'integer'"),
    ({"spec.backoffLimit": True}, "spec.backoffLimit", "True is not of type 'integer'"),
    ({"spec.backoffLimit": 2**31}, "spec.backoffLimit", "greater than the maximum"),
    ({"spec.submissionMode": "JobMode"}, "spec.submissionMode", "'JobMode' is not one of"),
    ({"spec.suspend": None}, "spec.suspend", "None is not of type 'boolean'"),
    ({f"{GROUP}.groupName": ABSENT}, f"{GROUP}.groupName", "missing"),
    ({f"{GROUP}.replica": 2}, f"{GROUP}.replica", "near: replicas"),
    ({f"{WORKER_POD}.restartPolicy": "never"}, f"{WORKER_POD}.restartPolicy", "'never' is not one of"),
    ({f"{WORKER_POD}.tolerations[0].effect": "NoRun"}, f"{WORKER_POD}.tolerations[0].effect", "'NoRun'"),
    ({f"{WORKER}.imagePullPolicy": "Sometimes"}, f"{WORKER}.imagePullPolicy", "'Sometimes'"),
    ({f"{WORKER}.resources.gpus": 1}, f"{WORKER}.resources.gpus", "unknown field"),
    ({f"{WORKER}.resources.limits|memory": "32 GB"}, f"{WORKER}.resources.limits.memory", "does not match"),
    ({f"{WORKER}.volumeMount": []}, f"{WORKER}.volumeMount", "near: volumeMounts"),
    ({f"{WORKER}.env": [{"name": "A", "value": 1}]}, f"{WORKER}.env[0].value", "1 is not of type 'string'"),
    ({f"{WORKER}.args": ["optim.lr", 1e-4]}, f"{WORKER}.args[1]", "0.0001 is not of type 'string'"),
    ({f"{HEAD_CONTAINER}.env[3]": {"name": "RAY_AUTH_TOKEN_PATH", "value": ""}}, f"{HEAD_CONTAINER}.env[3]", "twice"),
    ({f"{HEAD_CONTAINER}.ports[2]": {"containerPort": 6379, "protocol": "TCP"}}, f"{HEAD_CONTAINER}.ports[2]", "twice"),
    (
        {f"{HEAD_POD}.containers[1]": container(name="ray-head")},
        f"{HEAD_POD}.containers[1]",
        '"ray-head" is given twice',
    ),
    ({f"{HEAD}.rayStartParams": {"num-cpus": 0}}, f"{HEAD}.rayStartParams.num-cpus", "0 is not of type 'string'"),
    # names and labels
    ({"metadata.name": "1st"}, "metadata.name", "DNS-1035 label of at most 47"),
    ({"metadata.name": "a" * 48}, "metadata.name", "at most 47"),
    ({"metadata.namespace": "My_Space"}, "metadata.namespace", "DNS-1123 label"),
    ({"metadata.labels": {"run": "a" * 64}}, "metadata.labels.run", "at most 63"),
    ({"metadata.labels": {"run": "optim.lr=1"}}, "metadata.labels.run", "label word"),
    ({"metadata.labels": {"a/b/c": "x"}}, "metadata.labels.a/b/c", "'a/b'"),
    ({"metadata.labels": {"run name": "x"}}, "metadata.labels.run name", "label word"),
    ({"metadata.annotations": {"/x": "any thing"}}, "metadata.annotations./x", "subdomain"),
    ({f"{WORKER_POD}.nodeSelector": {"zone": "-a"}}, f"{WORKER_POD}.nodeSelector.zone", "label word"),
    ({f"{GROUP}.groupName": "GPU"}, f"{GROUP}.groupName", "DNS-1123 label"),
    ({f"{WORKER}.name": "ray_worker"}, f"{WORKER}.name", "DNS-1123 label"),
    ({f"{WORKER_POD}.priorityClassName": "Very Low"}, f"{WORKER_POD}.priorityClassName", "subdomain"),
    ({f"{WORKER}.ports": [{"containerPort": 1, "name": "a" * 16}]}, f"{WORKER}.ports[0].name", "at most 15"),
    # pods
    ({f"{WORKER_POD}.initContainers[0].name": "ray-worker"}, f"{WORKER_POD}.initContainers[0].name", "in this pod"),
    ({f"{WORKER_POD}.containers": []}, f"{WORKER_POD}.containers", "empty"),
    ({f"{WORKER}.image": ABSENT}, f"{WORKER}.image", "missing"),
    ({f"{WORKER}.image": "registry.example:5000/rddm"}, f"{WORKER}.image", "neither tag nor digest"),
    ({f"{WORKER}.volumeMounts[0].name": "sham"}, f"{WORKER}.volumeMounts[0].name", "no volume 'sham'; there are: shm"),
    ({f"{WORKER_POD}.volumes[0]": {"name": "shm"}}, f"{WORKER_POD}.volumes[0]", "exactly one source, given 0"),
    (
        {f"{WORKER_POD}.volumes[0].hostPath": {"path": "/dev/shm"}},
        f"{WORKER_POD}.volumes[0]",
        "exactly one source, given 2",
    ),
    # resources
    ({f"{WORKER}.resources.requests.cpu": "8100m"}, f"{WORKER}.resources.requests.cpu", "8100m exceeds limit 8"),
    ({f"{WORKER}.resources.requests.memory": "40G"}, f"{WORKER}.resources.requests.memory", "exceeds limit 32e9"),
    ({f"{WORKER}.resources.requests|nvidia.com/gpu": 2}, f"{WORKER}.resources.requests.nvidia.com/gpu", "equal"),
    (
        {f"{WORKER}.resources.limits": {}, f"{WORKER}.resources.requests": {"nvidia.com/gpu": 1}},
        f"{WORKER}.resources.requests.nvidia.com/gpu",
        "equal",
    ),
    ({f"{WORKER}.resources.limits|nvidia.com/gpu": "500m"}, f"{WORKER}.resources.limits.nvidia.com/gpu", "whole"),
    ({f"{WORKER}.resources.requests.cpu": "-1"}, f"{WORKER}.resources.requests.cpu", "negative"),
    ({f"{WORKER}.resources.requests.memory": "512m"}, f"{WORKER}.resources.requests.memory", "less than 1Mi"),
    # drain
    (
        {f"{WORKER_POD}.terminationGracePeriodSeconds": ABSENT},
        f"{WORKER_POD}.terminationGracePeriodSeconds",
        "30 s is less than the drain of 30 s",
    ),
    (
        {f"{HEAD_POD}.terminationGracePeriodSeconds": 129},
        f"{HEAD_POD}.terminationGracePeriodSeconds",
        "129 s is less than the drain of 120 s",
    ),
    ({f"{HEAD_CONTAINER}.env[0].value": "2min"}, f"{HEAD_CONTAINER}.env[0].value", "whole seconds, given '2min'"),
    # secrets
    (
        {f"{WORKER}.env": [{"name": "WANDB_API_KEY", "value": "abc"}]},
        f"{WORKER}.env[0].value",
        "WANDB_API_KEY looks like a secret",
    ),
    ({f"{WORKER}.env": [{"name": "A"}]}, f"{WORKER}.env[0]", "either value or valueFrom"),
    (
        {f"{HEAD_CONTAINER}.env[1].value": ""},
        f"{HEAD_CONTAINER}.env[1]",
        "AWS_SECRET_ACCESS_KEY needs either value or valueFrom",
    ),
    ({f"{HEAD_CONTAINER}.env[1].valueFrom": {}}, f"{HEAD_CONTAINER}.env[1].valueFrom", "exactly one source"),
    (
        {f"{HEAD_CONTAINER}.env[1].valueFrom.secretKeyRef.name": ABSENT},
        f"{HEAD_CONTAINER}.env[1].valueFrom.secretKeyRef.name",
        "subdomain",
    ),
    (
        {f"{WORKER}.env": [{"name": "MLFLOW_TRACKING_URI", "value": "https://me:abc@mlflow"}]},
        f"{WORKER}.env[0].value",
        "password inside a URL",
    ),
    ({f"{HEAD}.rayStartParams|redis-password": "abc"}, f"{HEAD}.rayStartParams.redis-password", "secret"),
    # what KubeRay takes, under conditions that nobody has written down here
    ({"spec.submitterConfig": {"backoffLimit": 0}}, "spec.submitterConfig", "no rule here does"),
    ({f"{GROUP}.numOfHosts": 2}, f"{GROUP}.numOfHosts", "no rule here does"),
    ({f"{HEAD}.resources": {"CPU": "0"}}, f"{HEAD}.resources", "no rule here does"),
    (
        {"spec.rayClusterSpec.autoscalerOptions.env": []},
        "spec.rayClusterSpec.autoscalerOptions.env",
        "no rule here does",
    ),
    # the job
    ({"spec.submissionMode": "K8sJobMode"}, "spec.submissionMode", "another pod follows the job"),
    ({"spec.entrypoint": ABSENT}, "spec.entrypoint", "missing"),
    ({"spec.backoffLimit": -1}, "spec.backoffLimit", "negative"),
    ({"spec.activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds", "positive"),
    (
        {"spec.rayClusterSpec.authOptions": {"enableK8sTokenAuth": True}},
        "spec.rayClusterSpec.authOptions.enableK8sTokenAuth",
        "not supported",
    ),
    ({"spec.ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished", "negative"),
    (
        {"spec.shutdownAfterJobFinishes": False, "spec.ttlSecondsAfterFinished": 0, "metadata.labels": {}},
        "spec.shutdownAfterJobFinishes",
        "suspend",
    ),
    (
        {"spec.shutdownAfterJobFinishes": False, "spec.ttlSecondsAfterFinished": 0, "spec.suspend": False},
        "spec.shutdownAfterJobFinishes",
        "Kueue",
    ),
    # deletion
    # the cluster
    (
        {"spec.rayClusterSpec.autoscalerOptions.idleTimeoutSeconds": -1},
        "spec.rayClusterSpec.autoscalerOptions.idleTimeoutSeconds",
        "negative",
    ),
    ({"spec.rayClusterSpec.rayVersion": ABSENT}, "spec.rayClusterSpec.rayVersion", "version of Ray in the image"),
    ({"spec.rayClusterSpec.rayVersion": "2.51.0"}, "spec.rayClusterSpec.rayVersion", "needs Ray 2.52"),
    ({f"{GROUP}.minReplicas": 5}, f"{GROUP}.minReplicas", "5 exceeds maxReplicas 4"),
    ({f"{GROUP}.minReplicas": -1}, f"{GROUP}.minReplicas", "negative"),
    ({f"{GROUP}.replicas": 5}, f"{GROUP}.replicas", "5 is not within 0 to 4"),
    ({f"{WORKER_POD}.restartPolicy": "OnFailure"}, f"{WORKER_POD}.restartPolicy", "Never with the autoscaler v2"),
    ({f"{GROUP}.rayStartParams": {"labels": "a=b"}}, f"{GROUP}.rayStartParams.labels", "labels of the group"),
    (
        {
            "spec.rayClusterSpec.workerGroupSpecs": [
                yaml.safe_load(RAY_JOB)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
            ]
            * 2
        },
        "spec.rayClusterSpec.workerGroupSpecs",
        "groupName gpu is given twice",
    ),
]

JOB_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"spec.backoffLimitPerIndex": 1}, "spec.backoffLimitPerIndex", "no rule here knows it"),
    ({"spec.completionMode": ABSENT}, "spec.completionMode", "no index"),
    ({"spec.template": ABSENT}, "spec.template", "missing"),
    ({"spec.completion": 2}, "spec.completion", "near: completions"),
    ({"spec.completionMode": "indexed"}, "spec.completionMode", "'indexed' is not one of"),
    ({f"{POD}.containers[0].cmd": []}, f"{POD}.containers[0].cmd", "unknown field"),
    ({f"{POD}.restartPolicy": ABSENT}, f"{POD}.restartPolicy", "Never with podFailurePolicy"),
    ({"spec.completions": ABSENT}, "spec.completions", "Indexed needs it"),
    ({"metadata.name": "a" * 62}, "spec.completions", "exceeds 63"),
    ({"metadata.name": "Denoise"}, "metadata.name", "DNS-1123 label"),
    ({"spec.podReplacementPolicy": "TerminatingOrFailed"}, "spec.podReplacementPolicy", "Failed with podFailurePolicy"),
    ({"spec.activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds", "positive"),
    ({f"{RULE}.onExitCodes.values": [0]}, f"{RULE}.onExitCodes.values", "0 is no failure"),
    ({f"{RULE}.onExitCodes.containerName": "main"}, f"{RULE}.onExitCodes.containerName", "no container main"),
    ({f"{RULE}.onPodConditions": [{"type": "Ready"}]}, RULE, "either onExitCodes or onPodConditions"),
    ({f"{RULE}.onExitCodes.values": [1, 1]}, f"{RULE}.onExitCodes.values", "non-unique"),
    (
        {
            f"{POD}.containers[0].env": [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "25"}],
        },
        f"{POD}.terminationGracePeriodSeconds",
        "30 s is less than the drain of 25 s",
    ),
]

SERVICE_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"spec.ports[0].name": ABSENT}, "spec.ports[0].name", "several ports need names"),
    ({"spec.ports[1].port": ABSENT}, "spec.ports[1].port", "missing"),
    ({"spec.headless": True}, "spec.headless", "unknown field"),
    ({"metadata.name": "2nd"}, "metadata.name", "DNS-1035 label"),
]

CONFIG_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"data": {"a/b": "x"}}, "data", "does not match"),
    ({"data": {"a": 1}}, "data.a", "not of type 'string'"),
    ({"data": {"api-key": "abc"}}, "data.api-key", "use a Secret"),
    ({"spec": {}}, "spec", "unknown field"),
]

FAULTS = [
    (text, kind, *fault)
    for text, kind, faults in (
        (RAY_JOB, "RayJob", RAY_JOB_FAULTS),
        (TORCHRUN, "Job", JOB_FAULTS),
        (TORCHRUN, "Service", SERVICE_FAULTS),
        (TORCHRUN, "ConfigMap", CONFIG_FAULTS),
    )
    for fault in faults
]


def test_good_manifests_have_no_problem() -> None:
    for text in (RAY_JOB, TORCHRUN):
        assert problems_together(load_all(text)) == []


@pytest.mark.parametrize(
    ("text", "kind", "changes", "path", "words"), FAULTS, ids=[f"{kind} {path}" for _, kind, _, path, _ in FAULTS]
)
def test_one_fault_is_one_problem_at_its_path(
    text: str, kind: str, changes: dict[str, Any], path: str, words: str
) -> None:
    found = problems(changed(text, changes, kind))
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}: ")
    assert words in found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    "changes",
    [
        {f"{HEAD_CONTAINER}.env[0].value": "0", f"{HEAD_POD}.terminationGracePeriodSeconds": ABSENT},
        {f"{GROUP}.minReplicas": ABSENT, f"{GROUP}.maxReplicas": ABSENT},
        {f"{WORKER}.env": [{"name": "TOKENIZERS_PARALLELISM", "value": "false"}]},
        {f"{WORKER}.env": [{"name": "URL", "value": "postgres://me:$(DB_PASSWORD)@db/runs"}]},
        {f"{WORKER}.resources.limits|memory": 32_000_000_000},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_what_the_servers_take_is_no_problem(changes: dict[str, Any]) -> None:
    assert problems(changed(RAY_JOB, changes, "RayJob")) == []


def test_several_faults_are_all_told() -> None:
    found = problems(changed(RAY_JOB, {f"{WORKER}.image": "rddm", "metadata.name": "1st"}, "RayJob"))
    assert [line.partition(":")[0] for line in found] == ["metadata.name", f"{WORKER}.image"]


def test_manifests_that_belong_together_find_each_other() -> None:
    def told(change: dict[str, Any], index: int) -> list[str]:
        manifests = load_all(TORCHRUN)
        for path, value in change.items():
            set_at(manifests[index], path, value)
        return problems_together(manifests)

    where = "Job/denoise-2: spec.template.spec.subdomain"
    assert told({"metadata.name": "other"}, 0) == [f"{where}: no Service denoise-2 in this namespace"]
    assert told({"metadata.namespace": "research"}, 0) == [f"{where}: no Service denoise-2 in this namespace"]
    assert told({"spec.selector": {"app": "x"}}, 0) == [
        f"{where}: the selector of Service denoise-2 does not find these pods"
    ]
    assert told({"spec.selector": {"app": "rddm"}}, 0) == []
    assert told({"spec.completions": 0.5}, 2) == ["Job/denoise-2: spec.completions: 0.5 is not of type 'integer'"]
    assert problems_together(load_all(RAY_JOB) * 2) == ["RayJob/denoise-1: metadata.name: is given twice"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "key 'a' is given twice"),
        ("a: {b: 1, b: 1}", "key 'b' is given twice"),
        ("y: 1", "key True is no string"),
        ("1: 1", "key 1 is no string"),
        ("- a", "not a mapping"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_doubtful_yaml_is_refused(text: str, words: str) -> None:
    with pytest.raises(yaml.YAMLError, match=re.escape(words)):
        load_all(text)


def test_words_without_quotes_are_read_as_kubectl_reads_them() -> None:
    values = load_all("a: [1e-4, 1e3, y, N, on, 0.5, 12, 1.0.0, 1Gi, 500m, yes please, x-y]")[0]["a"]
    assert values == [1e-4, 1000.0, True, False, True, 0.5, 12, "1.0.0", "1Gi", "500m", "yes please", "x-y"]
