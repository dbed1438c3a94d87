"""How a job lies in the pods of a Kubernetes cluster, what it is called there, and whether that can be at all."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePosixPath

from cluster.settings import KubernetesCluster
from cluster.submission import Job, Record
from data_pipeline import storage
from data_pipeline.errors import ConfigError

MOUNT, SCRATCH, SHARED_MEMORY = "/etc/rddm", "/scratch", "/dev/shm"  # where pods have what the launcher gives them
NAME_CHARS = 47  # KubeRay appends to the names of RayJobs
SCALES = {"": Decimal(1), "m": Decimal("0.001"), "k": Decimal(1000), "K": Decimal(1000), "Ki": Decimal(1024)}
SCALES |= {letter: Decimal(1000) ** power for power, letter in enumerate("MGTPE", 2)}
SCALES |= {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("MGTPE", 2)}


@dataclass(frozen=True)
class Shape:
    """How the workers of a job lie in pods. gpus: of a pod; is_ray: a RayJob, else a plain Job."""

    pods: int
    workers: int
    gpus: int
    is_ray: bool
    is_autoscaled: bool = False


def shape_of(settings: KubernetesCluster, job: Job) -> Shape:
    """The pods of a job. ConfigError where the cluster file, or the form it names, does not fit the job."""
    worker = settings.worker
    # `rddm restore` is one process, which needs no Ray around it.
    is_ray = settings.form == "ray" and job.kind != "restore"
    wanted = job.workers
    if job.trials and settings.max_workers:
        wanted = max(1, min(len(job.trials), settings.max_workers // job.workers)) * job.workers
    of_pod = min(wanted, worker.workers)
    pods = -(-wanted // worker.workers)
    is_autoscaled = is_ray and 0 < worker.min_pods < pods
    shape = Shape(pods, of_pod, of_pod * job.gpus_per_worker, is_ray, is_autoscaled)
    _check_pods(settings, job, shape)
    _check_form(settings, job, shape)
    _check_places(settings, job)
    return shape


def _check_pods(settings: KubernetesCluster, job: Job, shape: Shape) -> None:
    worker = settings.worker
    if job.gpus_per_worker and not settings.gpus_per_worker:
        raise ConfigError(
            f"--gpus-per-worker {job.gpus_per_worker} asks for GPUs, the cluster file has none (gpus_per_worker=0); "
            "set gpus_per_worker there, or leave the option out"
        )
    if amount(worker.cpus) < shape.workers * settings.cpus_per_worker:
        raise ConfigError(
            f"worker.cpus={worker.cpus} is too few for {shape.workers} workers of cpus_per_worker="
            f"{settings.cpus_per_worker}; raise it, or lower worker.workers"
        )
    for name, pod in (("worker", worker), *([("head", settings.head)] if shape.is_ray else [])):
        if amount(settings.shared_memory) >= amount(pod.memory):
            raise ConfigError(
                f"shared_memory={settings.shared_memory} leaves nothing of {name}.memory={pod.memory}, of which it is "
                "a part; lower it, or raise the memory"
            )


def _check_form(settings: KubernetesCluster, job: Job, shape: Shape) -> None:
    if job.kind == "restore" and job.workers > 1:
        raise ConfigError(f"--job restore is one process, --workers {job.workers} are asked for; leave it out")
    if settings.queue and shape.is_autoscaled:
        raise ConfigError(
            f"queue={settings.queue} does not fit worker.min_pods={settings.worker.min_pods}: Kueue admits whole jobs "
            "and refuses autoscaled ones; set worker.min_pods to 0"
        )
    if shape.is_ray or job.kind == "restore":
        return
    if job.trials:
        raise ConfigError("--sweep needs form: ray in the cluster file (form=torchrun is one run)")
    if job.kind == "train" and job.workers % shape.workers:
        raise ConfigError(
            f"--workers {job.workers} is no multiple of worker.workers={settings.worker.workers}, and pods of torchrun "
            f"are all alike; ask for {shape.pods * settings.worker.workers}, or set form to ray"
        )
    if job.kind != "train" and shape.pods > 1:
        raise ConfigError(
            f"--job {job.kind} on {shape.pods} pods needs form: ray in the cluster file (form={settings.form}); or ask "
            f"for at most --workers {settings.worker.workers}"
        )


def _check_places(settings: KubernetesCluster, job: Job) -> None:
    """Run folders have to outlive their pods."""
    for at in {volume.mount for volume in settings.volumes} & {MOUNT, SCRATCH, SHARED_MEMORY}:
        raise ConfigError(f"volumes: mount={at} is used by the launcher itself; choose another path")
    mounts = [volume.mount for volume in settings.volumes]
    for at in mounts:
        if mounts.count(at) > 1:
            raise ConfigError(f"volumes: two are mounted at {at}; give each a path of its own")
    if not storage.is_local(job.home):
        return
    home = PurePosixPath(storage.local_path(job.home))
    holding = [volume for volume in settings.volumes if home.is_relative_to(volume.mount)]
    if not holding:
        raise ConfigError(
            f"storage={home.parent} is on no volume of the cluster file (volumes: {', '.join(mounts) or 'none'}), so "
            "run folders would be gone with their pods; add a volume that holds it, or give an s3:// URL"
        )
    if max(holding, key=lambda volume: len(volume.mount)).read_only:
        raise ConfigError(f"storage={home.parent} is on a volume with read_only=true; run folders are written to")


def check_seen(settings: KubernetesCluster, job: Job) -> None:
    """What is written here has to be what pods see: a folder of that name that is no volume would take it silently."""
    if settings.here == "none" or not storage.is_local(job.home):
        return
    home = PurePosixPath(storage.local_path(job.home))
    mounts = [volume.mount for volume in settings.volumes if home.is_relative_to(volume.mount)]
    place = max(mounts, key=len) if settings.here == "same" else settings.here
    if not Path(place).is_dir():
        raise ConfigError(
            f"here={settings.here}, but {place} does not exist on this machine; mount the volume there, or set here of "
            "the cluster file to where it is, or to none"
        )


def amount(quantity: str) -> Decimal:
    """What a quantity of Kubernetes comes to: cores, or bytes."""
    number, suffix = re.fullmatch(r"([\d.]+)(.*)", quantity).groups()  # type: ignore[union-attr]  # checked as settings
    return Decimal(number) * SCALES[suffix]


def object_name(job: Job, record: Record) -> str:
    """What a launch is called in the cluster: run and number, in the letters and the length that it takes.

    Runs whose names differ by other letters alone are told apart by a digest.
    """
    plain = re.sub(r"[^a-z0-9-]", "-", job.name.lower())
    if not plain[0].isalpha():
        plain = f"run-{plain}"
    room = NAME_CHARS - len(record.number) - 1
    if plain != job.name or len(plain) > room:
        digest = hashlib.sha256(job.name.encode()).hexdigest()[:6]
        plain = f"{plain[: room - len(digest) - 1].rstrip('-')}-{digest}"
    return f"{plain}-{record.number}"
