"""Cluster files (`configs/cluster/*.yaml`): where jobs run and what they may use, every key checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from data_pipeline.errors import ConfigError
from rddm_dist.config import explain
from rddm_dist.sections import Section
from rddm_dist.training.stopping import LAUNCH_ENV, STOPPED_CODE_ENV

_QUANTITY = r"\d+(\.\d+)?(m|[kKMGTPE]i?)?"
_LABEL_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_OBJECT = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
Quantity = Annotated[str, Field(pattern=rf"^{_QUANTITY}$")]
QuantityOrNone = Annotated[str, Field(pattern=rf"^({_QUANTITY})?$")]
# As Kubernetes takes them: names of its objects (or none), keys of labels and annotations, values of labels.
ObjectName = Annotated[str, Field(pattern=rf"^{_OBJECT}$")]
ObjectOrNone = Annotated[str, Field(pattern=rf"^({_OBJECT})?$")]
LabelKey = Annotated[str, Field(pattern=rf"^({_OBJECT}/)?{_LABEL_WORD}$")]
LabelValue = Annotated[str, Field(pattern=rf"^({_LABEL_WORD})?$")]
Labels = dict[LabelKey, LabelValue]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
SlurmTime = Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d{2}){0,2}$")]
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
URL_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")
TAG = re.compile(r"[^/]+[:@][^/]+$")  # of the last part of an image's name: a registry has a port before a slash


def _key(default: Any, description: str, **constraints: Any) -> Any:
    return Field(default, description=description, **constraints)


# What a job is told by its launcher; another value of these would be lost stops, or pods killed while they save.
LAUNCHER_ENV = frozenset({LAUNCH_ENV, STOPPED_CODE_ENV, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"})


def find_password(values: Any, place: str = "") -> str:
    """The dotted place of the first URL with a password among nested values; empty: there is none."""
    if isinstance(values, dict):
        inner = [(f"{place}.{key}" if place else str(key), value) for key, value in values.items()]
    elif isinstance(values, (list, tuple)):
        inner = [(f"{place}[{index}]", value) for index, value in enumerate(values)]
    else:
        return place if isinstance(values, str) and URL_PASSWORD.search(values) else ""
    return next(filter(None, (find_password(value, where) for where, value in inner)), "")


class _Cluster(Section):
    """What all kinds of clusters have."""

    storage: str = _key("", "Folder or URL of run folders as jobs see it; empty: run.storage of the config")
    here: str = _key(
        "same", "The same folder as this machine sees it; same: under that path; none: not at all (records: launches/)"
    )
    env: dict[VariableName, str] = _key({}, "Environment variables of jobs; no secrets, they lie in the run folder")
    gpus_per_worker: int = _key(0, "GPUs of each worker", ge=0)
    cpus_per_worker: int = _key(1, "CPU cores of each worker", ge=1)
    max_workers: int = _key(0, "The most workers this cluster can ever give; 0: not known", ge=0)
    retries: int = _key(3, "How often a job is started again after preemption or lost machines", ge=0)
    preflight: bool = _key(True, "Check the machines at the start of each job (rddm doctor cluster)")

    @model_validator(mode="after")
    def _no_passwords(self) -> Self:
        place = find_password(self.model_dump())
        if place:
            raise ValueError(
                f"{place} holds a URL with a password, and cluster files are copied into run folders and manifests; "
                "have it in the environment of jobs, or in a Secret (MLflow: MLFLOW_TRACKING_USERNAME, _PASSWORD)"
            )
        return self

    @field_validator("env", mode="after")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if SECRET_NAME.search(name) or URL_PASSWORD.search(value):
                raise ValueError(
                    f"env.{name} looks like a secret, and cluster files are copied into run folders; have it in the "
                    "environment of the job (secrets: on Kubernetes, the shell's own on Slurm and Ray)"
                )
        return env


class Container(Section):
    engine: Literal["apptainer", "pyxis"] = _key("apptainer", "What runs the container")
    image: str = _key(..., "A .sif file, or the name of an image")
    mounts: tuple[str, ...] = _key((), "HOST[:CONTAINER] folders to mount; the storage comes by itself")
    options: tuple[str, ...] = _key((), "Further options, for example --writable-tmpfs")


class SlurmCluster(_Cluster):
    kind: Literal["slurm"]
    form: Literal["torchrun", "ray"] = _key("torchrun", "Workers by torchrun, or by Ray (ray symmetric-run)")
    partition: str = _key(..., "Partition that jobs go to", min_length=1)
    account: str = _key("", "Account that pays")
    qos: str = _key("", "Quality of service")
    constraint: str = _key("", "Features that nodes must have")
    workers_per_node: int = _key(1, "Workers of a node, usually one per GPU", ge=1)
    memory: str = _key("", "Memory of a node, e.g. 64G; empty: the partition's default", pattern=r"^(\d+[KMGT]?)?$")
    time: SlurmTime = _key("24:00:00", "Time limit of one start; the run goes on in the next")
    signal_s: int = _key(300, "Seconds before the time limit at which the run saves and stops", ge=30)
    exclusive: bool = _key(True, "Have nodes alone; needed by form ray, whose end stops all Ray processes of the user")
    requeue: bool = _key(True, "Queue a stopped run again (exit 75), until `retries` starts in a row saved nothing")
    array_parallel: int = _key(0, "Trials of a sweep that run at a time; 0: as many as the partition takes", ge=0)
    scratch: str = _key("", "Folder on each node for the data cache, e.g. /scratch/$SLURM_JOB_ID; empty: none")
    network: str = _key("", "Interface for workers to talk over, e.g. ib0; empty: chosen")
    port: int = _key(29400, "Port of the first node at which workers meet, and the next ones up", ge=1024, le=65000)
    wait_s: int = _key(300, "Seconds to wait for all nodes to join Ray", ge=30)
    python: str = _key("python3", "Python that has rddm-dist, on every node, e.g. /shared/venv/bin/python")
    setup: tuple[str, ...] = _key((), "Shell lines before anything else, e.g. module load cuda")
    container: Container | None = None
    sbatch: tuple[str, ...] = _key((), "Further #SBATCH options, e.g. --mail-type=END")

    @model_validator(mode="after")
    def _check(self) -> SlurmCluster:
        if self.form == "ray" and not self.exclusive:
            raise ValueError(
                "exclusive=false does not fit form=ray: ray symmetric-run ends with ray stop, which stops all Ray "
                "processes of the user on a node; set exclusive to true or form to torchrun"
            )
        return self


class RayCluster(_Cluster):
    kind: Literal["ray"]
    address: str = _key(..., "Dashboard of the cluster, e.g. http://head:8265")
    python: str = _key("python", "Python that has rddm-dist, on every node of the cluster")
    entrypoint_cpus: float = _key(0.0, "CPUs set aside for the command that drives the workers", ge=0)
    entrypoint_resources: dict[str, float] = _key({}, "Resources that place that command, e.g. {on-demand: 0.01}")
    runtime_env: dict[str, Any] = _key({}, "Further keys of Ray's runtime environment")
    metadata: dict[str, str] = _key({}, "Further metadata of the job")
    wait_s: int = _key(600, "Seconds until all workers must have started, lost ones again; else exit 75", ge=30)

    @field_validator("address", mode="after")
    @classmethod
    def _is_dashboard(cls, address: str) -> str:
        if not re.match(r"https?://[^/]", address):
            raise ValueError(
                f"address={address} is not the URL of a dashboard; give one such as http://head:8265 (not the port "
                "6379 of ray start, nor ray://)"
            )
        return address

    @field_validator("runtime_env", mode="after")
    @classmethod
    def _ours(cls, runtime_env: dict[str, Any]) -> dict[str, Any]:
        for name in ("working_dir", "env_vars"):
            if name in runtime_env:
                other = "env" if name == "env_vars" else "a path in python"
                raise ValueError(f"runtime_env.{name} is set by the launcher; use {other}")
        return runtime_env


class Pod(Section):
    cpus: Quantity = _key("2", "CPUs of the pod")
    memory: Quantity = _key("8Gi", "Memory of the pod, its limit too")


class Toleration(Section):
    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""


class WorkerPod(Pod):
    workers: int = _key(1, "Workers of a pod, usually one per GPU", ge=1)
    min_pods: int = _key(0, "Fewest pods of the autoscaled group; 0: as many as the job has", ge=0)
    node_selector: Labels = _key({}, "Labels that nodes must have")
    tolerations: tuple[Toleration, ...] = _key((), "Taints that pods bear, as Kubernetes writes them")


class Volume(Section):
    claim: ObjectName = _key(..., "PersistentVolumeClaim, readable and writable by many nodes")
    mount: str = _key(..., "Where it is mounted", pattern=r"^/.+")
    read_only: bool = _key(False, "Mount it read-only")


class KubernetesCluster(_Cluster):
    kind: Literal["kubernetes"]
    form: Literal["ray", "torchrun"] = _key("ray", "RayJob of the KubeRay operator, or a plain Job with torchrun")
    namespace: str = _key("default", "Namespace of everything", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    context: str = _key("", "Context of kubectl; empty: the current one")
    image: str = _key(..., "Image with rddm-dist, with a tag or digest")
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = _key("IfNotPresent", "When the image is pulled")
    pull_secrets: tuple[ObjectName, ...] = _key((), "Names of Secrets to pull it with")
    service_account: ObjectOrNone = _key("", "Service account of pods; empty: the namespace's default")
    secrets: tuple[ObjectName, ...] = _key((), "Names of Secrets whose entries become environment variables")
    auth_secret: ObjectOrNone = _key("", "Secret with Ray's token under auth_token; empty: KubeRay's own, or none")
    head: Pod = Pod()
    worker: WorkerPod = WorkerPod(cpus="8", memory="32Gi")
    volumes: tuple[Volume, ...] = ()
    fs_group: int = _key(0, "Group that pods are in and volumes are given to (fsGroup); 0: as volumes are", ge=0)
    scratch: str = _key(
        "", "Local disk of workers for the data cache, e.g. 100Gi; empty: none", pattern=rf"^({_QUANTITY})?$"
    )
    shared_memory: Quantity = _key("2Gi", "/dev/shm of each pod, counted as its memory")
    mlflow: str = _key("", "MLflow server, http(s)://...; empty: tracking.uri of the config")
    queue: ObjectOrNone = _key("", "Kueue local queue; empty: none")
    priority_class: ObjectOrNone = _key("", "PriorityClass of pods; empty: none")
    drain_s: int = _key(120, "Seconds a pod has to save after it is told to go", ge=30)
    deadline_hours: float = _key(0.0, "The job is ended after so many hours; 0: never", ge=0)
    keep_s: int = _key(3600, "Seconds that a finished job stays to be looked at", ge=0)
    labels: Labels = _key({}, "Further labels")
    annotations: dict[LabelKey, str] = _key({}, "Further annotations of pods")

    @model_validator(mode="after")
    def _check(self) -> KubernetesCluster:
        for name in LAUNCHER_ENV & set(self.env):
            raise ValueError(f"env.{name} is set by the launcher itself (drain_s is how long pods have); leave it out")
        return self

    @field_validator("image", mode="after")
    @classmethod
    def _has_tag(cls, image: str) -> str:
        if re.search(r"\s", image):
            raise ValueError(f"image={image} has a space in it; give the name of an image, as registry/name:tag")
        if not TAG.search(image) or image.endswith(":latest"):
            raise ValueError(
                f"image={image} has no tag, so nobody could say later what ran; give one that does not move, e.g. "
                f"{image.removesuffix(':latest')}:0.1.0"
            )
        return image


ClusterSettings = SlurmCluster | RayCluster | KubernetesCluster
KINDS: dict[str, type[SlurmCluster] | type[RayCluster] | type[KubernetesCluster]] = {
    "ray": RayCluster,
    "slurm": SlurmCluster,
    "kubernetes": KubernetesCluster,
}


def load_cluster(path: str | Path, *, kind: str = "") -> ClusterSettings:
    """Read a cluster file of that kind, by default of any.

    Raises ConfigError in one line for a missing file, bad YAML, another kind, an unknown key or a bad value.
    """
    if not path:
        raise ConfigError(
            f"--cluster is missing; give a cluster file, for example --cluster configs/cluster/{kind or 'ray'}.yaml"
        )
    if not Path(path).is_file():
        known = sorted(str(p) for p in Path("configs/cluster").glob("*.yaml"))
        raise ConfigError(f"--cluster {path} does not exist" + (f"; there are {', '.join(known)}" if known else ""))
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--cluster {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"--cluster {path} must hold keys such as 'kind: {kind or 'ray'}', not a {type(values).__name__}"
        )
    found = values.get("kind")
    if kind and found != kind:
        raise ConfigError(f"--cluster {path}: kind={found} does not fit rddm launch {kind}; it must be kind: {kind}")
    if found not in KINDS:
        raise ConfigError(f"--cluster {path}: kind={found} is no kind of cluster; choose one of {', '.join(KINDS)}")
    model = KINDS[found]
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"--cluster {path}: {explain(error, list(_keys(model)))}") from error


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all keys."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += _keys(kind, f"{prefix}{name}.")
    return names


def to_yaml(cluster: ClusterSettings) -> str:
    """Every key of a cluster file, written out."""
    return yaml.safe_dump(cluster.model_dump(mode="json"), sort_keys=False)
