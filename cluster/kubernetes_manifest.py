"""The Kubernetes manifest of a job: a RayJob of KubeRay, or a plain Job with torchrun, as one plain YAML file.

A RayJob is submitted in HTTPMode: the operator itself hands the entry point to Ray's dashboard, once the cluster's pods
are ready. The other modes follow the job's output through a pod or container of their own, and the whole job has failed
when that one is evicted or its connection breaks. After the loss of its head pod the operator submits again, and the
run goes on.

The entry point is a script in a ConfigMap, so that no shell but its own reads the words of a command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import yaml

from cluster.kubernetes_shape import MOUNT, SCRATCH, SHARED_MEMORY, Shape, object_name, shape_of
from cluster.settings import KubernetesCluster, Pod
from cluster.submission import COMMAND_FILE, CONFIG_FILE, PATCH_FILE, SWEEP_FILE, Job, Record, record_files
from data_pipeline.errors import ConfigError
from rddm_dist.training.stopping import LAUNCH_ENV, STOPPED_CODE_ENV

MANIFEST_FILE, START_FILE = "manifest.yaml", "start.sh"
PYTHON = "python"  # of the image
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
JOB_LABEL = "batch.kubernetes.io/job-name"
HEAD, WORKER, CONTAINER = "ray-head", "ray-worker", "rddm"  # containers
GPU = "nvidia.com/gpu"
CONFIG_MAP_BYTES = 1_000_000  # etcd takes 1 MiB, what surrounds the data included
PORT, PREFLIGHT_PORT = 29400, 29401  # two, so that nobody meets those who still take leave of the preflight
JOIN_S = 1800  # that pods wait for each other: a node with GPUs may have to be bought first
IDLE_S = 600  # that an autoscaled pod is kept without work, as between two starts of the workers
GRACE_S = 30  # of a pod, after the time it has to save

Manifest = dict[str, Any]


def render(settings: KubernetesCluster, job: Job, record: Record) -> str:
    """The whole manifest, as `kubectl apply -f` takes it."""
    shape = shape_of(settings, job)
    name = object_name(job, record)
    objects = [_config_map(settings, job, record, shape)]
    if shape.is_ray:
        objects.append(_ray_job(settings, job, record, shape))
    else:
        if shape.pods > 1:
            objects.append(_service(settings, job, record))
        objects.append(_job(settings, job, record, shape))
    title = f"# {job.kind} {job.name}, launch {record.number}. To do away with it: kubectl delete -n "
    title += f"{settings.namespace} {','.join(item['kind'].lower() for item in objects)} {name}\n"
    return title + "---\n".join(_dump(item) for item in objects)


# -------------------------------------------------------------------------------------------------------- entry points


def start_script(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> str:
    """What the head pod runs, or every pod of a plain Job."""
    lines = ["#!/bin/sh", f"# {job.kind} {job.name}, launch {record.number}", "set -eu"]
    if not record.is_shared:
        names = " ".join(f"{MOUNT}/{name}" for name in _carried(settings, job))
        lines.append("# The run folder keeps what was submitted.")
        lines.append(f"mkdir -p {shlex.quote(record.home)}")
        lines.append(f"cp {names} {shlex.quote(record.home)}/")
    if shape.is_ray:
        lines += _ray_lines(settings, job, record)
    elif job.kind == "train":
        lines += _torchrun_lines(settings, job, record, shape)
    else:
        command = job.command(PYTHON, config="", with_ray=False)
        lines.append(f"exec {shlex.join([*command, *_registry(settings, job)])}")
    return "\n".join(lines) + "\n"


def _at(record: Record, name: str) -> str:
    """A file of the record as pods name it."""
    return record.job_path(name) if record.is_shared else f"{MOUNT}/{name}"


def _config_of(job: Job, record: Record) -> str:
    """The config of a training; of a sweep that of its first trial."""
    return _at(record, f"{job.trials[0].name}.yaml" if job.trials else CONFIG_FILE)


def _ray_lines(settings: KubernetesCluster, job: Job, record: Record) -> Iterator[str]:
    size = ["--workers", str(job.workers), "--gpus-per-worker", str(job.gpus_per_worker)]
    cpus = ["--cpus-per-worker", str(settings.cpus_per_worker)]
    patience = ["--wait-s", str(JOIN_S)]
    if settings.preflight:
        about = [_config_of(job, record)] if job.kind == "train" else ["--storage", job.home.rpartition("/")[0]]
        yield shlex.join([PYTHON, "-m", "rddm_dist.cli.main", "doctor", "cluster", *about, *size, *cpus])
    if job.trials:
        tune = [PYTHON, "-m", "cluster.ray_tune", _at(record, SWEEP_FILE), *size, *cpus]
        command = [*tune, "--retries", str(settings.retries), *patience]
    else:
        command = job.command(PYTHON, config=_at(record, CONFIG_FILE), retries=settings.retries)
        command += [*cpus, *patience, *_cache(settings)] if job.kind == "train" else _registry(settings, job)
    yield f"exec {shlex.join(command)}"


def _torchrun_lines(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> Iterator[str]:
    name = object_name(job, record)
    master = f"{name}-0.{name}.{settings.namespace}" if shape.pods > 1 else "127.0.0.1"
    group = [
        f"--nnodes={shape.pods}", f"--nproc-per-node={shape.workers}", '--node-rank="$JOB_COMPLETION_INDEX"',
        f"--master-addr={master}", f"--rdzv-conf=timeout={JOIN_S}",
    ]  # fmt: skip
    torchrun, config = f"{PYTHON} -m rddm_dist.torchrun", shlex.quote(_config_of(job, record))
    # Only a shell that has said so hears a signal as the first process of a container.
    yield "trap 'exit 143' TERM"
    yield f"set -- {' '.join(group)}"
    if settings.preflight:
        yield f'{torchrun} "$@" --master-port={PREFLIGHT_PORT} -m cluster.preflight {config}'
    work = " ".join(["-m rddm_dist.training", config, *_cache(settings)])
    yield f'exec {torchrun} "$@" --master-port={PORT} {work}'


def _cache(settings: KubernetesCluster) -> list[str]:
    return [f"data.cache_dir={SCRATCH}"] if settings.scratch else []


def _registry(settings: KubernetesCluster, job: Job) -> list[str]:
    """Where models:/ names are, of jobs that may read them; a training has it in its config."""
    reads = (
        settings.mlflow
        and job.kind in ("evaluate", "restore")
        and not any(each.startswith("--tracking-uri") for each in job.arguments)
    )
    return ["--tracking-uri", settings.mlflow] if reads else []


def _carried(settings: KubernetesCluster, job: Job) -> dict[str, str]:
    """The files of the record that pods would not find, by name.

    Not the code's own changes: those are in the image, or nowhere in the cluster; the record here keeps them.
    """
    files = record_files(job, settings, {}, [])
    return {name: text for name, text in files.items() if name not in (COMMAND_FILE, PATCH_FILE)}


# ------------------------------------------------------------------------------------------------------------- objects


def _config_map(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> Manifest:
    data = {START_FILE: start_script(settings, job, record, shape)}
    if not record.is_shared:
        data |= _carried(settings, job)
    size = sum(len(text.encode()) for text in data.values())
    if size > CONFIG_MAP_BYTES:
        raise ConfigError(
            f"the configs of this launch ({size / 1e6:.1f} MB) do not fit into a ConfigMap (1 MB); sweep fewer values, "
            "or let this machine see the storage (here of the cluster file, or an s3:// URL as storage)"
        )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(settings, job, record),
        "immutable": True,
        "data": data,
    }


def _ray_job(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> Manifest:
    spec: Manifest = {
        "submissionMode": "HTTPMode",
        "entrypoint": f"/bin/sh {MOUNT}/{START_FILE}",
        # Each retry is a new cluster, which goes on with the same run; workers that are lost alone are the driver's.
        "backoffLimit": settings.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": settings.keep_s,
        **_limits(settings),
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
    metadata = _metadata(settings, job, record, is_queued=True)
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _auth(settings: KubernetesCluster) -> Manifest:
    """Whoever reaches the dashboard of a cluster without a token runs what he likes in it."""
    secret = {"secretName": settings.auth_secret} if settings.auth_secret else {}
    return {"mode": "token", **secret}


def _head(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> Manifest:
    container = _container(settings, HEAD, settings.head, gpus=0)
    # Nothing is cached where nothing is read; a node for heads need not have that disk.
    container["resources"]["requests"].pop("ephemeral-storage", None)
    container["ports"] = [{"name": "gcs-server", "containerPort": 6379}, {"name": "dashboard", "containerPort": 8265}]
    container["env"] = _env(settings, record, _ray_env(settings))
    spec = _pod_spec(settings, job, record, container)
    if shape.is_autoscaled:
        del spec["automountServiceAccountToken"]  # the autoscaler asks the API server for pods
    return {
        # No workers beside the one process that drives them.
        "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
        "template": {"metadata": _pod_metadata(settings, job, record), "spec": spec},
    }


def _workers(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> Manifest:
    container = _container(settings, WORKER, settings.worker, gpus=shape.gpus)
    container["env"] = _env(settings, record, _ray_env(settings))
    fewest = settings.worker.min_pods if shape.is_autoscaled else shape.pods
    return {
        "groupName": "workers",
        "replicas": fewest,
        "minReplicas": fewest,
        "maxReplicas": shape.pods,
        "rayStartParams": {},
        "template": {
            "metadata": _pod_metadata(settings, job, record),
            "spec": {**_pod_spec(settings, job, record, container), **_placing(settings)},
        },
    }


def _ray_env(settings: KubernetesCluster) -> dict[str, str]:
    return {
        # On SIGTERM `ray start` tells Ray that its node drains, and keeps it up so long at most.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(settings.drain_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(JOIN_S),
    }


def _service(settings: KubernetesCluster, job: Job, record: Record) -> Manifest:
    """What gives the pods of a Job names in the DNS."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(settings, job, record),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_LABEL: object_name(job, record)},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _job(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> Manifest:
    container = _container(settings, CONTAINER, settings.worker, gpus=shape.gpus)
    container["command"] = ["/bin/sh", f"{MOUNT}/{START_FILE}"]
    container["env"] = _env(settings, record, {})
    pod = {
        "restartPolicy": "Never",
        **({"subdomain": object_name(job, record)} if shape.pods > 1 else {}),
        **_pod_spec(settings, job, record, container),
        **_placing(settings),
    }
    spec: Manifest = {
        "completionMode": "Indexed",
        "completions": shape.pods,
        "parallelism": shape.pods,
        # Counted by pods, and when one of them fails all do: the others lose their connections to it, and end.
        "backoffLimit": settings.retries * shape.pods,
        "podFailurePolicy": {
            "rules": [
                {  # bad input, which no retry mends
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [2]},
                },
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "podReplacementPolicy": "Failed",
        "ttlSecondsAfterFinished": settings.keep_s,
        **_limits(settings),
        "template": {"metadata": _pod_metadata(settings, job, record), "spec": pod},
    }
    metadata = _metadata(settings, job, record, is_queued=True)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _limits(settings: KubernetesCluster) -> Manifest:
    limits: Manifest = {}
    if settings.deadline_hours:
        limits["activeDeadlineSeconds"] = max(1, round(settings.deadline_hours * 3600))
    if settings.queue:
        limits["suspend"] = True  # until Kueue admits it
    return limits


def _metadata(settings: KubernetesCluster, job: Job, record: Record, *, is_queued: bool = False) -> Manifest:
    queue = {QUEUE_LABEL: settings.queue} if settings.queue and is_queued else {}
    labels = {**_labels(settings, job, record), **queue}
    return {"name": object_name(job, record), "namespace": settings.namespace, "labels": labels}


def _pod_metadata(settings: KubernetesCluster, job: Job, record: Record) -> Manifest:
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


def _container(settings: KubernetesCluster, name: str, pod: Pod, *, gpus: int) -> Manifest:
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


def _env(settings: KubernetesCluster, record: Record, more: dict[str, str]) -> list[Manifest]:
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


def _pod_spec(settings: KubernetesCluster, job: Job, record: Record, container: Manifest) -> Manifest:
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


def _placing(settings: KubernetesCluster) -> Manifest:
    worker = settings.worker
    tolerations = [each.model_dump(exclude_defaults=True) for each in worker.tolerations]
    return {
        **({"nodeSelector": dict(worker.node_selector)} if worker.node_selector else {}),
        **({"tolerations": tolerations} if tolerations else {}),
    }


# ---------------------------------------------------------------------------------------------------------------- YAML


class _Dumper(yaml.SafeDumper):
    """YAML to be read by people: scripts as blocks, nothing abbreviated; strings that a reader of YAML 1.1 takes for
    something else in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


OTHERWISE_READ = re.compile(r"[yYnN]|[-+.\d]*\d[-+.\d]*([eE][-+]?\d+)?")


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else '"' if OTHERWISE_READ.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _dump(manifest: Manifest) -> str:
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=1000)
