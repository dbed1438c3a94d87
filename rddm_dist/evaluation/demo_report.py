"""The page of the demo: an evaluation's page, headed by what the whole demo did."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rddm_dist.evaluation.figures import journal_points
from rddm_dist.evaluation.page import render_page
from rddm_dist.evaluation.report import Tile, gain_tile, report_body, report_lead
from rddm_dist.evaluation.wording import decimals
from rddm_dist.evaluation.writing import write_text
from rddm_dist.tracking.store import default_uri

if TYPE_CHECKING:
    from rddm_dist.evaluation.baseline import Baseline
    from rddm_dist.evaluation.cases import Case
    from rddm_dist.loading import Model


def write_demo_report(
    run_dir: Path,
    *,
    summary: Mapping[str, Any],
    report: Mapping[str, Any],
    baseline: Baseline,
    journal: Sequence[Mapping[str, Any]],
    model: Model,
    cases: Sequence[Case] = (),
) -> Path:
    """`<run_dir>/report/index.html`: the page of the demo's evaluation, headed by `summary`.   -> its path

    summary: the object of summary.json; baseline: the filter that summary["baseline_psnr"] belongs to; cases: pictures
    of the evaluation.
    """
    from rddm_dist.config import to_yaml

    path = run_dir / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    config, steps = model.config, report["sampler"]["steps"]
    store = config.tracking.uri or default_uri(config.run.storage)
    mlflow = {"run": summary["mlflow_run_id"], "experiment": config.tracking.experiment, "store": store}
    body = report_body(
        report,
        cases,
        tiles=_demo_tiles(summary, baseline.name, journal),
        command=f"rddm demo\nrddm evaluate {run_dir} --data {summary['eval_data']} --steps {steps}",
        curve=None,
        journal=journal,
        config=to_yaml(config),
        mlflow={**mlflow, "model": summary["model_uri"], "look at it": f"mlflow ui --backend-store-uri {store}"},
    )
    write_text(path, render_page("RDDM demo: restoring rainy photographs", report_lead(report), body))
    return path


def _demo_tiles(summary: Mapping[str, Any], baseline: str, journal: Sequence[Mapping[str, Any]]) -> list[Tile]:
    restored, filtered = summary["restored_psnr"], summary["baseline_psnr"]
    rates = [rate for _, rate in journal_points(journal, "perf/images_per_s")]
    rate_note = f", {statistics.median(rates):.1f} images/s" if rates else ""
    ssim_note = f"input {decimals(summary['input_ssim'], 4)}"
    return [
        Tile("restored PSNR", decimals(restored, 2), "dB", f"input {decimals(summary['input_psnr'], 2)} dB"),
        gain_tile("gain over input", summary["gain_db"], "mean over images"),
        gain_tile("gain over best filter", restored - filtered, f"{baseline}: {decimals(filtered, 2)} dB"),
        Tile("restored SSIM", decimals(summary["restored_ssim"], 4), "", ssim_note),
        Tile("training", f"{summary['train_seconds']:.0f}", "s", f"{summary['train_steps']} steps{rate_note}"),
        Tile("everything", f"{summary['wall_seconds']:.0f}", "s", "packing to report"),
    ]
