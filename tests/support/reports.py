"""Reports built by hand, as report.json holds them, and cases of random pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rddm_dist.evaluation.cases import SIDES, Case, make_case
from rddm_dist.evaluation.summary import summarize_rows
from tests.support.datasets import random_image


def row(key: str, psnr: float = 30.0, **values: Any) -> dict[str, Any]:
    """One image of a report: 24x16, SSIM 0.9, its input at 20 dB and 0.5."""
    scores = {"psnr": psnr, "ssim": 0.9, "input_psnr": 20.0, "input_ssim": 0.5}
    return {"key": key, "name": f"{key}.png", "width": 24, "height": 16, **scores, **values}


def fake_report(rows: Sequence[dict[str, Any]], **values: Any) -> dict[str, Any]:
    """A report of these images, with real summaries of their scores."""
    return {
        "format_version": 2,
        "kind": "restoration",
        "name": "tiny",
        "protocol": {
            "name": "rgb",
            "summary": "8-bit RGB at native size",
            "color": "rgb",
            "rounding": "uint8",
            "size": "native",
            "border": 0,
            "regions": ["all"],
            "metrics": ["psnr", "ssim"],
        },
        "scores": summarize_rows(rows),
        "distribution": {},
        "networks": {},
        "model": {"path": "model.safetensors", "weights_digest": "d16e57"},
        "data": {
            "uri": "data/eval",
            "fingerprint": "f00d",
            "num_samples": len(rows),
            "targets_digest": "7a26e7",
            "inputs_digest": "17b075" if any("input_psnr" in item for item in rows) else "",
        },
        "sampler": {"steps": 5, "eta": 0.0},
        "eval": {"batch_size": 8},
        "images": sorted(rows, key=lambda item: item["key"]),
        "failed": [],
        **values,
    }


def fake_case(key: str, sides: Sequence[str] = SIDES[:3], *, size: tuple[int, int] = (16, 24)) -> Case:
    """Random pictures, another one for each side."""
    pictures = {side: random_image(seed, size) for seed, side in enumerate(SIDES)}
    pictures["spread"] = pictures["spread"].mean(axis=2)
    return make_case(key, **{side: pictures[side] for side in sides})


def fake_curve(steps: Sequence[int] = (1, 2, 5, 10)) -> dict[str, Any]:
    """A curve.json: PSNR and the mean of 4 samples rise with the steps; the last point has no time."""

    def score(mean: float) -> dict[str, Any]:
        return {"mean": mean, "std": 1.0, "min": mean - 1, "max": mean + 1, "count": 9, "infinite": 0, "nan": 0,
                "low": mean - 0.25, "high": mean + 0.25}  # fmt: skip

    points = [
        {
            "steps": count,
            "folder": f"steps-{count}",
            "seconds_per_image": None if count == steps[-1] else 0.125 * count,
            "scores": {"input_psnr": score(20.0), "psnr": score(30.0 + place), "mean4_psnr": score(31.0 + place)},
            "distribution": {"fid": {"value": 50.0 / count}},
        }
        for place, count in enumerate(steps)
    ]
    return {"protocol": {"name": "rgb"}, "samples": 4, "points": points}
