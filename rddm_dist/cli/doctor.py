"""`rddm doctor`: is this machine fit to train, and what to mend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import typer

from rddm_dist.cli.progress import say

PACKAGES = ("torch", "deepspeed", "ray", "mlflow", "webdataset", "torchmetrics", "pydantic", "safetensors")
MIN_FREE_GB = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is set when something is wrong."""

    name: str
    value: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rddm doctor")(doctor)


def doctor(
    storage: Annotated[str, typer.Option(help="Folder where runs would be kept")] = "runs",
) -> int:
    """Check this machine: versions, compiler, devices, disk; say what to fix."""
    findings = [*_check_versions(), *_check_compiler(), *_check_devices(), *_check_disk(storage)]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        say(f"{'FIX' if finding.remedy else ' ok'}  {finding.name:<{width}}  {finding.value}")
        if finding.remedy:
            say(f"     {' ' * width}  -> {finding.remedy}")
    problems = sum(1 for finding in findings if finding.remedy)
    say(f"{problems} thing(s) to fix" if problems else "ready to train")
    return 2 if problems else 0


def _check_versions() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    for name in PACKAGES:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "pip install rddm-dist")
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError) as error:
            # The CUDA build beside a CPU torch: it breaks torchmetrics too.
            yield Finding("torchvision", f"broken: {error}", "pip uninstall torchvision (this project does not use it)")


def _check_compiler() -> Iterator[Finding]:
    from data_pipeline.errors import EnvironmentFault
    from rddm_dist.training.toolchain import check_toolchain

    try:
        yield Finding("C++ compiler", check_toolchain())
    except EnvironmentFault as error:
        yield Finding("C++ compiler", "not usable", str(error))


def _check_devices() -> Iterator[Finding]:
    import torch

    yield Finding("CPU cores", str(os.cpu_count()))
    if not torch.cuda.is_available():
        yield Finding("GPUs", "none (training runs on the CPU, for small models)")
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield Finding(f"GPU {index}", f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0.0
    remedy = "" if shared > 0.6 else "raise it (containers: --shm-size=2g); Ray keeps objects there"
    yield Finding("/dev/shm", f"{shared:.1f} GiB free", remedy)


def _check_disk(storage: str) -> Iterator[Finding]:
    for name, folder in (("runs", storage), ("temporary files", tempfile.gettempdir())):
        existing = os.path.abspath(folder)
        while not os.path.isdir(existing):
            existing = os.path.dirname(existing)
        free = shutil.disk_usage(existing).free / 1e9
        remedy = "" if free > MIN_FREE_GB else f"free some space, {MIN_FREE_GB:.0f} GB at least"
        if not os.access(existing, os.W_OK):
            remedy = "make it writable or choose another --storage"
        yield Finding(f"disk for {name}", f"{free:.0f} GB free at {existing}", remedy)
