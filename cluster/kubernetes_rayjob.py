"""The RayJob of a job, for the KubeRay operator.

It is submitted in HTTPMode: the operator itself hands the entry point to Ray's dashboard, once the cluster's pods are
ready. The other modes follow the job's output through a pod or container of their own, and the whole job has failed
when that one is evicted or its connection breaks. After the loss of its head pod the operator submits again, and the
run goes on.
"""

from __future__ import annotations

from importlib.metadata import version

from cluster.kubernetes_pod import Manifest, container_of, env_of, limits, metadata, placing, pod_metadata, pod_spec
from cluster.kubernetes_shape import MOUNT, Shape
from cluster.kubernetes_start import JOIN_S, START_FILE
from cluster.settings import KubernetesCluster
from cluster.submission import Job, Record

HEAD, WORKER = "ray-head", "ray-worker"  # containers
IDLE_S = 600  # that an autoscaled pod is kept without work, as between two starts of the workers


def ray_job(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> Manifest:
    """A cluster of Ray with one group of workers, and the command that its head runs."""
    spec: Manifest = {
        "submissionMode": "HTTPMode",
        "entrypoint": f"/bin/sh {MOUNT}/{START_FILE}",
        # Each retry is a new cluster, which goes on with the same run; workers that are lost alone are the driver's.
        "backoffLimit": settings.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": settings.keep_s,
        **limits(settings),
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": _auth(settings),
            **(
                {
                    "enableInTreeAutoscaling": True,
                    "autoscalerOptions": {"version": "v2", "upscalingMode": "Default", "idleTimeoutSeconds": IDLE_S},
                }
                if shape.is_autoscaled
                else {}
            ),
            "headGroupSpec": _head(settings, job, record, shape),
            "workerGroupSpecs": [_workers(settings, job, record, shape)],
        },
    }
    named = metadata(settings, job, record, is_queued=True)
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": named, "spec": spec}


def _auth(settings: KubernetesCluster) -> Manifest:
    """Whoever reaches the dashboard of a cluster without a token runs what he likes in it."""
    secret = {"secretName": settings.auth_secret} if settings.auth_secret else {}
    return {"mode": "token", **secret}


def _head(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> Manifest:
    container = container_of(settings, HEAD, settings.head, gpus=0)
    # Nothing is cached where nothing is read; a node for heads need not have that disk.
    container["resources"]["requests"].pop("ephemeral-storage", None)
    container["ports"] = [{"name": "gcs-server", "containerPort": 6379}, {"name": "dashboard", "containerPort": 8265}]
    container["env"] = env_of(settings, record, _ray_env(settings))
    spec = pod_spec(settings, job, record, container)
    if shape.is_autoscaled:
        del spec["automountServiceAccountToken"]  # the autoscaler asks the API server for pods
    return {
        # No workers beside the one process that drives them.
        "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
        "template": {"metadata": pod_metadata(settings, job, record), "spec": spec},
    }


def _workers(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> Manifest:
    container = container_of(settings, WORKER, settings.worker, gpus=shape.gpus)
    container["env"] = env_of(settings, record, _ray_env(settings))
    fewest = settings.worker.min_pods if shape.is_autoscaled else shape.pods
    return {
        "groupName": "workers",
        "replicas": fewest,
        "minReplicas": fewest,
        "maxReplicas": shape.pods,
        "rayStartParams": {},
        "template": {
            "metadata": pod_metadata(settings, job, record),
            "spec": {**pod_spec(settings, job, record, container), **placing(settings)},
        },
    }


def _ray_env(settings: KubernetesCluster) -> dict[str, str]:
    return {
        # On SIGTERM `ray start` tells Ray that its node drains, and keeps it up so long at most.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(settings.drain_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(JOIN_S),
    }
