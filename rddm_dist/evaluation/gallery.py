"""The pictures of a page: worst and best cases with their sides, or the first images of a generation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rddm_dist.evaluation.metrics import metric_info
from rddm_dist.evaluation.wording import MINUS, TIMES, decimals, row_score

if TYPE_CHECKING:
    from rddm_dist.evaluation.cases import Case

LEAST_FOR_TWO = 4  # fewer cases stand in one section
SIDE_NOTES = {"mean": "of the samples", "spread": "bright where samples differ"}


def split_cases(report: Mapping[str, Any], cases: Sequence[Case]) -> tuple[Sequence[Case], Sequence[Case]]:
    """(worst first, best first): the lower and the upper half of the cases by PSNR; all are worst where they are few.

    Restored exactly (inf) ranks above everything, not a number below.
    """
    rows = {row["key"]: row for row in report["images"]}
    ranked = sorted(cases, key=lambda case: (_rank(rows[case.key]), case.key))
    if len(ranked) < LEAST_FOR_TWO:
        return ranked, []
    half = (len(ranked) + 1) // 2
    return ranked[:half], ranked[half:][::-1]


def case_cards(report: Mapping[str, Any], cases: Sequence[Case]) -> str:
    """A card for each case: its sides next to each other with their scores; a click opens the slider viewer."""
    rows = {row["key"]: row for row in report["images"]}
    cards = "".join(_card(case, rows[case.key]) for case in cases)
    return f'<div class="cards">{cards}</div>'


def picture_grid(report: Mapping[str, Any], cases: Sequence[Case]) -> str:
    """Generated images in a grid; a click opens one large."""
    names = {row["key"]: str(row.get("name") or row["key"]) for row in report["images"]}
    cards = "".join(
        f'<article data-case="{_attribute(case.key)}" data-name="{_attribute(names.get(case.key, case.key))}">'
        f"{_figures(case, names.get(case.key, case.key), captions={})}</article>"
        for case in cases
    )
    return f'<div class="grid-of-images">{cards}</div>'


def _rank(row: Mapping[str, Any]) -> float:
    value = row_score(row, "psnr")
    return -math.inf if value is None or math.isnan(value) else value


def _card(case: Case, row: Mapping[str, Any]) -> str:
    name = str(row.get("name") or case.key)
    gain = row_score(row, "gain_db")
    badge = ""
    if gain is not None and math.isfinite(gain):
        sign = "+" if gain >= 0 else MINUS
        badge = f'<span class="badge {"good" if gain >= 0 else "bad"}">{sign}{abs(gain):.2f} dB</span>'
    header = f"<header><b>{escape(name)}</b><span>{row['width']}{TIMES}{row['height']}</span>{badge}</header>"
    captions = {side: _caption(side, row) for side in case.sides}
    sides = _figures(case, name, captions)
    return (
        f'<article class="card" data-case="{_attribute(case.key)}" data-name="{_attribute(name)}">{header}'
        f'<div class="sides n{len(case.sides)}">{sides}</div></article>'
    )


def _caption(side: str, row: Mapping[str, Any]) -> str:
    """The side's name and its scores; those of "mean" stand in the row as mean4_psnr and the like."""
    notes = [SIDE_NOTES[side]] if side in SIDE_NOTES else []
    prefixes = {"input": ["input_"], "restored": [""]}.get(side, [])
    if side == "mean":
        prefixes = sorted({name[: -len("psnr")] for name in row if name.startswith("mean") and name.endswith("_psnr")})
    for prefix in prefixes:
        for metric in ("psnr", "ssim"):
            value = row_score(row, prefix + metric)
            if value is not None:
                notes.append(_score_words(metric, value))
    if side == "spread" and (value := row_score(row, "spread")) is not None:
        info = metric_info("spread")
        notes.insert(0, f"{decimals(value, info.digits)} {info.unit}".rstrip())
    return f"<b>{escape(side)}</b> {escape(', '.join(notes))}"


def _score_words(metric: str, value: float) -> str:
    info = metric_info(metric)
    if metric == "psnr" and math.isinf(value):
        return "equal to the target"
    text = decimals(value, info.digits)
    return f"{text} {info.unit}" if info.unit else f"{info.label} {text}"


def _figures(case: Case, name: str, captions: Mapping[str, str]) -> str:
    figures = []
    for side, uri in case.sides.items():
        label = _attribute(f"{side} of {name}")
        caption = f"<figcaption>{captions[side]}</figcaption>" if side in captions else ""
        figures.append(
            f'<figure><button aria-label="open {label}"><img data-side="{_attribute(side)}" alt="{label}" '
            f'decoding="async" src="{_attribute(uri)}"></button>{caption}</figure>'
        )
    return "".join(figures)


def _attribute(text: str) -> str:
    return escape(text, quote=True)
