"""`rddm doctor cluster`, and the same look by the workers of a job: are the nodes fit for it, and what to mend."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import RddmError
from rddm_dist.cli.findings import show_findings
from rddm_dist.cli.progress import say
from rddm_dist.log import quiet_frameworks

if TYPE_CHECKING:
    from cluster.findings import Finding
    from cluster.node_report import Needs, NodeReport
    from cluster.settings import ClusterSettings

EPILOG = (
    "Example: rddm doctor cluster configs/train/derain.yaml --workers 8 --gpus-per-worker 1; before submitting: "
    "rddm doctor cluster configs/train/derain.yaml --cluster configs/cluster/slurm.yaml --workers 8"
)
READY = "ready to start"
WORKERS_HELP = "Workers of the job; 0: one on every node that has room"
STORAGE_HELP = "Folder or URL of run folders, in place of the config's"
CLUSTER_HELP = "Cluster file: also find out what a submission would"
WAIT_S = 60.0  # for all workers to meet


def register(group: typer.Typer) -> None:
    group.command("cluster", epilog=EPILOG)(doctor_cluster)


def doctor_cluster(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help="YAML file of a run, e.g. its data")] = "",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Override keys")] = None,
    storage: Annotated[str, typer.Option(help=STORAGE_HELP)] = "",
    workers: Annotated[int, typer.Option(help=WORKERS_HELP, min=0)] = 0,
    gpus_per_worker: Annotated[int, typer.Option(help="GPUs of each worker; below 0: the cluster file's, or 0")] = -1,
    cpus_per_worker: Annotated[int, typer.Option(help="CPU cores of each worker", min=1)] = 1,
    cluster: Annotated[str, typer.Option(help=CLUSTER_HELP)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines")] = False,
) -> int:
    """Check the nodes of the Ray cluster of RAY_ADDRESS, else this machine: one line each, exit code 2 if unfit.

    With --cluster first what a submission would find out; the nodes of such a cluster are checked when a job starts.
    """
    from cluster.preflight import judge, judge_group
    from cluster.ray_preflight import look_with_ray
    from cluster.settings import load_cluster

    findings: list[Finding] = []
    nodes: list[NodeReport] = []
    if cluster:
        settings = load_cluster(cluster)
        gpus_per_worker = settings.gpus_per_worker if gpus_per_worker < 0 else gpus_per_worker
        storage = storage or settings.storage
        findings.append(
            _look_at_submission(
                config,
                overrides or [],
                settings,
                path=cluster,
                storage=storage,
                workers=max(1, workers),
                gpus=gpus_per_worker,
            )
        )
    needs = _needs(config, overrides or [], storage)
    if not cluster or os.environ.get("RAY_ADDRESS"):
        tell = (lambda text: None) if as_json else say
        nodes, group = look_with_ray(
            needs,
            workers=workers,
            gpus_per_worker=max(0, gpus_per_worker),
            cpus_per_worker=cpus_per_worker,
            tell=tell,
        )
        findings += [*judge(nodes), *judge_group(group)]
    if as_json:
        found_json = [{**asdict(finding), "mark": finding.mark} for finding in findings]
        print(json.dumps({"findings": found_json, "nodes": [asdict(node) for node in nodes]}, indent=1))
        return 2 if any(finding.is_problem for finding in findings) else 0
    return show_findings(findings, ready=READY if nodes else "ready to submit; its nodes are checked when a job starts")


def _needs(config: str, overrides: list[str], storage: str) -> Needs:
    """What a run needs of its nodes; without a config its storage alone."""
    from cluster.node_report import Needs, needs_of
    from rddm_dist.cli.train import run_overrides
    from rddm_dist.config import RunSection, load_config

    if config:
        return needs_of(load_config(config, [*overrides, *run_overrides(storage, "")]))
    return Needs(storage=_absolute(storage or RunSection().storage))


def _absolute(storage: str) -> str:
    from data_pipeline import storage as places

    return str(places.local_path(storage).absolute()) if places.is_local(storage) else storage


def _look_at_submission(
    config: str,
    overrides: list[str],
    settings: ClusterSettings,
    *,
    path: str,
    storage: str,
    workers: int,
    gpus: int,
) -> Finding:
    """What a submission to the cluster of that file finds out."""
    from cluster.findings import Finding
    from cluster.launch import backend_of, make_plan
    from cluster.submission import Job
    from rddm_dist.cli.launch import make_job
    from rddm_dist.config import Config

    name = f"{settings.kind} submission"
    try:
        if config:
            job = make_job(
                "train", [config, *overrides], settings, workers=workers, gpus_per_worker=gpus, storage=storage, run="",
                sweep=[],
            )  # fmt: skip
        else:
            job = Job("train", "any", _absolute(storage or "runs") + "/any", (), workers, gpus, Config())
        make_plan(job, settings)
        backend_of(settings).check(job)
    except RddmError as error:
        return Finding(name, f"{path}: refused", str(error))
    return Finding(name, f"{path}: {workers} worker(s) of {gpus} GPU(s) would be accepted")


def main_of_workers() -> None:
    """What every worker of a job runs under torchrun. The first one prints; exit code 0 or 2 on all."""
    quiet_frameworks()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of each attempt to connect
    parser = argparse.ArgumentParser(prog="python -m cluster.preflight", description=__doc__)
    parser.add_argument("config", nargs="?", default="", help="a YAML file, for example configs/train/demo.yaml")
    parser.add_argument("--storage", default="", help=STORAGE_HELP)
    parser.add_argument("--wait", type=float, default=WAIT_S, metavar="SECONDS", help="for all workers to meet")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    from cluster.node_report import Needs, node_name
    from cluster.preflight import GROUP_LIMIT_S, examine, judge, judge_group
    from rddm_dist import comm

    topology = comm.topology_from_env()
    is_first = topology.rank == 0
    tell = say if is_first else lambda text: None
    try:
        tell(f"waiting for {topology.world_size} worker(s) to meet, {arguments.wait:.0f} s at most")
        comm.assemble(topology, name=node_name(), wait_s=arguments.wait, timeout_s=GROUP_LIMIT_S, tell=tell)
        try:
            needs = _needs(arguments.config, arguments.overrides, arguments.storage)
        except RddmError as error:  # one node's trouble, told with what else there is
            needs = Needs(fault=str(error))
        nodes, group = examine(needs, topology, gpus=-1, workers=topology.local_world_size, tell=tell)
        code = 0
        if is_first:
            code = show_findings([*judge(nodes), *judge_group(group)], ready=READY)
        code = comm.broadcast_object(code)
    except RddmError as error:
        if is_first or not error.is_shared:
            print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    comm.leave(code)
