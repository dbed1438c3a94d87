"""Reports for people: the self-contained HTML page of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline import storage
from rddm_dist.evaluation.figures import distributions, steps_curve, training_charts
from rddm_dist.evaluation.gallery import case_cards, picture_grid, split_cases
from rddm_dist.evaluation.metrics import METRICS, metric_info
from rddm_dist.evaluation.page import render_page
from rddm_dist.evaluation.score_table import all_scores, failed_table, image_table
from rddm_dist.evaluation.summary import REPORT_HTML, REPORT_JSON, TIMINGS_JSON
from rddm_dist.evaluation.wording import (
    MINUS,
    PLUS_MINUS,
    decimals,
    exceptions,
    flat,
    half_width,
    has_region,
    in_order,
    interval,
    protocol_words,
)
from rddm_dist.evaluation.writing import write_json, write_text, writing

if TYPE_CHECKING:
    from rddm_dist.evaluation.cases import Case

TITLES = {"restoration": "Evaluation", "files": "Scored images", "generation": "Generated images"}


@dataclass(frozen=True)
class Tile:
    """One large number. `tone`: "good", "bad" or "" colours it; `hint` is shown when it is pointed at."""

    name: str
    value: str
    unit: str = ""
    note: str = ""
    tone: str = ""
    hint: str = ""


def write_report_files(
    out: str | Path,
    report: Mapping[str, Any],
    *,
    command: str,
    cases: Sequence[Case] = (),
    seconds: float | None = None,
    curve: Mapping[str, Any] | None = None,
) -> None:
    """Write report.json, timings.json and index.html into `out`, a path or a URL, each whole or not at all.

    seconds: that one image took; it stands apart, because report.json has the same bytes every time.
    """
    with writing(str(out)):
        storage.make_folder(str(out))
        write_json(storage.join(str(out), REPORT_JSON), report)
        write_json(storage.join(str(out), TIMINGS_JSON), {"seconds_per_image": seconds})
        write_report(storage.join(str(out), REPORT_HTML), report, cases=cases, command=command, curve=curve)


def write_report(
    path: str | Path,
    report: Mapping[str, Any],
    *,
    cases: Sequence[Case] = (),
    command: str,
    curve: Mapping[str, Any] | None = None,
    journal: Sequence[Mapping[str, Any]] = (),
    config: str = "",
    mlflow: Mapping[str, str] | None = None,
    title: str = "",
) -> None:
    """The page of an evaluation, whole or not at all.

    report: the object of report.json, or what reading that file gives; cases: pictures, each of an image of the report
    (of a generation: any); command: what reproduces it; curve: the object of curve.json; journal: the records of the
    run's metrics.jsonl; config: YAML text; mlflow: names and values to list (run, experiment, model); title: by default
    the kind and the name of the report. What is empty is left out.
    """
    kind = TITLES.get(str(report.get("kind")), "Evaluation")
    heading = title or (f"{kind}: {report['name']}" if report.get("name") else kind)
    body = report_body(
        report, cases, command=command, curve=curve, journal=journal, config=config, mlflow=mlflow,
        tiles=score_tiles(report),
    )  # fmt: skip
    write_text(path, render_page(heading, report_lead(report), body))


def report_lead(report: Mapping[str, Any]) -> str:
    """What was evaluated, in one sentence."""
    count, sampler = len(report["images"]), report["sampler"]
    noun = {"files": "scored", "generation": "generated"}.get(str(report.get("kind")), "held-out")
    parts = [f"{count} {noun} image{'' if count == 1 else 's'}"]
    if "steps" in sampler:
        parts.append(f"{sampler['steps']} sampling step{'' if sampler['steps'] == 1 else 's'}")
    if "eta" in sampler:
        parts.append(f"eta {sampler['eta']:g}")
    return ", ".join([*parts, protocol_words(report["protocol"])])


def report_body(
    report: Mapping[str, Any],
    cases: Sequence[Case],
    *,
    tiles: Sequence[Tile],
    command: str,
    curve: Mapping[str, Any] | None,
    journal: Sequence[Mapping[str, Any]],
    config: str,
    mlflow: Mapping[str, str] | None,
) -> str:
    """Tiles and every section that has something to show, with links to them.   -> HTML"""
    failed = report.get("failed", ())
    sections = [
        *_case_sections(report, cases),
        ("scores", "Scores", all_scores(report)),
        ("distributions", "Distributions", distributions(report)),
        ("cost", "Quality against cost", steps_curve(curve) if curve and curve["points"] else ""),
        ("images", "Scores per image", image_table(report)),
        ("failed", "Failed images", failed_table(failed)),
        ("training", "Training", training_charts(journal)),
        ("measured", "What was measured", _facts(report, mlflow) + _configuration(config)),
        ("reproduce", "Reproduce", _command(command)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in shown)
    bodies = "".join(f'<section id="{anchor}"><h2>{name}</h2>{html}</section>' for anchor, name, html in shown)
    return f'<nav aria-label="Sections">{links}</nav>{_warning(report)}{render_tiles(tiles)}{bodies}'


def score_tiles(report: Mapping[str, Any]) -> list[Tile]:
    """The scores of whole images and of whole sets, each with half of its 95 % interval, and how many images there
    are; scores of regions stand in the table."""
    scores = report["scores"]
    tiles = []
    for name in in_order(scores):
        if name == "gain_db":
            tiles.append(_gain_tile(scores[name]))
        elif not name.startswith("input_") and not has_region(name):
            tiles.append(_score_tile(name, scores))
    for name, found in report.get("distribution", {}).items():
        info = metric_info(name)
        std = found.get("std")
        note = "" if std is None else f"{PLUS_MINUS}{decimals(std, info.digits)} (std)"
        tiles.append(Tile(info.label, decimals(found["value"], info.digits), info.unit, note or _better(name)))
    return [*tiles, Tile("images", str(len(report["images"])), "", ", ".join(exceptions(report)))]


def gain_tile(name: str, gain: float | None, note: str) -> Tile:
    """A difference in dB, green where it gains and red where it loses."""
    if gain is None:
        return Tile(name, "-", "", note)
    return Tile(name, f"{'+' if gain >= 0 else MINUS}{abs(gain):.2f}", "dB", note, "good" if gain > 0 else "bad")


def render_tiles(tiles: Sequence[Tile]) -> str:
    """Tiles next to each other.   -> HTML"""
    cells = [
        f'<div class="tile {tile.tone}" title="{escape(tile.hint, quote=True)}"><span>{escape(tile.name)}</span>'
        f"<b>{escape(tile.value)}{f' <small>{escape(tile.unit)}</small>' if tile.unit else ''}</b>"
        f"<span>{escape(tile.note)}</span></div>"
        for tile in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _score_tile(name: str, scores: Mapping[str, Mapping[str, Any]]) -> Tile:
    score, info = scores[name], metric_info(name)
    width = half_width(score, info.digits)
    unit = " ".join(part for part in (width, info.unit) if part)
    before = scores.get(f"input_{name}")
    note = f"input {decimals(before['mean'], info.digits)} {info.unit}".rstrip() if before else _better(name)
    return Tile(info.label, decimals(score["mean"], info.digits), unit, note, hint=_hint(score, info.digits))


def _gain_tile(score: Mapping[str, Any]) -> Tile:
    digits = metric_info("gain_db").digits
    tile = gain_tile("gain over input", score["mean"], "mean over images")
    width = half_width(score, digits)
    return Tile(tile.name, tile.value, f"{width} dB".lstrip(), tile.note, tile.tone, _hint(score, digits))


def _hint(score: Mapping[str, Any], digits: int) -> str:
    text = interval(score, digits)
    return f"95 % interval over images: {text}" if text else ""


def _better(name: str) -> str:
    if name not in METRICS:
        return ""
    return f"{metric_info(name).better} is better"


def _warning(report: Mapping[str, Any]) -> str:
    """Failed images stand at the top of the page, not only in a list."""
    count = len(report.get("failed", ()))
    if not count:
        return ""
    whole = count + len(report["images"])
    verb = "image has" if count == 1 else "images have"
    return f'<p class="warning" role="alert"><b>{count} of {whole}</b> {verb} no scores: <a href="#failed">why</a></p>'


def _case_sections(report: Mapping[str, Any], cases: Sequence[Case]) -> list[tuple[str, str, str]]:
    if not cases:
        return []
    count = len(report["images"])
    if report.get("kind") == "generation":
        note = f'<p class="note">The first {len(cases)} of {count} images. Click one to see it large.</p>'
        return [("pictures", "Images", note + picture_grid(report, cases))]
    worst, best = split_cases(report, cases)
    note = (
        f'<p class="note">{len(cases)} of {count} images are shown, ranked by PSNR. Click one to compare two sides '
        "with a slider. Large images are shown reduced; scores are of the exact images.</p>"
    )
    if not best:
        return [("cases", "Images", note + case_cards(report, worst))]
    return [
        ("worst", "Worst cases", note + case_cards(report, worst)),
        ("best", "Best cases", case_cards(report, best)),
    ]


def _facts(report: Mapping[str, Any], mlflow: Mapping[str, str] | None) -> str:
    protocol = report["protocol"]
    unused = {name for name in METRICS if name not in protocol.get("metrics", METRICS)}  # formulas of other metrics
    groups: list[tuple[str, Mapping[str, Any]]] = [
        ("Protocol", {name: text for name, text in protocol.items() if name not in unused}),
        ("Model", report["model"]),
        ("Data", report["data"]),
        ("Sampler", report["sampler"]),
        *((f"Network: {name}", facts) for name, facts in report.get("networks", {}).items()),
        ("Evaluation", report.get("eval", {})),
        ("MLflow", mlflow or {}),
    ]
    cards = "".join(
        f'<div class="card"><h3>{escape(name)}</h3><dl>'
        + "".join(f"<dt>{escape(key)}</dt><dd>{_fact(key, value)}</dd>" for key, value in flat(facts))
        + "</dl></div>"
        for name, facts in groups
        if facts
    )
    return f'<div class="facts">{cards}</div>'


def _fact(name: str, text: str) -> str:
    return f"<code>{escape(text)}</code>" if name.endswith(("digest", "fingerprint", "sha256")) else escape(text)


def _configuration(config: str) -> str:
    return f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>" if config else ""


def _command(command: str) -> str:
    return f'<div class="command"><pre>{escape(command)}</pre><button class="plain">copy</button></div>'
