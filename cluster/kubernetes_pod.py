"""The pod template that RayJobs and plain Jobs have in common, and the labels of everything."""

from __future__ import annotations

from typing import Any

from cluster.kubernetes_shape import MOUNT, SCRATCH, SHARED_MEMORY, object_name
from cluster.settings import KubernetesCluster, Pod
from cluster.submission import Job, Record
from rddm_dist.training.stopping import LAUNCH_ENV, STOPPED_CODE_ENV

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU = "nvidia.com/gpu"
GRACE_S = 30  # of a pod, after the time it has to save

Manifest = dict[str, Any]


def metadata(settings: KubernetesCluster, job: Job, record: Record, *, is_queued: bool = False) -> Manifest:
    """Name, namespace and labels. is_queued: of what Kueue admits."""
    queue = {QUEUE_LABEL: settings.queue} if settings.queue and is_queued else {}
    labels = {**_labels(settings, job, record), **queue}
    return {"name": object_name(job, record), "namespace": settings.namespace, "labels": labels}


def pod_metadata(settings: KubernetesCluster, job: Job, record: Record) -> Manifest:
    """Labels and annotations of pods."""
    annotations = {"annotations": dict(settings.annotations)} if settings.annotations else {}
    return {"labels": _labels(settings, job, record), **annotations}


def _labels(settings: KubernetesCluster, job: Job, record: Record) -> dict[str, str]:
    ours = {
        "app.kubernetes.io/name": "rddm-dist",
        "app.kubernetes.io/instance": object_name(job, record),
        "app.kubernetes.io/component": job.kind,
        "rddm-dist/run": job.name,
        "rddm-dist/launch": record.number,
    }
    return {**settings.labels, **ours}


def container_of(settings: KubernetesCluster, name: str, pod: Pod, *, gpus: int) -> Manifest:
    """A container of the size of a pod, without its command."""
    size = {"cpu": pod.cpus, "memory": pod.memory, **({GPU: str(gpus)} if gpus else {})}
    disk = {"ephemeral-storage": settings.scratch} if settings.scratch else {}
    return {
        "name": name,
        "image": settings.image,
        "imagePullPolicy": settings.pull_policy,
        "env": [],
        **({"envFrom": [{"secretRef": {"name": secret}} for secret in settings.secrets]} if settings.secrets else {}),
        "resources": {"requests": {**size, **disk}, "limits": size},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [
            {"name": "launch", "mountPath": MOUNT, "readOnly": True},
            {"name": "shared-memory", "mountPath": SHARED_MEMORY},
            *([{"name": "scratch", "mountPath": SCRATCH}] if settings.scratch else []),
            *(
                {
                    "name": f"volume-{index}",
                    "mountPath": volume.mount,
                    **({"readOnly": True} if volume.read_only else {}),
                }
                for index, volume in enumerate(settings.volumes)
            ),
        ],
    }


def env_of(settings: KubernetesCluster, record: Record, more: dict[str, str]) -> list[Manifest]:
    """Environment variables: ours, more of the kind of job, those of the cluster file."""
    values = {
        LAUNCH_ENV: record.number,
        # Any other exit code starts a run again that a person has stopped.
        STOPPED_CODE_ENV: "0",
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **more,
        **settings.env,
    }
    return [{"name": name, "value": value} for name, value in values.items()]


def pod_spec(settings: KubernetesCluster, job: Job, record: Record, container: Manifest) -> Manifest:
    """What a pod is besides its container."""
    account, secrets, group = settings.service_account, settings.pull_secrets, settings.fs_group
    return {
        **({"serviceAccountName": account} if account else {}),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # a service called ray would set RAY_PORT
        **({"imagePullSecrets": [{"name": secret} for secret in secrets]} if secrets else {}),
        **({"priorityClassName": settings.priority_class} if settings.priority_class else {}),
        **({"securityContext": {"fsGroup": group, "fsGroupChangePolicy": "OnRootMismatch"}} if group else {}),
        "terminationGracePeriodSeconds": settings.drain_s + GRACE_S,
        "containers": [container],
        "volumes": [
            {"name": "launch", "configMap": {"name": object_name(job, record)}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
            *([{"name": "scratch", "emptyDir": {"sizeLimit": settings.scratch}}] if settings.scratch else []),
            *(
                {
                    "name": f"volume-{index}",
                    "persistentVolumeClaim": {
                        "claimName": volume.claim,
                        **({"readOnly": True} if volume.read_only else {}),
                    },
                }
                for index, volume in enumerate(settings.volumes)
            ),
        ],
    }


def placing(settings: KubernetesCluster) -> Manifest:
    """The nodes that workers may go to."""
    worker = settings.worker
    tolerations = [each.model_dump(exclude_defaults=True) for each in worker.tolerations]
    return {
        **({"nodeSelector": dict(worker.node_selector)} if worker.node_selector else {}),
        **({"tolerations": tolerations} if tolerations else {}),
    }


def limits(settings: KubernetesCluster) -> Manifest:
    """How long a job may take, and whether it waits for Kueue."""
    limits: Manifest = {}
    if settings.deadline_hours:
        limits["activeDeadlineSeconds"] = max(1, round(settings.deadline_hours * 3600))
    if settings.queue:
        limits["suspend"] = True  # until Kueue admits it
    return limits
