"""`rddm launch`: the same job on a Ray cluster, a Slurm partition or Kubernetes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rddm_dist.cli.progress import say

if TYPE_CHECKING:
    from cluster.launch import Plan
    from cluster.settings import ClusterSettings
    from cluster.submission import Job
    from rddm_dist.config import Config

EPILOG = (
    "Example: rddm launch slurm configs/train/derain.yaml --cluster configs/cluster/slurm.yaml --workers 8 --dry-run; "
    "rddm launch ray --job evaluate runs/derain --data data/test --cluster configs/cluster/ray.yaml --workers 8"
)
ARGUMENTS_HELP = "CONFIG and section.key=value overrides; of other jobs what follows rddm JOB"
SWEEP_HELP = "section.key=VALUE,VALUE,...: a run for each combination; repeatable, further ones may follow"


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, context_settings={"ignore_unknown_options": True})(launch)


def launch(
    target: Annotated[str, typer.Argument(metavar="ray|slurm|kubernetes", help="Kind of cluster")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="CONFIG...", help=ARGUMENTS_HELP)] = None,
    cluster: Annotated[str, typer.Option(help="Cluster file, e.g. configs/cluster/slurm.yaml")] = "",
    job: Annotated[str, typer.Option(help="train, evaluate, restore or pack")] = "train",
    workers: Annotated[int, typer.Option(help="Workers; of evaluate: actors", min=1)] = 1,
    gpus_per_worker: Annotated[int, typer.Option(help="GPUs of each worker; below 0: the cluster file's")] = -1,
    storage: Annotated[str, typer.Option(help="Folder or URL of run folders, in place of the cluster file's")] = "",
    run: Annotated[str, typer.Option(help="Name of the run; the same name continues it")] = "",
    sweep: Annotated[list[str] | None, typer.Option(help=SWEEP_HELP)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted, submit nothing")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's output until it ends")] = False,
) -> int:
    """Submit a job; the run folder keeps what was submitted, under launch/."""
    from cluster.launch import backend_of, make_plan
    from cluster.settings import KINDS, load_cluster
    from data_pipeline.errors import ConfigError

    if target not in KINDS:
        raise ConfigError(f"rddm launch {target}: the kind of cluster must be one of {', '.join(KINDS)}")
    settings = load_cluster(cluster, kind=target)
    gpus = settings.gpus_per_worker if gpus_per_worker < 0 else gpus_per_worker
    made = make_job(
        job, arguments or [], settings, workers=workers, gpus_per_worker=gpus, storage=storage, run=run,
        sweep=sweep or [],
    )  # fmt: skip
    check_passwords(made)
    if made.trials and not dry_run:
        from cluster.sweep import with_parent

        backend_of(settings).check(make_plan(made, settings).job)  # before MLflow hears of it
        made = with_parent(made, sees_runs=settings.here == "same")
    plan = make_plan(made, settings)
    if dry_run:
        show(plan)
        return 0
    return submit_and_tell(plan, follow=follow)


def make_job(
    kind: str,
    arguments: list[str],
    cluster: ClusterSettings,
    *,
    workers: int,
    gpus_per_worker: int,
    storage: str,
    run: str,
    sweep: list[str],
) -> Job:
    """The job that a command line asks for, checked as far as this machine can see."""
    from cluster.submission import JOB_KINDS, Job
    from data_pipeline import storage as places
    from data_pipeline.errors import ConfigError

    if kind == "train":
        return _train_job(
            arguments, cluster, workers=workers, gpus_per_worker=gpus_per_worker, storage=storage, run=run, sweep=sweep
        )
    known = next((each for each in JOB_KINDS if each == kind), None)
    if known is None:
        raise ConfigError(f"--job {kind} is not a job; choose one of {', '.join(JOB_KINDS)}")
    if sweep:
        raise ConfigError(f"--sweep is about training; --job {kind} has no runs to compare")
    check_command(kind, arguments)
    if cluster.kind == "kubernetes" or (cluster.kind == "ray" and cluster.here == "none"):
        _check_paths(arguments)
    digest = hashlib.sha256(json.dumps([kind, *arguments]).encode()).hexdigest()[:8]
    name = run or f"{kind}-{digest}"
    parent = storage or cluster.storage or "runs"
    home = str(places.local_path(parent).absolute() / name) if places.is_local(parent) else places.join(parent, name)
    return Job(known, name, home, tuple(arguments), workers, gpus_per_worker)


def check_passwords(job: Job) -> None:
    """Refuse what would put a password into the record, which others can read."""
    from cluster.settings import find_password
    from data_pipeline.errors import ConfigError

    configs = [job.config, *(trial.config for trial in job.trials)]
    places = [find_password(config.model_dump()) for config in configs if config is not None]
    place = next(filter(None, [*places, find_password(job.arguments, "ARGUMENTS")]), "")
    if place:
        raise ConfigError(
            f"{place} holds a URL with a password, and the record of a launch is read by others; have it in the "
            "environment of the job, e.g. MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def check_command(kind: str, arguments: list[str]) -> None:
    """Let the command's own parser look at the arguments. ConfigError in its words."""
    import click

    from data_pipeline.errors import ConfigError
    from rddm_dist.cli.main import app

    command = typer.main.get_command(app).commands[kind]  # type: ignore[attr-defined]
    try:
        command.make_context(kind, list(arguments))
    except click.exceptions.Exit as error:  # --help
        raise ConfigError(f"see rddm {kind} --help") from error
    except click.ClickException as error:
        raise ConfigError(f"--job {kind}: {error.format_message()} See rddm {kind} --help") from error


def _check_paths(arguments: list[str]) -> None:
    """Refuse paths that count from this folder, of a job that starts in another one."""
    from data_pipeline.errors import ConfigError

    for argument in arguments:
        value = argument.partition("=")[2] if argument.startswith("-") else argument
        is_path = "/" in value or (value != "" and Path(value).exists())
        if is_path and not value.startswith("/") and not re.match(r"[a-z0-9]+:/", value):
            raise ConfigError(
                f"{value} counts from this folder, and the job starts in another one; give the whole path as the job "
                "sees it, or a URL"
            )


def _train_job(
    arguments: list[str],
    cluster: ClusterSettings,
    *,
    workers: int,
    gpus_per_worker: int,
    storage: str,
    run: str,
    sweep: list[str],
) -> Job:
    from cluster.submission import Job
    from cluster.sweep import make_trials, split_sweep
    from data_pipeline.errors import ConfigError
    from rddm_dist.cli.train import run_overrides
    from rddm_dist.config import load_config
    from rddm_dist.training.folder import run_folder

    unknown = [argument for argument in arguments if argument.startswith("-")]
    if unknown:
        raise ConfigError(f"no such option: {unknown[0]}; see rddm launch --help")
    if not arguments:
        raise ConfigError("CONFIG is missing; give a YAML file, for example configs/train/derain.yaml")
    fixed, swept = split_sweep(arguments[1:], sweep)
    mlflow = getattr(cluster, "mlflow", "")
    overrides = [
        *([f"tracking.uri={json.dumps(mlflow)}"] if mlflow else []),
        *fixed,
        *run_overrides(storage or cluster.storage, run),
    ]
    config = load_config(arguments[0], overrides)
    records = cluster.here if cluster.here not in ("same", "none") else ""
    trials = make_trials(arguments[0], overrides, swept, name=config.run.name, records=records)
    for each in [trial.config for trial in trials] or [config]:
        _check_train(each, cluster, workers=workers)
    return Job("train", config.run.name, run_folder(config).home, (), workers, gpus_per_worker, config, trials)


def _check_train(config: Config, cluster: ClusterSettings, *, workers: int) -> None:
    """What can be known of a run before it starts: its data where they can be seen from here, else its settings."""
    from data_pipeline import storage
    from rddm_dist.training.data import absent_datasets
    from rddm_dist.training.folder import CONFIG_FILE, run_folder
    from rddm_dist.training.prepare import check_free, check_same_settings, check_settings, check_tracking, prepare

    sees_runs = cluster.here == "same" or not storage.is_local(config.run.storage)
    if sees_runs and not absent_datasets(config):
        prepare(config, world_size=workers)
        return
    check_settings(config, world_size=workers)
    check_tracking(config)
    folder = run_folder(config)
    if not sees_runs:
        return
    if folder.exists(CONFIG_FILE):
        check_same_settings(config, folder)
    else:
        check_free(folder)


def show(plan: Plan) -> None:
    """Print exactly what would be submitted."""
    for name, text in plan.files.items():
        say(f"# ---- {plan.record.job_path(name)}")
        say(text.rstrip())
    say("# ---- to submit")
    say(plan.files["command.txt"].rstrip())


def submit_and_tell(plan: Plan, *, follow: bool) -> int:
    """Submit, say what the job is called and how to look after it; with follow wait for it."""
    from cluster.launch import ENDED, submit
    from cluster.submission import find_submitted
    from data_pipeline.errors import ConfigError
    from rddm_dist.cli.runs import follow_job, state_or_why

    where = str(plan.record.local.parent.parent)
    earlier = find_submitted(where)
    if earlier is not None:
        state = state_or_why(earlier)
        if state.word == "unknown":
            say(f"cannot tell whether launch {earlier.record.number} of {plan.job.name} still runs ({state.detail})")
        elif state.word not in ENDED:
            raise ConfigError(
                f"run {plan.job.name} is {state.word} already ({_name(earlier.ids)}); wait for it, rddm stop {where}, "
                "or choose another --run"
            )
    try:
        submitted = submit(plan)
    except BaseException:
        if plan.job.trials:
            _give_up_parent(plan.job)
        raise
    say(f"submitted {_name(submitted.ids)}; recorded in {plan.record.local}")
    say(f"rddm status {where}; rddm logs {where} --follow; rddm stop {where}")
    return follow_job(submitted, where) if follow else 0


def _give_up_parent(job: Job) -> None:
    """End the MLflow run of a sweep that was not submitted after all."""
    from cluster.sweep import finish_parent
    from rddm_dist.training.folder import try_sending

    config = job.trials[0].config
    try_sending("ending the MLflow run of the sweep", lambda: finish_parent(config, "failed"))


def _name(ids: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in ids.items())
