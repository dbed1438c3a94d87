"""What a job needs of its nodes, and what one of them finds when it looks at itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cluster.findings import Finding
from data_pipeline import storage
from data_pipeline.errors import EnvironmentFault, RddmError
from data_pipeline.manifest import Manifest
from data_pipeline.reader import Dataset
from data_pipeline.retry import RetryPolicy, one_line
from rddm_dist.config import Config
from rddm_dist.limits import within
from rddm_dist.tracking.store import default_uri

T = TypeVar("T")

PACKAGES = ("torch", "deepspeed", "ray", "rddm-dist")
CODE = ("cluster", "data_pipeline", "rddm_dist")  # whose modules must be the same on all nodes
LIMIT_S = 20.0  # of one look, of which there are four; a network folder whose server is away never answers
RETRY = RetryPolicy(deadline_s=15.0, attempt_timeout_s=10.0)
DATA_ADVICE = "have data.uri and data.eval_uri at the same place on every node, readable for this user"
MIN_FREE_GB = 5.0
MIN_STORAGE_GB = 1.0
MIN_SHARED_GIB = 0.6
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Needs:
    """What a job needs of every node.

    storage: folder or URL of run folders; datasets: their locations; cache_dir: of the node's data cache, empty: the
    system's temporary folder; cache_bytes: its size, 0: none; tracking: the MLflow store, empty: none; fault: why the
    configuration cannot be read on this node.
    """

    storage: str = ""
    datasets: tuple[str, ...] = ()
    cache_dir: str = ""
    cache_bytes: int = 0
    tracking: str = ""
    fault: str = ""


@dataclass(frozen=True)
class NodeReport:
    """What one node has found.

    node: its name; rank: of the first worker there; gpus: names of those that this process sees, gpus_needed: how many
    it should; shared_gib: size of /dev/shm; free_gb: by what is kept there; fingerprints: of datasets, by location;
    clock_s: how far its clock is ahead of the first node's, give or take clock_bound_s.
    """

    node: str
    rank: int
    workers: int
    storage: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    compiler: str = ""
    gpus: tuple[str, ...] = ()
    gpus_needed: int = 0
    driver: str = ""
    shared_gib: float = 0.0
    free_gb: dict[str, float] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    clock_s: float = 0.0
    clock_bound_s: float = 0.0
    problems: tuple[Finding, ...] = ()


def needs_of(config: Config) -> Needs:
    """What the nodes of a run must offer."""
    data, tracking = config.data, ""
    if config.tracking.backend == "mlflow":
        tracking = config.tracking.uri or (
            default_uri(storage.local_path(config.run.storage)) if storage.is_local(config.run.storage) else ""
        )
    return Needs(
        storage=config.run.storage,
        datasets=tuple(dict.fromkeys((*data.uris, *([data.eval_uri] if data.eval_uri else [])))),
        cache_dir=data.cache_dir,
        cache_bytes=int(data.cache_gb * 1e9),
        tracking=tracking,
    )


def node_name() -> str:
    return socket.gethostname()


def probe(needs: Needs, *, rank: int, workers: int, gpus: int) -> NodeReport:
    """Look at this node. gpus: how many this process should see, below 0: one for each worker, if there are any.

    Raises nothing: whatever is wrong is in the report.
    """
    notes = _Notes()
    if needs.fault:
        notes.add("configuration", needs.fault, "have the same files at the same path on every node")
    names = notes.look("GPUs", _gpu_names, "see nvidia-smi on the node") or ()
    needed = gpus if gpus >= 0 else workers if names else 0
    if len(names) < needed:
        notes.add("GPUs", f"{len(names)} of {needed} are usable", _gpu_advice(names, needed))
    compiler = _look_at_compiler(notes, is_needed=not needed)
    free_gb = notes.look("disk", lambda: _look_at_disks(notes, needs), "see the mounts of the node") or {}
    fingerprints = notes.look("data", lambda: _look_at_datasets(notes, needs.datasets), DATA_ADVICE) or {}
    return NodeReport(
        node=node_name(),
        rank=rank,
        workers=workers,
        storage=needs.storage,
        versions=notes.look("versions", find_versions, "install rddm-dist again on the node") or {},
        compiler=compiler,
        gpus=names,
        gpus_needed=needed,
        driver=_driver(),
        shared_gib=_look_at_shared_memory(notes),
        free_gb=free_gb,
        fingerprints=fingerprints,
        problems=tuple(notes.findings),
    )


class _Notes:
    """What is wrong with this node, as it is found."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(self, name: str, value: str, remedy: str, *, is_warning: bool = False) -> None:
        self.findings.append(Finding(name, value, remedy, is_warning))

    def look(self, name: str, work: Callable[[], T], remedy: str) -> T | None:
        """What `work` finds; None, and a note, where it fails or does not end."""
        try:
            return within(LIMIT_S, work)
        except TimeoutError:
            self.add(name, f"no answer within {LIMIT_S:.0f} s", f"{remedy}; is its server there?")
        except (RddmError, OSError, RuntimeError, ImportError) as error:
            self.add(name, told(error), remedy)
        return None


def told(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, RddmError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return one_line(error)[:300]


def find_versions() -> dict[str, str]:
    """Of Python, the frameworks, this package and its code."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    versions["code"] = code_digest(Path(__file__).resolve().parents[1])
    return versions


def code_digest(root: Path) -> str:
    """sha256 over the modules that lie below `root`, shortened."""
    digest = hashlib.sha256()
    for package in CODE:
        for path in sorted((root / package).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _gpu_names() -> tuple[str, ...]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(torch.cuda.get_device_name(index) for index in range(count))


def _gpu_advice(names: Sequence[str], needed: int) -> str:
    if names:
        return f"start no more than {len(names)} worker(s) here, or mend the others (nvidia-smi)"
    return (
        "see nvidia-smi on the node, and that torch is a build with CUDA (python -c 'import torch; "
        "print(torch.version.cuda)'); jobs and containers must ask for GPUs"
    )


def _driver() -> str:
    """Version of NVIDIA's kernel module; empty where there is none."""
    try:
        words = DRIVER_FILE.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((word for word in words if word[0].isdigit()), "")


def _look_at_compiler(notes: _Notes, *, is_needed: bool) -> str:
    from rddm_dist.training.toolchain import check_toolchain

    try:
        return check_toolchain()
    except EnvironmentFault as error:
        problem, _, remedy = str(error).partition("; ")
        notes.add("compiler", problem, remedy or problem, is_warning=not is_needed)
        return ""


def _look_at_disks(notes: _Notes, needs: Needs) -> dict[str, float]:
    free_gb = {}
    if needs.storage and storage.is_local(needs.storage):
        folder = existing(storage.local_path(needs.storage))
        free_gb["storage"] = _free_gb(folder)
        if free_gb["storage"] < MIN_FREE_GB:
            notes.add(
                "disk", f"{free_gb['storage']:.1f} GB free at {folder}", f"free {MIN_FREE_GB:.0f} GB for checkpoints",
                is_warning=free_gb["storage"] >= MIN_STORAGE_GB,
            )  # fmt: skip
    folder = existing(Path(needs.cache_dir or tempfile.gettempdir()))
    free_gb["temporary"] = _free_gb(folder)
    wanted_gb = max(MIN_FREE_GB, needs.cache_bytes / 1e9)
    if free_gb["temporary"] < wanted_gb:
        key = f"lower data.cache_gb={needs.cache_bytes / 1e9:g} or " if needs.cache_bytes else ""
        notes.add(
            "disk", f"{free_gb['temporary']:.1f} GB free at {folder}", f"{key}free {wanted_gb:.0f} GB", is_warning=True
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        notes.add("disk", f"{folder} cannot be written ({error.strerror})", "set TMPDIR (data.cache_dir for the cache)")
    return free_gb


def existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next((place for place in (path.absolute(), *path.absolute().parents) if place.is_dir()), Path("/"))


def _free_gb(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 1e9


def _look_at_datasets(notes: _Notes, uris: Sequence[str]) -> dict[str, str]:
    """Read manifests and first samples.   -> location -> fingerprint, of those that can be read"""
    fingerprints = {}
    for uri in uris:
        try:
            manifest = Manifest.load(uri, retry=RETRY)
            dataset = Dataset(uri, manifest, retry=RETRY)
            dataset.read(0, dataset.index(0)[0], manifest.fields)
        except (RddmError, OSError) as error:
            notes.add("data", told(error), DATA_ADVICE)
        else:
            fingerprints[uri] = manifest.fingerprint
    return fingerprints


def _look_at_shared_memory(notes: _Notes) -> float:
    size = shutil.disk_usage("/dev/shm").total / 2**30 if os.path.isdir("/dev/shm") else 0.0
    if size < MIN_SHARED_GIB:
        notes.add(
            "/dev/shm",
            f"{size:.2f} GiB",
            "raise it to 2 GiB (containers: --shm-size=2g, pods: shared_memory); Ray keeps objects there, workers of a "
            "node exchange gradients through it",
            is_warning=True,
        )
    return size
