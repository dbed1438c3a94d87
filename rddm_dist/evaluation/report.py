"""Reports for people: self-contained HTML pages of an evaluation and of the demo, drawn by one renderer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rddm_dist.evaluation.charts import Series, line_chart
from rddm_dist.evaluation.gallery import ReportImage, decimals, gain, gallery, load_report_images
from rddm_dist.evaluation.page import render_page
from rddm_dist.evaluation.summary import write_text
from rddm_dist.tracking.store import default_uri

if TYPE_CHECKING:
    from rddm_dist.evaluation.baseline import Baseline
    from rddm_dist.loading import Model

COLUMNS = (
    ("input_psnr", "input PSNR, dB", 2),
    ("psnr", "restored PSNR, dB", 2),
    ("gain_db", "gain, dB", 2),
    ("input_ssim", "input SSIM", 4),
    ("ssim", "restored SSIM", 4),
)


def write_report(
    path: Path,
    report: Mapping[str, Any],
    *,
    images: Sequence[ReportImage] = (),
    command: str,
    journal: Sequence[Mapping[str, Any]] = (),
    config: str = "",
    mlflow: Mapping[str, str] | None = None,
    title: str = "RDDM evaluation",
) -> None:
    """The page of an evaluation.

    report: the object of report.json; command: what reproduces it; journal: the records of the run's metrics.jsonl;
    config: YAML text; mlflow: names and values to list (run, experiment, model). What is empty is left out.
    """
    body = _score_tiles(report) + _body(report, images, command=command, journal=journal, config=config, mlflow=mlflow)
    write_text(path, render_page(title, _lead(report), body))


def write_demo_report(
    run_dir: Path,
    *,
    summary: Mapping[str, Any],
    report: Mapping[str, Any],
    baseline: Baseline,
    journal: Sequence[Mapping[str, Any]],
    model: Model,
    images: Sequence[ReportImage] | None = None,
) -> Path:
    """`<run_dir>/report/index.html`: the page of the demo's evaluation, headed by `summary`.   -> its path

    summary: the object of summary.json; baseline: the filter that summary["baseline_psnr"] belongs to; images: by
    default those that the evaluation left in `<run_dir>/report/images`.
    """
    from rddm_dist.config import to_yaml

    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = load_report_images(report, images_dir=folder / "images")
    config, steps = model.config, report["sampler"]["steps"]
    store = config.tracking.uri or default_uri(config.run.storage)
    mlflow = {"run": summary["mlflow_run_id"], "experiment": config.tracking.experiment, "store": store}
    body = _demo_tiles(summary, baseline.name, journal) + _body(
        report,
        images,
        command=f"rddm demo\nrddm evaluate {run_dir} --data {summary['eval_data']} --steps {steps}",
        journal=journal,
        config=to_yaml(config),
        mlflow={**mlflow, "model": summary["model_uri"], "look at it": f"mlflow ui --backend-store-uri {store}"},
    )
    path = folder / "index.html"
    write_text(path, render_page("RDDM demo: restoring rainy photographs", _lead(report), body))
    return path


def _lead(report: Mapping[str, Any]) -> str:
    sampler, protocol = report["sampler"], report["protocol"]
    return (
        f"{len(report['images'])} held-out images, {sampler['steps']} sampling steps, eta {sampler['eta']:g}, "
        f"protocol {protocol['name']} ({protocol['color'].upper()}, {protocol['rounding']}, {protocol['size']} size)"
    )


def _score_tiles(report: Mapping[str, Any]) -> str:
    scores = report["scores"]
    mean = {name: value["mean"] for name, value in scores.items()}
    return _tiles(
        [
            ("restored PSNR", decimals(mean["psnr"], 2), "dB", f"input {decimals(mean['input_psnr'], 2)} dB", ""),
            _gain_tile("gain over input", mean["gain_db"], "mean over images"),
            ("restored SSIM", decimals(mean["ssim"], 4), "", f"input {decimals(mean['input_ssim'], 4)}", ""),
            ("images", str(len(report["images"])), "", _exceptions(scores["psnr"]), ""),
        ]
    )


def _demo_tiles(summary: Mapping[str, Any], baseline: str, journal: Sequence[Mapping[str, Any]]) -> str:
    restored, filtered = summary["restored_psnr"], summary["baseline_psnr"]
    rates = [rate for _, rate in _points(journal, "perf/images_per_s")]
    rate_note = f"{statistics.median(rates):.1f} images/s" if rates else ""
    ssim_note = f"input {decimals(summary['input_ssim'], 4)}"
    return _tiles(
        [
            ("restored PSNR", decimals(restored, 2), "dB", f"input {decimals(summary['input_psnr'], 2)} dB", ""),
            _gain_tile("gain over input", summary["gain_db"], "mean over images"),
            _gain_tile("gain over best filter", restored - filtered, f"{baseline}: {decimals(filtered, 2)} dB"),
            ("restored SSIM", decimals(summary["restored_ssim"], 4), "", ssim_note, ""),
            ("training", f"{summary['train_seconds']:.0f}", "s", f"{summary['train_steps']} steps, {rate_note}", ""),
            ("everything", f"{summary['wall_seconds']:.0f}", "s", "packing to report", ""),
        ]
    )


def _gain_tile(name: str, gain: float | None, note: str) -> tuple[str, str, str, str, str]:
    if gain is None:
        return name, "-", "", note, ""
    return name, f"{gain:+.2f}", "dB", note, "good" if gain > 0 else "bad"


def _tiles(tiles: Sequence[tuple[str, str, str, str, str]]) -> str:
    """(name, value, unit, note, class) each."""
    cells = [
        f'<div class="tile {kind}"><span>{escape(name)}</span><b>{escape(value)}'
        f"{f' <small>{escape(unit)}</small>' if unit else ''}</b><span>{escape(note)}</span></div>"
        for name, value, unit, note, kind in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _body(
    report: Mapping[str, Any],
    images: Sequence[ReportImage],
    *,
    command: str,
    journal: Sequence[Mapping[str, Any]],
    config: str,
    mlflow: Mapping[str, str] | None,
) -> str:
    parts = [gallery(report, images), _score_table(report), _training_charts(journal), _facts(report, mlflow)]
    if config:
        parts.append(f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>")
    parts.append(
        f'<h2>Reproduce</h2><div class="command"><pre>{escape(command)}</pre><button class="plain">copy</button></div>'
    )
    return "".join(parts)


def _score_table(report: Mapping[str, Any]) -> str:
    head = '<th class="text"><button>image</button></th><th><button>pixels</button></th>'
    head += "".join(f"<th><button>{name}</button></th>" for _, name, _ in COLUMNS)
    rows = "".join(_table_row(row) for row in report["images"])
    means = "".join(f"<td>{decimals(report['scores'][name]['mean'], digits)}</td>" for name, _, digits in COLUMNS)
    exceptions = _exceptions(report["scores"]["psnr"])
    note = f'<p class="note">Means leave out {exceptions}.</p>' if exceptions else ""
    return (
        f'<h2>Scores per image</h2><div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f'<tbody>{rows}</tbody><tfoot><tr><td class="text">mean</td><td></td>{means}</tr></tfoot></table></div>{note}'
    )


def _table_row(row: Mapping[str, Any]) -> str:
    name = escape(str(row.get("name") or row["key"]))
    cells = [f'<td class="text">{name}</td>']
    cells.append(f'<td data-value="{row["width"] * row["height"]}">{row["width"]}x{row["height"]}</td>')
    for column, _, digits in COLUMNS:
        value = gain(row) if column == "gain_db" else float(row[column])
        sortable = str(value).replace("inf", "Infinity")
        cells.append(f'<td data-value="{sortable}">{decimals(value, digits)}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _training_charts(journal: Sequence[Mapping[str, Any]]) -> str:
    """Loss, preview PSNR and throughput over the steps of the run."""
    loss, rate = _points(journal, "train/loss"), _points(journal, "perf/images_per_s")
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
    restored, before = _points(journal, "preview/psnr"), _points(journal, "preview/input_psnr")
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
    return f'<h2>Training</h2><div class="charts">{"".join(charts)}</div>'


def _points(journal: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
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


def _facts(report: Mapping[str, Any], mlflow: Mapping[str, str] | None) -> str:
    groups: list[tuple[str, Mapping[str, Any]]] = [
        ("Model", report["model"]),
        ("Data", report["data"]),
        ("Sampler", report["sampler"]),
        ("Protocol", report["protocol"]),
        ("Evaluation", report.get("eval", {})),
        ("MLflow", mlflow or {}),
    ]
    cards = "".join(
        f'<div class="card"><h3>{name}</h3><dl>'
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in _flat(facts))
        + "</dl></div>"
        for name, facts in groups
        if facts
    )
    return f'<h2>What was measured</h2><div class="facts">{cards}</div>'


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _exceptions(summary: Mapping[str, Any]) -> str:
    """Which PSNR values a mean does not hold, in words."""
    parts = []
    if summary["infinite"]:
        parts.append(f"{summary['infinite']} restored exactly (PSNR inf)")
    if summary["nan"]:
        parts.append(f"{summary['nan']} not a number")
    return ", ".join(parts)
