"""`rddm score`: score anybody's output images under the same protocols as a model of ours."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rddm_dist.cli.arguments import count_range, name_list
from rddm_dist.cli.evaluate import METRICS_HELP, PROTOCOL_HELP
from rddm_dist.cli.evaluation import (
    choose_device,
    executor,
    file_path,
    find_source,
    finish,
    prepare_report,
    run_with_bar,
    session_of,
    stopping_at,
)

if TYPE_CHECKING:
    from rddm_dist.evaluation.evaluate import Outcome, Plan
    from rddm_dist.evaluation.sources import Source

EPILOG = "Example: rddm score outputs/nima --target clean/ --input rainy/ --protocol y --name NIMA"


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(score)


def score(
    outputs: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images that a method made")],
    target: Annotated[Path | None, typer.Option(help="Folder of clean images of the same names")] = None,
    data: Annotated[str, typer.Option(help="In place of it: packed dataset, whose keys or names they have")] = "",
    input: Annotated[Path | None, typer.Option(help="Degraded images, scored beside the outputs")] = None,
    mask: Annotated[Path | None, typer.Option(help="Masks, for protocols with regions")] = None,
    protocol: Annotated[str, typer.Option(help=PROTOCOL_HELP)] = "rgb",
    metrics: Annotated[str, typer.Option(help=METRICS_HELP)] = "",
    lpips: Annotated[str, typer.Option(help="File of an LPIPS network (rddm features)")] = "",
    features: Annotated[str, typer.Option(help="File of a feature network for fid, kid, is")] = "",
    name: Annotated[str, typer.Option(help="What tables call the method; default: the folder's name")] = "",
    out: Annotated[str, typer.Option(help="Folder or URL for results and report")] = "",
    actors: Annotated[str, typer.Option(help="Ray actors: N, or MIN:MAX; 0: in this process, without Ray")] = "0",
    gpus_per_actor: Annotated[float, typer.Option(help="GPUs of each actor", min=0)] = 0.0,
    threads: Annotated[int, typer.Option(help="CPU threads of each actor", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Images that a feature network sees at once", min=1)] = 4,
    limit: Annotated[int, typer.Option(help="Only the first N keys; 0: all", min=0)] = 0,
) -> int:
    """Score images in a folder: report.json, index.html and a table, to be compared with other reports."""
    from data_pipeline.records import make_key
    from rddm_dist.evaluation.evaluate import plan_files
    from rddm_dist.evaluation.job import EvalSettings
    from rddm_dist.evaluation.protocol import get_protocol
    from rddm_dist.evaluation.report import write_report_files
    from rddm_dist.evaluation.summary import build_report

    pool = count_range(actors, flag="--actors")
    settings = EvalSettings(
        protocol=protocol,
        metrics=name_list(metrics),
        batch_size=batch_size,
        threads=threads,
        device=choose_device(pool, gpus_per_actor),
        lpips=file_path(lpips),
        features=file_path(features),
    )
    settings.check()
    source = _find_targets(outputs, data, target=target, input=input, mask=mask)
    title = name or outputs.resolve().name
    folder = out or str(Path("scores") / make_key(f"{title}-{get_protocol(protocol).name}"))
    execute = executor(pool, gpus_per_actor)
    reference: tuple[Plan, Outcome] | None = None
    with stopping_at(folder), session_of(pool, threads):
        if get_protocol(protocol).compares_pairs:
            plan = plan_files(source, outputs, settings, limit=limit)
        else:
            plan, reference = _plan_sets(source, outputs, settings, limit=limit, folder=folder, execute=execute)
        outcome = run_with_bar(plan, folder, execute, title="score")
    report = build_report(plan, outcome, name=title, outputs=str(outputs), reference=reference)
    given = {
        "data": data, "target": target, "input": input, "mask": mask, "metrics": metrics, "lpips": lpips,
        "features": features, "protocol": report["protocol"]["name"], "name": title, "limit": limit,
        "batch-size": batch_size, "threads": threads,
    }  # fmt: skip
    command = shlex.join(["rddm", "score", str(outputs), *_words(given)])
    prepare_report(folder, report)
    write_report_files(folder, report, command=command, cases=outcome.cases)
    return finish(report, folder)


def _find_targets(outputs: Path, data: str, **given: Path | None) -> Source:
    """What the outputs are compared with. Raises ConfigError or DataError in the words of this command."""
    from data_pipeline.errors import ConfigError, DataError
    from data_pipeline.sources import find_pairs
    from rddm_dist.evaluation.sources import FileSource

    if not outputs.is_dir():
        raise DataError(f"{outputs} is not a folder; give the folder of a method's output images")
    target, input, mask = given["target"], given["input"], given["mask"]
    if data:
        return find_source(data, **given)
    if target is None:
        raise ConfigError("give --target DIR with the clean images, or --data URI")
    uri = shlex.join(_words(given))
    return FileSource(find_pairs(input, target, mask), uri=uri)


def _plan_sets(
    source: Source, outputs: Path, settings: Any, *, limit: int, folder: str, execute: Any
) -> tuple[Plan, tuple[Plan, Outcome]]:
    """Sets compared as a whole: nobody needs a partner.   -> the outputs' plan; the reference's, and its outcome"""
    from data_pipeline.sources import find_clean
    from rddm_dist.evaluation.evaluate import plan_features
    from rddm_dist.evaluation.sources import FileSource

    plan = plan_features(
        FileSource(find_clean(outputs, flag="outputs"), uri=str(outputs)), settings, limit=limit, shows_cases=True
    )
    reference = plan_features(source, settings, limit=limit)
    return plan, (reference, run_with_bar(reference, folder, execute, title="reference"))


def _words(options: Mapping[str, Any]) -> list[str]:
    return [word for flag, value in options.items() if value for word in (f"--{flag}", str(value))]
