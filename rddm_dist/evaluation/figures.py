"""Charts of a page: distributions of the scores, quality against cost, and the course of the training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

from rddm_dist.evaluation.charts import Role, Sample, Series, histogram, line_chart
from rddm_dist.evaluation.metrics import METRICS, PAIR_METRICS, metric_info
from rddm_dist.evaluation.score_table import heading
from rddm_dist.evaluation.wording import decimals, finite_scores, half_width

LEAST_VALUES = 2  # one value has no distribution


def distributions(report: Mapping[str, Any]) -> str:
    """Histograms over the images: each pair metric of the whole image, restored and input, and the gain; "" where no
    score has two finite values."""
    rows = report["images"]
    charts = []
    for name in PAIR_METRICS:
        samples = [Sample("input", finite_scores(rows, f"input_{name}"), "reference")]
        samples.append(Sample("restored", finite_scores(rows, name)))
        charts += _histogram(samples, name)
        if name == "psnr":
            charts += _histogram([Sample("gain", finite_scores(rows, "gain_db"))], "gain_db")
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


@dataclass(frozen=True)
class _Line:
    """A line of a chart. score: its name in a point; samples: how many of each image the score takes."""

    score: str
    label: str
    role: Role
    samples: int = 1


def steps_curve(curve: Mapping[str, Any]) -> str:
    """Quality against sampling steps and against seconds per image, and the table of the points.

    curve: the object of curve.json, whose seconds are of one sample: the mean of k is drawn at k times as many.
    """
    points = sorted(curve["points"], key=lambda point: point["steps"])
    charts = []
    for name in METRICS:
        lines = _curve_lines(points, name)
        for axis, x_label in (("steps", "sampling steps"), ("seconds_per_image", "seconds per image")):
            shown = [_against(points, axis, line) for line in lines]
            if any(s.points for s in shown):
                info = metric_info(name)
                arrow = "higher is better" if info.better == "higher" else "lower is better"
                charts.append(
                    line_chart(
                        shown,
                        title=f"{info.label} against {x_label} ({arrow})",
                        x_label=f"{x_label} (log)",
                        y_label=heading(info),
                        log_x=True,
                    )
                )
    note = '<p class="note">Bars are 95 % intervals over images.</p>'
    return f'<div class="charts">{"".join(charts)}</div>{note}{_curve_table(points)}'


def training_charts(journal: Sequence[Mapping[str, Any]]) -> str:
    """Loss, preview PSNR and throughput over the steps of the run; "" for a journal without a loss."""
    loss, rate = journal_points(journal, "train/loss"), journal_points(journal, "perf/images_per_s")
    if not loss:
        return ""
    charts = [
        line_chart(
            [Series("as logged", loss, "faint"), Series("running mean", _running_mean(loss))],
            title="Training loss",
            x_label="optimizer step",
            y_label="loss",
            log_y=max(y for _, y in loss) > 5 * max(min(y for _, y in loss), 1e-12),
        )
    ]
    restored, before = journal_points(journal, "preview/psnr"), journal_points(journal, "preview/input_psnr")
    if restored:
        series = [Series("restored previews", restored)]
        if before:
            series.append(Series("their inputs", before, "reference"))
        charts.append(line_chart(series, title="PSNR of the previews", x_label="optimizer step", y_label="PSNR in dB"))
    if rate:
        charts.append(
            line_chart(
                [Series("images per second", rate)],
                title=f"Throughput (median {statistics.median(y for _, y in rate):.1f} images/s)",
                x_label="optimizer step",
                y_label="images/s",
                from_zero=True,
            )
        )
    return f'<div class="charts">{"".join(charts)}</div>'


def journal_points(journal: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(step, value) of a metric; of a step that a resumed run took twice, the later one."""
    found: dict[int, float] = {}
    for record in journal:
        value = record.get("metrics", {}).get(metric)
        if value is not None and math.isfinite(float(value)):
            found[int(record["step"])] = float(value)
    return [(float(step), found[step]) for step in sorted(found)]


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean of the neighbours within a twentieth of the points at either side."""
    reach = max(1, len(points) // 20)
    values = [y for _, y in points]
    return [(x, statistics.fmean(values[max(0, i - reach) : i + reach + 1])) for i, (x, _) in enumerate(points)]


def _histogram(samples: Sequence[Sample], name: str) -> list[str]:
    shown = [sample for sample in samples if len(sample.values) >= LEAST_VALUES]
    info = metric_info(name)
    return [histogram(shown, title=f"{info.label} of the images", x_label=heading(info))] if shown else []


def _curve_lines(points: Sequence[Mapping[str, Any]], metric: str) -> list[_Line]:
    """The lines that belong in the chart of a metric."""
    names = {name for point in points for name in _all_scores(point)}
    means = sorted(name for name in names if name.startswith("mean") and name.endswith(f"_{metric}"))
    lines = [_Line(metric, "one sample" if means else metric_info(metric).label, "main")]
    for name in means:
        samples = int(name[4 : name.index("_")])
        lines.append(_Line(name, f"mean of {samples} samples", "second", samples))
    lines.append(_Line(f"input_{metric}", "input", "reference"))
    return [line for line in lines if line.score in names]


def _all_scores(point: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The scores of a point, those of whole sets among them."""
    whole = {name: {"mean": found["value"]} for name, found in point.get("distribution", {}).items()}
    return {**point["scores"], **whole}


def _against(points: Sequence[Mapping[str, Any]], axis: str, line: _Line) -> Series:
    """A line over point[axis], seconds times the samples it takes; a reference is drawn without intervals."""
    factor = line.samples if axis == "seconds_per_image" else 1
    drawn, intervals = [], {}
    for point in points:
        score = _all_scores(point).get(line.score)
        if score is None or score["mean"] is None or point[axis] is None:
            continue
        x = factor * float(point[axis])
        drawn.append((x, float(score["mean"])))
        if line.role != "reference" and score.get("low") is not None and score.get("high") is not None:
            intervals[x] = (float(score["low"]), float(score["high"]))
    return Series(line.label, sorted(drawn), line.role, intervals)


def _curve_table(points: Sequence[Mapping[str, Any]]) -> str:
    """One row for each number of steps, with a link to its own page."""
    names = list(dict.fromkeys(name for point in points for name in _all_scores(point)))
    names = [name for name in names if not name.startswith("input_")]
    heads = ["s per image (one sample)", *(heading(metric_info(name)) for name in names)]
    head = "<th>steps</th>" + "".join(f"<th>{escape(text)}</th>" for text in heads) + '<th class="text">report</th>'
    rows = []
    for point in points:
        cells = [str(point["steps"]), decimals(point["seconds_per_image"], 3)]
        cells += [_with_interval(_all_scores(point), name) for name in names]
        folder = str(point["folder"])
        link = f'<td class="text"><a href="./{quote(folder)}/index.html">{escape(folder)}</a></td>'
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}{link}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _with_interval(scores: Mapping[str, Mapping[str, Any]], name: str) -> str:
    if name not in scores:
        return "-"
    digits = metric_info(name).digits
    width = half_width(scores[name], digits)
    return decimals(scores[name]["mean"], digits) + (f" <small>{width}</small>" if width else "")
