"""What an evaluation found, as one object for report.json that has the same bytes whoever ran the units.

Numbers that JSON lacks are written as "inf" and "nan". A restored image that equals its target has PSNR inf: a mean is
over the finite values, and how many values were infinite or not a number stands beside it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import DataError
from rddm_dist.evaluation.job import settings_dict, software
from rddm_dist.evaluation.statistics import bootstrap_mean

if TYPE_CHECKING:
    from rddm_dist.evaluation.distribution import Moments
    from rddm_dist.evaluation.evaluate import Outcome, Plan
    from rddm_dist.loading import Model

FORMAT_VERSION = 2
REPORT_JSON, REPORT_HTML, TIMINGS_JSON = "report.json", "index.html", "timings.json"
POOLED = ("lab_mae", "input_lab_mae")  # metrics whose mean over all pixels of a region is given too
PART = 1024  # images
NO_SCORES = ("width", "height", "seconds")


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation, extremes and 95 % interval of the finite values, and how many were not finite.

    Sums are exact (math.fsum), so the order of the values does not matter to mean and std. mean, std, min and max are
    None where no value is finite; std is that of a sample. low and high: bootstrap interval of the mean over images,
    None, like std, for fewer than two.
    """
    finite = [value for value in values if math.isfinite(value)]
    count = len(finite)
    mean = math.fsum(finite) / count if count else None
    std = None
    if mean is not None and count > 1:
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (count - 1))
    low, high = bootstrap_mean(finite) or (None, None)
    return {
        "mean": mean,
        "std": std,
        "min": min(finite, default=None),
        "max": max(finite, default=None),
        "low": low,
        "high": high,
        "count": count,
        "infinite": sum(math.isinf(value) for value in values),
        "nan": sum(math.isnan(value) for value in values),
    }


def summarize_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Summaries of every score in the rows, which are in the order of their keys, and of gain_db, the PSNR gained."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if _is_score(name, value)))
    scores = {name: summarize([float(row[name]) for row in rows if name in row]) for name in names}
    for name in names:
        metric = next((metric for metric in POOLED if name == metric or name.startswith(f"{metric}_")), None)
        pixels = "pixels" + name[len(metric) :] if metric else ""
        if pixels and all(pixels in row for row in rows):
            total = math.fsum(row[pixels] for row in rows)
            scores[name]["pooled"] = (
                math.fsum(row[name] * row[pixels] for row in rows if row[pixels]) / total if total else None
            )
    if "psnr" in scores and "input_psnr" in scores:
        scores["gain_db"] = summarize([float(row["psnr"]) - float(row["input_psnr"]) for row in rows])
    return scores


def _is_score(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and name not in NO_SCORES and not name.startswith("pixels")


def build_report(
    plan: Plan,
    outcome: Outcome,
    *,
    name: str,
    model: Model | None = None,
    outputs: str = "",
    reference: tuple[Plan, Outcome] | None = None,
) -> dict[str, Any]:
    """The object for report.json.

    name: how tables call it; model: whose images these are, or outputs: the folder they lie in; reference: the images
    that a generation is compared with.
    """
    settings = plan.job.settings
    scored = [_row(row) for row in outcome.rows if "kind" not in row]
    failed = [_row(row) for row in outcome.rows if "kind" in row]
    if failed and not scored and all(row["kind"] == "unreadable" for row in failed):
        raise DataError(f"none of the {len(failed)} images can be read; the first: {failed[0]['error']}")
    _refuse_twice(outcome.rows)
    source, source_rows = plan.source, outcome.rows
    if reference is not None:
        source, source_rows = reference[0].source, reference[1].rows
        absent = [{**_row(row), "set": "reference"} for row in source_rows if "kind" in row]
        if len(absent) == len(source_rows):
            raise DataError(f"none of the {len(absent)} reference images can be read; the first: {absent[0]['error']}")
        failed += absent
    assert source is not None, "what is scored is compared with images from somewhere"
    protocol: dict[str, Any] = {**plan.job.protocol.describe(), "metrics": list(settings.pair_metrics)}
    sampler = dict(plan.job.identity["sampler"])
    side = sampler.get("preprocess", {}).get("resize", 0)
    if side and protocol["size"] == "native":
        protocol["size"] = f"resized to {side}x{side} by the model"
        protocol["procedure"] = (
            f"not at native size: the model sees every image resized to {side}x{side}, and input and target are "
            f"resized so too, by Pillow's bicubic filter in 8 bits; {protocol['procedure']}"
        )
    return {
        "format_version": FORMAT_VERSION,
        "kind": "generation" if reference is not None else plan.job.kind,
        "name": name,
        "protocol": protocol,
        "scores": summarize_rows(scored) if plan.job.protocol.compares_pairs else {},
        "distribution": _distribution(plan, outcome, reference[1] if reference is not None else None),
        "networks": plan.networks,
        "model": _describe_model(model) if model is not None else {"path": outputs},
        "data": {
            "uri": source.uri,
            "fingerprint": source.fingerprint,
            "num_samples": source.num_samples,
            "targets_digest": _set_digest(source_rows, "target_sha256"),
            "inputs_digest": _set_digest(source_rows, "input_sha256"),
        },
        "sampler": sampler,
        "eval": {**settings_dict(settings), "software": software()},
        "images": scored,
        "failed": failed,
    }


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for the report: what a computation took says nothing about its result."""
    return {name: value for name, value in row.items() if name != "seconds"}


def _describe_model(model: Model) -> dict[str, Any]:
    from rddm_dist.config import identity_digest

    digests = {"weights_digest": model.digest, "config_digest": identity_digest(model.config)}
    return {"path": model.path, **digests, **model.extra}


def _set_digest(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Names a set of images by their pixels, whatever they are called; "" where there are none."""
    digests = sorted(row[name] for row in rows if name in row)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest() if digests else ""


def _distribution(plan: Plan, outcome: Outcome, reference: Outcome | None) -> dict[str, Any]:
    """FID, KID and Inception Score of the images against their targets, or against a reference.

    {} where too few images are left: those that failed are listed.
    """
    names = plan.job.settings.set_metrics
    vectors = [outcome.vectors.get("features", ())]
    vectors.append(
        outcome.vectors.get("target_features", ()) if reference is None else reference.vectors.get("features", ())
    )
    if not names or min(len(each) for each in vectors) < 2:
        return {}
    from rddm_dist.evaluation import distribution

    made, real = (np.asarray(each) for each in vectors)
    counts = {"images": len(made), "reference": len(real)}
    found: dict[str, Any] = {}
    if "fid" in names:
        found["fid"] = {"value": distribution.fid(_moments(real), _moments(made)), **counts}
    if "kid" in names:
        value, std = distribution.kid(real, made)
        size = distribution.kid_subset_size(len(real), len(made))
        found["kid"] = {"value": value, "std": std, "subset_size": size, **counts}
    if "is" in names:
        value, std = distribution.inception_score(outcome.vectors["logits"])
        found["is"] = {"value": value, "std": std, "splits": distribution.inception_splits(len(made)), **counts}
    return found


def _moments(features: np.ndarray) -> Moments:
    """Merged over parts in the order of the keys, so that the double-precision copy is that of a part.   (N, D)"""
    from rddm_dist.evaluation.distribution import Moments

    parts = (Moments.of(features[start : start + PART]) for start in range(0, len(features), PART))
    return functools.reduce(Moments.merge, parts)


def _refuse_twice(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError for a key that comes twice.   rows: sorted by key"""
    for first, second in zip(rows, rows[1:], strict=False):
        if first["key"] == second["key"]:
            raise DataError(f"key {first['key']} was scored twice")
