"""Several reports in one table: what may be compared, what is best, and what the differences are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.errors import ConfigError
from rddm_dist.evaluation.compare_reports import (
    INPUT,
    ScoredReport,
    check_comparable,
    check_networks,
    distinct_names,
)
from rddm_dist.evaluation.metrics import metric_info
from rddm_dist.evaluation.statistics import CONFIDENCE, RESAMPLES, Difference, paired_difference

# Shown when asked for: a difference, a score without a target, counts.
DERIVED = ("gain_db", "spread", "pixels_shadow", "pixels_non_shadow")
SIZE_SENSITIVE = ("fid", "is")  # biased by the number of images


@dataclass(frozen=True)
class Cell:
    """A metric of a row. value: None where it has none; low, high: its interval; std: of KID and IS;
    pooled: over all pixels of all images at once, where the protocol has it; is_best: of its column."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    std: float | None = None
    pooled: float | None = None
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """A method: its cells and its differences to the baseline, in the order of the comparison's metrics.

    differences: None where there are no pairs, and for the baseline itself; pairing: "name", "target", or "".
    """

    name: str
    kind: str
    steps: int | None
    images: int
    failed: int
    cells: tuple[Cell, ...]
    differences: tuple[Difference | None, ...]
    pairing: str = ""
    is_baseline: bool = False


@dataclass(frozen=True)
class Comparison:
    """Reports of one protocol and one set of targets, side by side.

    rows: the input (doing nothing) first where known, then the reports in the order given; baseline: the name of the
    row that differences are to; notes: sentences that belong below the table.
    """

    protocol: Mapping[str, Any]
    targets_digest: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    baseline: str
    notes: tuple[str, ...]
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES


def compare(reports: Sequence[ScoredReport], *, metrics: Sequence[str] = (), baseline: str = "") -> Comparison:
    """Put reports side by side.   metrics: default, all but derived ones; baseline: name of a row, default the first

    ConfigError for reports that cannot be compared (another protocol, other targets or inputs, other feature
    networks), a report given twice, and a metric or baseline that is not there.
    """
    if not reports:
        raise ConfigError("no reports are given; give one report.json or more")
    check_comparable(reports)
    named = distinct_names(reports)
    shown = _choose_metrics(named, metrics)
    check_networks(named, shown)
    do_nothing, notes = _input_report(named, shown)
    against = _choose_baseline(reports, named, do_nothing, baseline)
    rows = [_row(report, against, shown) for report in ([do_nothing] if do_nothing else []) + named]
    notes += _notes(named, rows, shown, against.name)
    return Comparison(
        protocol=reports[0].protocol,
        targets_digest=reports[0].targets_digest,
        metrics=shown,
        rows=tuple(_mark_best(rows, shown)),
        baseline=against.name,
        notes=tuple(notes),
    )


def available_metrics(reports: Sequence[ScoredReport]) -> list[str]:
    """The metrics that any of the reports has, of restored images, in the order of their first coming."""
    names = [name for report in reports for name in (*report.scores, *report.distribution)]
    return [name for name in dict.fromkeys(names) if not name.startswith(f"{INPUT}_")]


def _choose_metrics(reports: Sequence[ScoredReport], wanted: Sequence[str]) -> tuple[str, ...]:
    available = available_metrics(reports)
    for name in wanted:
        if name not in available:
            raise ConfigError(f"--metrics {name} is in none of the reports; choose from {', '.join(available)}")
    chosen = tuple(dict.fromkeys(wanted)) or tuple(name for name in available if name not in DERIVED)
    if not chosen:
        raise ConfigError(f"{reports[0].uri} has no scores to compare; evaluate with metrics")
    return chosen


def _choose_baseline(
    given: Sequence[ScoredReport], named: Sequence[ScoredReport], do_nothing: ScoredReport | None, wanted: str
) -> ScoredReport:
    """The row that the others are compared with, by its name in the table or, where only one has it, in its report."""
    candidates = [*named, *([do_nothing] if do_nothing else [])]
    if not wanted:
        return named[0]
    matches = [report for report in candidates if report.name == wanted]
    matches = matches or [new for old, new in zip(given, named, strict=True) if old.name == wanted]
    if len(matches) != 1:
        names = ", ".join(report.name for report in candidates)
        raise ConfigError(f"--baseline {wanted} names {len(matches)} of the reports; choose one of {names}")
    return matches[0]


def _input_report(reports: Sequence[ScoredReport], metrics: Sequence[str]) -> tuple[ScoredReport | None, list[str]]:
    """The scores of the unrestored inputs as a report of their own, where the reports that have them agree."""
    having = [report for report in reports if any(f"{INPUT}_{name}" in report.scores for name in metrics)]
    if not having:
        return None, []
    first = having[0]
    names = [name for name in metrics if f"{INPUT}_{name}" in first.scores]
    for other in having[1:]:
        for name in names:
            a, b = first.scores[f"{INPUT}_{name}"], other.scores.get(f"{INPUT}_{name}")
            if b is not None and not _is_close(a.mean, b.mean):
                why = "" if sorted(first.targets) == sorted(other.targets) else ", as other images failed"
                label = metric_info(name).label
                return None, [f"No row of the input: {first.name} and {other.name} differ in its {label}{why}."]
    row = replace(
        first,
        name=INPUT,
        kind=INPUT,
        steps=None,
        distribution={},
        scores={name: first.scores[f"{INPUT}_{name}"] for name in names},
        columns={name: first.columns[f"{INPUT}_{name}"] for name in names},
    )
    return row, []


def _is_close(a: float | None, b: float | None) -> bool:
    return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-9)


def _row(report: ScoredReport, against: ScoredReport, metrics: Sequence[str]) -> Row:
    is_baseline = report is against
    pairing, mine, others = ("", [], []) if is_baseline else pair_images(report, against)
    differences: list[Difference | None] = []
    for name in metrics:
        if pairing and name in report.columns and name in against.columns:
            a, b = report.columns[name][mine], against.columns[name][others]
            differences.append(paired_difference(a, b, better=metric_info(name).better))
        else:
            differences.append(None)
    return Row(
        name=report.name,
        kind=report.kind,
        steps=report.steps,
        images=len(report.names),
        failed=len(report.failed),
        cells=tuple(_cell(report, name) for name in metrics),
        differences=tuple(differences),
        pairing=pairing,
        is_baseline=is_baseline,
    )


def _cell(report: ScoredReport, name: str) -> Cell:
    if name in report.scores:
        score = report.scores[name]
        return Cell(score.mean, score.low, score.high, pooled=score.pooled)
    if name in report.distribution:
        return Cell(report.distribution[name].value, std=report.distribution[name].std)
    return Cell()


def pair_images(a: ScoredReport, b: ScoredReport) -> tuple[str, list[int], list[int]]:
    """Which images of two reports are the same one.   ->  ("name" | "target" | "", places in a, places in b)

    By name where both have the same names, failed ones included, and equal names have equal targets; else by the
    targets where no target comes twice in a report; else not at all.
    """
    if not any(a.targets) or not any(b.targets):
        return "", [], []
    for how, mine, theirs in (("name", a.names, b.names), ("target", a.targets, b.targets)):
        first, second = ({key: place for place, key in enumerate(keys)} for keys in (mine, theirs))
        if len(first) < len(mine) or len(second) < len(theirs):
            continue
        pairs = [(place, second[key]) for key, place in first.items() if key in second]
        if how == "name" and (
            {*mine, *a.failed} != {*theirs, *b.failed} or any(a.targets[i] != b.targets[j] for i, j in pairs)
        ):
            continue
        if pairs:
            return how, [i for i, _ in pairs], [j for _, j in pairs]
    return "", [], []


def _mark_best(rows: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """Mark the best value of each column, all of them where several are equal, among its contenders."""
    best: set[tuple[int, int]] = set()
    for place, name in enumerate(metrics):
        values = _contenders(rows, place)
        if len(values) > 1:
            top = max(values.values()) if metric_info(name).better == "higher" else min(values.values())
            best |= {(index, place) for index, value in values.items() if value == top}
    return [
        replace(row, cells=tuple(replace(cell, is_best=(i, place) in best) for place, cell in enumerate(row.cells)))
        for i, row in enumerate(rows)
    ]


def _contenders(rows: Sequence[Row], place: int) -> dict[int, float]:
    """Which rows may be the best of a column, and their values: those with a finite one over the most images.

    Who fails on hard images has the better mean of the others. The input takes no part.
    """
    values = _finite_values(rows, place)
    most = max((rows[index].images for index in values), default=0)
    return {index: value for index, value in values.items() if rows[index].images == most}


def _finite_values(rows: Sequence[Row], place: int) -> dict[int, float]:
    found = {index: row.cells[place].value for index, row in enumerate(rows) if row.kind != INPUT}
    return {index: value for index, value in found.items() if value is not None and math.isfinite(value)}


def _notes(reports: Sequence[ScoredReport], rows: Sequence[Row], metrics: Sequence[str], baseline: str) -> list[str]:
    notes = []
    for report in reports:
        if report.failed:
            notes.append(f"{report.name} has no scores for {_images(len(report.failed))} that failed.")
        for name in metrics:
            score = report.scores.get(name)
            if score is not None and (score.infinite or score.nan):
                parts = [f"{score.infinite} infinite"] if score.infinite else []
                parts += [f"{score.nan} not a number"] if score.nan else []
                label = metric_info(name).label
                notes.append(f"{report.name}: values left out of the mean {label}: {' and '.join(parts)}.")
    fewer = {i for place in range(len(metrics)) for i in _finite_values(rows, place).keys() - _contenders(rows, place)}
    if fewer:
        names = ", ".join(rows[index].name for index in sorted(fewer))
        notes.append(f"Not marked as best where others have scores of more images: {names}.")
    by_target = [row.name for row in rows if row.pairing == "target"]
    if by_target:
        notes.append(f"Paired by target, as names of images differ: {', '.join(by_target)}.")
    is_pairs = any(name in report.scores for report in reports for name in metrics)
    unpaired = [row.name for row in rows if is_pairs and not row.pairing and not row.is_baseline]
    if unpaired:
        notes.append(
            f"No difference to {baseline}, as the images cannot be paired (names differ, and a target comes twice): "
            f"{', '.join(unpaired)}."
        )
    counts = {len(report.names) for report in reports if any(report.distribution.get(name) for name in SIZE_SENSITIVE)}
    if len(counts) > 1 and any(name in metrics for name in SIZE_SENSITIVE):
        notes.append("FID and IS depend on the number of images, which differs here.")
    return notes


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
