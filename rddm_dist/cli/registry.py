"""`rddm register`: put a trained model into the MLflow registry; `champion` moves only to a better one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rddm_dist.cli.evaluate import MODEL_HELP
from rddm_dist.cli.progress import say

if TYPE_CHECKING:
    from rddm_dist.loading import Model
    from rddm_dist.tracking.registry import Registration


def register(app: typer.Typer) -> None:
    app.command(
        "register", epilog="Example: rddm register runs/demo --name rddm-demo --report runs/demo/report/report.json"
    )(register_command)


def register_model(
    model: Model, *, name: str, uri: str, report: Mapping[str, Any] | None = None, margin_db: float = 0.0
) -> Registration:
    """Register the weights with what they were judged by: digests, and the scores of an evaluation report."""
    import tempfile

    from data_pipeline.errors import ModelError
    from rddm_dist.config import identity_digest
    from rddm_dist.model.weights import save_safetensors
    from rddm_dist.tracking.registry import register as register_version

    if report is not None and report["model"].get("weights_digest") != model.digest:
        raise ModelError("the report belongs to other weights than the model; run rddm evaluate again")
    if report is not None and "psnr" not in report["scores"]:
        raise ModelError(
            f"the report has no PSNR (protocol {report['protocol']['name']}), which champions are compared by; give "
            "one of a protocol that compares pairs"
        )
    digests = {"weights": model.digest, "config": identity_digest(model.config)}
    if "data_fingerprint" in model.extra:
        digests["data"] = model.extra["data_fingerprint"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_safetensors(path, model.net.state_dict(), config=model.config.model_dump(mode="json"), extra=model.extra)
        return register_version(
            path,
            uri=uri,
            name=name,
            digests=digests,
            score=score_of(report) if report is not None else None,
            margin_db=margin_db,
            run_id=_run_id(model.path),
        )


def score_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the registry compares: PSNR with its protocol, sampler, data and number of images."""
    return {
        "psnr": report["scores"]["psnr"]["mean"],
        "ssim": report["scores"]["ssim"]["mean"],
        "protocol": report["protocol"]["name"],
        "size": report["protocol"]["size"],
        "data_fingerprint": report["data"]["fingerprint"],
        "images": len(report["images"]),
        "steps": report["sampler"]["steps"],
        "eta": report["sampler"]["eta"],
    }


def _run_id(path: str) -> str | None:
    """The MLflow run of the run folder that a model lies in, if it lies in one."""
    from data_pipeline import storage

    for folder in (path, path.rsplit("/", 1)[0], path.rsplit("/", 2)[0]):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return str(json.loads(storage.read_bytes(storage.join(folder, "mlflow.json")))["run_id"])
    return None


def register_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    name: Annotated[str, typer.Option(help="Registered model")],
    report: Annotated[Path | None, typer.Option(help="report.json of rddm evaluate, the score it is judged by")] = None,
    margin_db: Annotated[float, typer.Option(help="PSNR it must gain on the champion")] = 0.0,
    tracking_uri: Annotated[str, typer.Option(help="MLflow server; default: sqlite in runs/")] = "",
) -> int:
    """Register a model version and, if it wins, make it champion."""
    from data_pipeline.errors import ModelError
    from rddm_dist.loading import load_model
    from rddm_dist.tracking.mlflow_tracker import default_uri

    loaded = load_model(model, tracking_uri=tracking_uri)
    score = None
    if report is not None:
        if not report.is_file():
            raise ModelError(f"report {report} does not exist; make it with rddm evaluate")
        score = json.loads(report.read_text())
    uri = tracking_uri or default_uri("runs")
    result = register_model(loaded, name=name, uri=uri, report=score, margin_db=margin_db)
    say(f"{result.model_uri}: {result.reason}")
    return 0
