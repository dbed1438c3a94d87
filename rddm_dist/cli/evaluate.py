"""`rddm evaluate`: score a model on a packed dataset."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rddm_dist.cli.arguments import single_count, single_steps
from rddm_dist.cli.progress import ProgressBar, console, say

if TYPE_CHECKING:
    from rddm_dist.evaluation.evaluate import EvalSettings
    from rddm_dist.loading import Model

SET_HELP = "Another sampler setting, such as sample.path=residual_first; repeatable"
SET_METAVAR = "sample.KEY=VALUE"
MODEL_HELP = "Run, model or checkpoint folder, .safetensors file, or models:/name@alias"


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rddm evaluate runs/demo --data data/eval --actors 2 --steps 5")(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    data: Annotated[str, typer.Option(help="Packed dataset (what rddm pack wrote)")],
    actors: Annotated[str, typer.Option(help="Ray actors: N, or MIN:MAX; 0: in this process, without Ray")] = "1",
    gpus_per_actor: Annotated[float, typer.Option(help="GPUs of each actor", min=0)] = 0.0,
    steps: Annotated[str, typer.Option(help="Sampling steps; default: the model's")] = "",
    eta: Annotated[float, typer.Option(help="Stochasticity; below 0: the model's", max=1)] = -1.0,
    protocol: Annotated[str, typer.Option(help="rgb or y")] = "rgb",
    out: Annotated[Path | None, typer.Option(help="Folder for report.json; default: beside the model")] = None,
    limit: Annotated[int, typer.Option(help="Only the first N keys; 0: all", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Images of one size per forward", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the sampler's noise", min=0)] = 0,
    save_images: Annotated[bool, typer.Option("--save-images", help="Keep the restored images")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar=SET_METAVAR, help=SET_HELP)] = None,
    tracking_uri: Annotated[str, typer.Option(help="MLflow server of models:/ names")] = "",
) -> int:
    """Score a model: report.json, report.html and a table."""
    import torch

    from rddm_dist.evaluation.evaluate import EvalSettings
    from rddm_dist.loading import load_model

    count = 0 if actors == "0" else single_count(actors, flag="--actors")
    overrides = sampler_overrides(settings, steps=steps, eta=eta)
    loaded = load_model(model, tracking_uri=tracking_uri, overrides=overrides)
    evaluation = EvalSettings(
        protocol=protocol,
        steps=single_steps(steps) if steps else loaded.config.sample.steps,
        eta=eta if eta >= 0 else loaded.config.sample.eta,
        seed=seed,
        batch_size=batch_size,
        device="cuda" if gpus_per_actor or (not count and torch.cuda.is_available()) else "cpu",
        overrides=overrides,
    )
    folder = out or default_report_dir(loaded)
    report = evaluate_model(
        loaded, data, evaluation, actors=count, gpus_per_actor=gpus_per_actor, out=folder, limit=limit,
        save_images=save_images,
    )  # fmt: skip
    print_scores(report)
    for row in report["failed"]:
        say(f"failed: {row['error']}")
    say(f"report: {folder / 'report.html'}")
    return 3 if report["failed"] else 0


def sampler_overrides(given: list[str] | None, *, steps: str, eta: float) -> tuple[str, ...]:
    """The --set options; ConfigError where one sets what --steps or --eta set."""
    from data_pipeline.errors import ConfigError

    keys = {override.partition("=")[0].strip() for override in given or ()}
    for short, is_given in (("steps", bool(steps)), ("eta", eta >= 0)):
        if is_given and f"sample.{short}" in keys:
            raise ConfigError(f"--{short} and --set sample.{short} say the same; give one of them")
    return tuple(given or ())


def default_report_dir(model: Model) -> Path:
    """`<run>/report` for a run, a checkpoint or an export in a local run folder, else `report` here."""
    from data_pipeline import storage

    if not storage.is_local(model.path):
        return Path("report")
    path = Path(model.path)
    folder = path if path.is_dir() else path.parent
    for candidate in (folder, folder.parent.parent):
        if (candidate / "config.yaml").is_file():
            return candidate / "report"
    return Path("report")


def evaluate_model(
    model: Model,
    data: str,
    settings: EvalSettings,
    *,
    actors: int,
    out: Path,
    gpus_per_actor: float = 0.0,
    limit: int = 0,
    save_images: bool = False,
) -> dict[str, Any]:
    """Run the units with a progress bar and write report.json and report.html into `out`.   -> the report

    model: loaded with settings.overrides
    """
    from data_pipeline.errors import ConfigError
    from data_pipeline.manifest import Manifest
    from rddm_dist.evaluation.evaluate import plan_units, run_here
    from rddm_dist.evaluation.restore import restore_settings
    from rddm_dist.evaluation.summary import build_report, write_report_files

    settings.check()
    sampler = restore_settings(model.config, steps=settings.steps, eta=settings.eta, seed=settings.seed)
    sampler.check_restoring()
    sampler.check(model.schedule)
    manifest = Manifest.load(data)
    if model.config.model.condition == "input_mask" and not manifest.has_mask:
        raise ConfigError(f"the model needs masks and {data} has none; pack it with --mask")
    units = plan_units(data, manifest, batch_size=settings.batch_size, limit=limit)
    total = sum(len(unit.rows) for unit in units)
    images_dir = str((out / "images").resolve()) if save_images else ""
    if actors:
        from cluster.ray_evaluate import run_on_ray

        say(f"starting Ray and {actors} actor(s)")
        results = run_on_ray(
            model.path, absolute(data), units, settings,
            actors=actors, gpus_per_actor=gpus_per_actor, images_dir=images_dir,
        )  # fmt: skip
    else:
        results = run_here(model.path, data, units, settings, images_dir=images_dir)
    rows: list[dict[str, Any]] = []
    with ProgressBar("evaluate", total) as bar:
        bar.update(0)
        for unit_rows in results:
            rows.extend(unit_rows)
            bar.update(len(rows))
    report = build_report(rows, model=model, data=data, manifest=manifest, settings=settings)
    write_report_files(out, report, command=_command(model, data, settings, limit=limit))
    return report


def _command(model: Model, data: str, settings: EvalSettings, *, limit: int) -> str:
    """The command that makes these scores again; what --set gave takes the place of --steps and --eta."""
    words = ["rddm", "evaluate", model.path, "--data", data, "--protocol", settings.protocol]
    keys = {override.partition("=")[0].strip() for override in settings.overrides}
    for name in ("steps", "eta"):
        if f"sample.{name}" not in keys:
            words += [f"--{name}", f"{getattr(settings, name):g}"]
    words += ["--seed", str(settings.seed), "--batch-size", str(settings.batch_size)]
    if limit:
        words += ["--limit", str(limit)]
    for override in settings.overrides:
        words += ["--set", override]
    return shlex.join(words)


def absolute(uri: str) -> str:
    """A local path made absolute (Ray's workers run elsewhere); URLs as they are."""
    return uri if "://" in uri else str(Path(uri).resolve())


def print_scores(report: dict[str, Any]) -> None:
    """The mean scores as a table."""
    from rich.table import Table

    scores = report["scores"]
    table = Table(title=f"{len(report['images'])} images, protocol {report['protocol']['name']}")
    for column in ("", "input", "restored"):
        table.add_column(column, justify="left" if not column else "right")
    for metric, unit, digits in (("psnr", " dB", 3), ("ssim", "", 4)):
        values = [scores[f"{prefix}{metric}"]["mean"] for prefix in ("input_", "")]
        table.add_row(metric.upper(), *("-" if value is None else f"{value:.{digits}f}{unit}" for value in values))
    console.print(table)
