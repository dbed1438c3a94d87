"""Quality against cost: the same evaluation with several numbers of sampling steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CURVE_JSON = "curve.json"


@dataclass(frozen=True)
class Point:
    """The evaluation with one number of steps, in `folder` below the curve's own."""

    steps: int
    folder: str
    report: Mapping[str, Any]
    seconds_per_image: float | None


def folder_of(steps: int) -> str:
    return f"steps-{steps}"


def build_curve(points: Sequence[Point]) -> dict[str, Any]:
    """The object for curve.json; points: of one model, protocol and dataset, by rising steps."""
    first = points[0].report
    return {
        "protocol": first["protocol"],
        "samples": first["eval"]["samples"],
        "points": [
            {
                "steps": point.steps,
                "folder": point.folder,
                "seconds_per_image": point.seconds_per_image,
                "scores": point.report["scores"],
                "distribution": point.report["distribution"],
                "failed": len(point.report["failed"]),
            }
            for point in points
        ],
    }


def main_point(points: Sequence[Point], *, own_steps: int) -> Point:
    """The point that stands for the model: that with its own number of steps, else the one with the most."""
    return next((point for point in points if point.steps == own_steps), points[-1])
