"""What the pods of a job run: a script in a ConfigMap, so that no shell but its own reads the words of a command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from cluster.kubernetes_shape import MOUNT, SCRATCH, Shape, object_name
from cluster.settings import KubernetesCluster
from cluster.submission import COMMAND_FILE, CONFIG_FILE, PATCH_FILE, SWEEP_FILE, Job, Record, record_files

START_FILE = "start.sh"
PYTHON = "python"  # of the image
PORT, PREFLIGHT_PORT = 29400, 29401  # two, so that nobody meets those who still take leave of the preflight
JOIN_S = 1800  # that pods wait for each other: a node with GPUs may have to be bought first


def start_script(settings: KubernetesCluster, job: Job, record: Record, shape: Shape) -> str:
    """What the head pod runs, or every pod of a plain Job."""
    lines = ["#!/bin/sh", f"# {job.kind} {job.name}, launch {record.number}", "set -eu"]
    if not record.is_shared:
        names = " ".join(f"{MOUNT}/{name}" for name in carried(settings, job))
        lines.append("# The run folder keeps what was submitted; of several pods the first one sees to it.")
        folder = shlex.quote(record.home)
        lines.append(f'[ "${{JOB_COMPLETION_INDEX:-0}}" != 0 ] || {{ mkdir -p {folder} && cp {names} {folder}/; }}')
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
    # Only a shell that has said so hears a signal as the first process of a container, and one that waits at once.
    yield "trap 'exit 143' TERM"
    yield f"set -- {' '.join(group)}"
    if settings.preflight:
        yield f'{torchrun} "$@" --master-port={PREFLIGHT_PORT} -m cluster.preflight {config} & wait $!'
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


def carried(settings: KubernetesCluster, job: Job) -> dict[str, str]:
    """The files of the record that pods would not find, by name.

    Not the code's own changes: those are in the image, or nowhere in the cluster; the record here keeps them.
    """
    files = record_files(job, settings, {}, [])
    return {name: text for name, text in files.items() if name not in (COMMAND_FILE, PATCH_FILE)}
