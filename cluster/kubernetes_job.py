"""The plain indexed Job of a job, with torchrun in its pods, and the Service by which they find each other."""

from __future__ import annotations

from cluster.kubernetes_pod import Manifest, container_of, env_of, limits, metadata, placing, pod_metadata, pod_spec
from cluster.kubernetes_shape import MOUNT, Shape, object_name
from cluster.kubernetes_start import PORT, START_FILE
from cluster.settings import KubernetesCluster
from cluster.submission import Job, Record

CONTAINER = "rddm"
JOB_LABEL = "batch.kubernetes.io/job-name"
RESUMABLE = 75  # exit code of a run that has saved and stopped


def service(settings: KubernetesCluster, job: Job, record: Record) -> Manifest:
    """What gives the pods of a Job names in the DNS."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(settings, job, record),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_LABEL: object_name(job, record)},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def plain_job(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> Manifest:
    """One pod after the other has an index, which is torchrun's rank of the node."""
    container = container_of(settings, CONTAINER, settings.worker, gpus=shape.gpus)
    container["command"] = ["/bin/sh", f"{MOUNT}/{START_FILE}"]
    container["env"] = env_of(settings, record, {})
    pod = {
        "restartPolicy": "Never",
        **({"subdomain": object_name(job, record)} if shape.pods > 1 else {}),
        **pod_spec(settings, job, record, container),
        **placing(settings),
    }
    spec: Manifest = {
        "completionMode": "Indexed",
        "completions": shape.pods,
        "parallelism": shape.pods,
        # Counted by pods, and when one of them fails all do: the others lose their connections to it, and end.
        "backoffLimit": settings.retries * shape.pods,
        "podFailurePolicy": {
            "rules": [
                _on_exit("FailJob", 2),  # bad input, which no retry mends
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                _on_exit("Ignore", RESUMABLE),  # saved, because another pod was evicted
            ]
        },
        "podReplacementPolicy": "Failed",
        "ttlSecondsAfterFinished": settings.keep_s,
        **limits(settings),
        "template": {"metadata": pod_metadata(settings, job, record), "spec": pod},
    }
    named = metadata(settings, job, record, is_queued=True)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": named, "spec": spec}


def _on_exit(action: str, code: int) -> Manifest:
    return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [code]}}
