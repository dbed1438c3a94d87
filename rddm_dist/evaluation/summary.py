"""From per-image rows to the report of an evaluation: the object in report.json, the same bytes whoever ran the units.

Numbers that JSON lacks are written as "inf" and "nan". A restored image that equals its target has PSNR inf: a mean is
over the finite values, and how many values were infinite or not a number stands beside it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import DataError
from rddm_dist.evaluation.protocol import METRICS, get_protocol
from rddm_dist.tracking.journal import json_safe

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest
    from rddm_dist.evaluation.evaluate import EvalSettings
    from rddm_dist.evaluation.gallery import ReportImage
    from rddm_dist.loading import Model

FORMAT_VERSION = 1
REPORT_JSON, REPORT_HTML = "report.json", "report.html"


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and extremes of the finite values, and how many were not finite.

    Sums are exact (math.fsum), so the order of the values does not matter. mean, std, min and max are None where no
    value is finite; std is that of a sample, None for fewer than two.
    """
    finite = [value for value in values if math.isfinite(value)]
    count = len(finite)
    mean = math.fsum(finite) / count if count else None
    std = None
    if mean is not None and count > 1:
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (count - 1))
    return {
        "mean": mean,
        "std": std,
        "min": min(finite, default=None),
        "max": max(finite, default=None),
        "count": count,
        "infinite": sum(math.isinf(value) for value in values),
        "nan": sum(math.isnan(value) for value in values),
    }


def summarize_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Summaries of psnr, ssim, input_psnr, input_ssim and of gain_db, the PSNR gained per image."""
    names = [prefix + metric for metric in METRICS for prefix in ("input_", "")]
    scores = {name: summarize([float(row[name]) for row in rows]) for name in names if rows and name in rows[0]}
    scores["gain_db"] = summarize([float(row["psnr"]) - float(row["input_psnr"]) for row in rows])
    return scores


def build_report(
    rows: Sequence[Mapping[str, Any]], *, model: Model, data: str, manifest: Manifest, settings: EvalSettings
) -> dict[str, Any]:
    """The object for report.json from the rows of all units, in any order; images that failed are listed apart."""
    from rddm_dist.config import identity_digest
    from rddm_dist.evaluation.restore import restore_settings

    config = model.config
    scored = [row for row in rows if "error" not in row]
    failed = sorted((dict(row) for row in rows if "error" in row), key=lambda row: str(row["key"]))
    if failed and not scored:
        raise DataError(f"none of the {len(failed)} images can be read; the first: {failed[0]['error']}")
    sampler = restore_settings(config, steps=settings.steps, eta=settings.eta, seed=settings.seed)
    side = sampler.preprocess.resize
    protocol = {**get_protocol(settings.protocol).describe(), **({"size": f"resized to {side}x{side}"} if side else {})}
    return {
        "format_version": FORMAT_VERSION,
        "protocol": protocol,
        "scores": summarize_rows(scored),
        "model": {
            "path": model.path,
            "weights_digest": model.digest,
            "config_digest": identity_digest(config),
            **model.extra,
        },
        "data": {"uri": data, "fingerprint": manifest.fingerprint, "num_samples": manifest.num_samples},
        "sampler": sampler.describe(),
        "eval": asdict(settings),
        "images": sort_rows(scored),
        "failed": failed,
    }


def sort_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of their keys; DataError for no rows, or a key that comes twice."""
    if not rows:
        raise DataError("the evaluation has no images: the dataset is empty")
    ordered = sorted((dict(row) for row in rows), key=lambda row: row["key"])
    for first, second in zip(ordered, ordered[1:], strict=False):
        if first["key"] == second["key"]:
            raise DataError(f"key {first['key']} was scored twice")
    return ordered


def write_report_files(
    out: Path, report: Mapping[str, Any], *, command: str, images: Sequence[ReportImage] | None = None
) -> None:
    """Write report.json and report.html into `out`, each whole or not at all.

    `images` are shown in report.html; by default those that the evaluation left in `out`/images.
    """
    from rddm_dist.evaluation.gallery import load_report_images
    from rddm_dist.evaluation.report import write_report

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / REPORT_JSON, report)
    if images is None:
        images = load_report_images(report, images_dir=out / "images")
    write_report(out / REPORT_HTML, report, images=images, command=command)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Valid JSON of the value, atomically."""
    write_text(path, json.dumps(json_safe(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; a process killed midway leaves what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
