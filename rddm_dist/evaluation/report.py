"""Reports for people: self-contained HTML pages of an evaluation and of the demo, drawn by one renderer."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rddm_dist.evaluation.charts import Series, line_chart
from rddm_dist.evaluation.page import render_page
from rddm_dist.evaluation.summary import write_text
from rddm_dist.tracking.store import default_uri

if TYPE_CHECKING:
    from rddm_dist.evaluation.baseline import Baseline
    from rddm_dist.loading import Model

MAX_IMAGES = 24
MAX_SIDE = 640  # larger images are shown reduced
PNG_BYTES = 64 * 1024  # what compresses worse than this is shown as JPEG
SIDES = ("input", "restored", "target")

COLUMNS = (
    ("input_psnr", "input PSNR, dB", 2),
    ("psnr", "restored PSNR, dB", 2),
    ("gain_db", "gain, dB", 2),
    ("input_ssim", "input SSIM", 4),
    ("ssim", "restored SSIM", 4),
)


@dataclass(frozen=True)
class ReportImage:
    """One held-out image; input, restored, target: (H, W, 3) uint8 of one size."""

    key: str
    input: np.ndarray
    restored: np.ndarray
    target: np.ndarray


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
    config = model.config
    store = config.tracking.uri or default_uri(config.run.storage)
    mlflow = {"run": summary["mlflow_run_id"], "experiment": config.tracking.experiment, "store": store}
    body = _demo_tiles(summary, baseline.name, journal) + _body(
        report,
        images,
        command=f"rddm demo\nrddm evaluate {run_dir} --data {summary['eval_data']} --steps {report['sampler']['steps']}",
        journal=journal,
        config=to_yaml(config),
        mlflow={**mlflow, "model": summary["model_uri"], "look at it": f"mlflow ui --backend-store-uri {store}"},
    )
    path = folder / "index.html"
    write_text(path, render_page("RDDM demo: restoring rainy photographs", _lead(report), body))
    return path


def load_report_images(report: Mapping[str, Any], *, images_dir: Path, limit: int = MAX_IMAGES) -> list[ReportImage]:
    """Up to `limit` images of an evaluation that kept its results as `images_dir`/KEY.png, by key.

    Of more images those evenly spread from the lowest to the highest PSNR are taken. A file that is not the result of
    this evaluation (another sha256 than in the report) is left out.
    """
    from data_pipeline.loader import eval_index, read_sample
    from data_pipeline.manifest import Manifest

    kept = [row for row in report["images"] if (images_dir / f"{row['key']}.png").is_file()]
    if not kept:
        return []
    chosen = {row["key"]: row for row in _spread(kept, limit)}
    uri = report["data"]["uri"]
    manifest = Manifest.load(uri)
    images = []
    for entry in eval_index(uri, manifest):
        row = chosen.get(entry.key)
        if row is None:
            continue
        restored = np.asarray(Image.open(images_dir / f"{entry.key}.png").convert("RGB"))
        if hashlib.sha256(restored.tobytes()).hexdigest() != row["restored_sha256"]:
            continue
        sample = read_sample(uri, manifest, entry.shard_index, entry.offset)
        images.append(ReportImage(entry.key, sample.input, restored, sample.target))
    return images


def _spread(rows: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """At most `limit` rows, evenly spread over their PSNR, with the lowest and the highest."""
    if len(rows) <= limit:
        return list(rows)
    ranked = sorted(rows, key=lambda row: (float(row["psnr"]), row["key"]))
    last = len(ranked) - 1
    return [ranked[round(i * last / max(1, limit - 1))] for i in range(limit)]


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
            ("restored PSNR", _decimals(mean["psnr"], 2), "dB", f"input {_decimals(mean['input_psnr'], 2)} dB", ""),
            _gain_tile("gain over input", mean["gain_db"], "mean over images"),
            ("restored SSIM", _decimals(mean["ssim"], 4), "", f"input {_decimals(mean['input_ssim'], 4)}", ""),
            ("images", str(len(report["images"])), "", _exceptions(scores["psnr"]), ""),
        ]
    )


def _demo_tiles(summary: Mapping[str, Any], baseline: str, journal: Sequence[Mapping[str, Any]]) -> str:
    restored, filtered = summary["restored_psnr"], summary["baseline_psnr"]
    rates = [rate for _, rate in _points(journal, "perf/images_per_s")]
    rate_note = f"{statistics.median(rates):.1f} images/s" if rates else ""
    ssim_note = f"input {_decimals(summary['input_ssim'], 4)}"
    return _tiles(
        [
            ("restored PSNR", _decimals(restored, 2), "dB", f"input {_decimals(summary['input_psnr'], 2)} dB", ""),
            _gain_tile("gain over input", summary["gain_db"], "mean over images"),
            _gain_tile("gain over best filter", restored - filtered, f"{baseline}: {_decimals(filtered, 2)} dB"),
            ("restored SSIM", _decimals(summary["restored_ssim"], 4), "", ssim_note, ""),
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
    parts = [_gallery(report, images), _score_table(report), _training_charts(journal), _facts(report, mlflow)]
    if config:
        parts.append(f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>")
    parts.append(
        f'<h2>Reproduce</h2><div class="command"><pre>{escape(command)}</pre><button class="plain">copy</button></div>'
    )
    return "".join(parts)


def _gallery(report: Mapping[str, Any], images: Sequence[ReportImage]) -> str:
    if not images:
        return ""
    rows = {row["key"]: row for row in report["images"]}
    cards = "".join(_card(image, rows[image.key]) for image in images[:MAX_IMAGES])
    shown = min(len(images), MAX_IMAGES)
    note = f"{shown} of {len(rows)} images. Click one to compare two sides with a slider."
    if any(max(image.target.shape[:2]) > MAX_SIDE for image in images[:MAX_IMAGES]):
        note += f" Images above {MAX_SIDE} pixels are shown reduced."
    note += " Scores belong to the exact 8-bit results, whatever is shown."
    return f'<h2>Images</h2><p class="note">{note}</p><div class="cards">{cards}</div>'


def _card(image: ReportImage, row: Mapping[str, Any]) -> str:
    name = escape(str(row.get("name") or image.key), quote=True)
    captions = {
        "input": f"<b>input</b> {_decimals(row['input_psnr'], 2)} dB, SSIM {_decimals(row['input_ssim'], 3)}",
        "restored": f"<b>restored</b> {_decimals(row['psnr'], 2)} dB, SSIM {_decimals(row['ssim'], 3)}",
        "target": "<b>target</b>",
    }
    figures = "".join(
        f'<figure><button aria-label="compare {side} of {name}"><img data-side="{side}" alt="{side} of {name}" '
        f'src="{data_uri(getattr(image, side))}"></button><figcaption>{captions[side]}</figcaption></figure>'
        for side in SIDES
    )
    header = f"<header><b>{name}</b><span>{row['width']}x{row['height']}</span><span>{_signed(row)} dB</span></header>"
    return f'<article class="card" data-name="{name}">{header}<div class="triple">{figures}</div></article>'


def data_uri(image: np.ndarray) -> str:
    """(H, W, 3) uint8 -> a data: URI, reduced to MAX_SIDE; PNG, or JPEG where PNG is large."""
    picture = Image.fromarray(image)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "png"
    picture.save(buffer, "PNG", optimize=True)
    if buffer.tell() > PNG_BYTES:
        buffer, kind = io.BytesIO(), "jpeg"
        picture.save(buffer, "JPEG", quality=92, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _score_table(report: Mapping[str, Any]) -> str:
    head = '<th class="text"><button>image</button></th><th><button>pixels</button></th>'
    head += "".join(f"<th><button>{name}</button></th>" for _, name, _ in COLUMNS)
    rows = "".join(_table_row(row) for row in report["images"])
    means = "".join(f"<td>{_decimals(report['scores'][name]['mean'], digits)}</td>" for name, _, digits in COLUMNS)
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
        value = _gain(row) if column == "gain_db" else float(row[column])
        sortable = str(value).replace("inf", "Infinity")
        cells.append(f'<td data-value="{sortable}">{_decimals(value, digits)}</td>')
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
        charts.append(
            line_chart(series, title="PSNR of the previews", x_label="optimizer step", y_label="PSNR in dB")
        )
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
        + "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
        + "</dl></div>"
        for name, facts in groups
        if facts
    )
    return f'<h2>What was measured</h2><div class="facts">{cards}</div>'


def _gain(row: Mapping[str, Any]) -> float:
    return float(row["psnr"]) - float(row["input_psnr"])


def _signed(row: Mapping[str, Any]) -> str:
    return f"{_gain(row):+.2f}"


def _exceptions(summary: Mapping[str, Any]) -> str:
    """Which PSNR values a mean does not hold, in words."""
    parts = []
    if summary["infinite"]:
        parts.append(f"{summary['infinite']} restored exactly (PSNR inf)")
    if summary["nan"]:
        parts.append(f"{summary['nan']} not a number")
    return ", ".join(parts)


def _decimals(value: Any, digits: int) -> str:
    return "-" if value is None else f"{float(value):.{digits}f}"
