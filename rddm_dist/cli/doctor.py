"""`rddm doctor`: is this machine fit to train, and what to mend; `rddm doctor data`: is this dataset sound.

`rddm doctor cluster` has a module of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.findings import Finding
from rddm_dist.cli import doctor_cluster
from rddm_dist.cli.dataset import check_output, write_output
from rddm_dist.cli.findings import show_findings
from rddm_dist.cli.progress import ProgressBar, say

if TYPE_CHECKING:
    from data_pipeline.doctor import Diagnosis

PACKAGES = ("torch", "deepspeed", "ray", "mlflow", "webdataset", "torchmetrics", "pyarrow", "pydantic", "safetensors")
MIN_FREE_GB = 5.0
SHOWN = 4  # findings of a kind on the console
EXIT_NOT_SOUND = 3


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        invoke_without_command=True, epilog="Example: rddm doctor; for a dataset: rddm doctor data data/train"
    )
    group.callback()(doctor)
    group.command("data", epilog="Example: rddm doctor data data/test --against data/train")(doctor_data)
    doctor_cluster.register(group)
    app.add_typer(group, name="doctor")


def doctor(
    context: typer.Context,
    storage: Annotated[str, typer.Option(help="Folder where runs would be kept")] = "runs",
) -> int:
    """Check this machine: versions, compiler, devices, disk; say what to fix. Or check a dataset, or a cluster."""
    if context.invoked_subcommand is not None:
        return 0
    findings = [*_check_versions(), *_check_compiler(), *_check_devices(), *_check_disk(storage)]
    return show_findings(findings, ready="ready to train")


def doctor_data(
    uri: Annotated[str, typer.Argument(metavar="URI", help="Folder or URL of a packed dataset")],
    against: Annotated[str, typer.Option(help="A dataset that must not show the same pictures")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Some images and the shards they lie in, no hashes")] = False,
    out: Annotated[str, typer.Option(help="HTML page to write")] = "doctor.html",
    jobs: Annotated[int, typer.Option(help="Threads; 0: one per core", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="Images to look at; 0: all, with --quick 200", min=0)] = 0,
) -> int:
    """Check a dataset: files, images, duplicates, leaks, suspicious pairs. Exit code 3 when it is not sound."""
    from data_pipeline.doctor import diagnose
    from data_pipeline.doctor_page import render

    check_output(out)
    with ExitStack() as stack:
        bars: dict[str, ProgressBar] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                stack.close()  # one bar at a time
                bars[stage] = stack.enter_context(ProgressBar(stage, total))
            bars[stage].update(done)

        diagnosis = diagnose(uri, other_uri=against, is_quick=quick, limit=limit, jobs=jobs, progress=advance)
    command = ["rddm", "doctor", "data", uri, *(["--quick"] if quick else [])]
    for flag, value in (("--against", against), ("--limit", str(limit or "")), ("--out", out)):
        command += [flag, value] if value else []
    tell(diagnosis)  # first: it took long, and the page may still fail
    write_output(out, render(diagnosis, command=shlex.join(command)).encode())
    say(f"page: {out}")
    return 0 if diagnosis.is_sound else EXIT_NOT_SOUND


def tell(diagnosis: Diagnosis) -> None:
    """The verdict in a few lines: kinds, counts, the first of each."""
    from data_pipeline.doctor_checks import KINDS

    for kind, found in diagnosis.by_kind().items():
        about = KINDS[kind]
        say(f"{about.severity.upper():<8} {about.title}: {len(found)}")
        for finding in found[:SHOWN]:
            say(f"           {finding.line}")
        if len(found) > SHOWN:
            say(f"           and {len(found) - SHOWN} more")
    verdict = "is sound" if diagnosis.is_sound else "is NOT sound"
    looked_at = f"{len(diagnosis.subject.entries)} of {diagnosis.subject.num_images} image(s) looked at"
    say(f"{diagnosis.subject.uri} {verdict}: {looked_at}, {len(diagnosis.manifest.shards)} shard(s)")


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
