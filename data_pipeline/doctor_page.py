"""What the dataset doctor found as one HTML page: verdict, offenders side by side, statistics. Nothing is loaded from
anywhere."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from data_pipeline.contact import amplified_difference
from data_pipeline.doctor import Diagnosis
from data_pipeline.doctor_checks import KINDS, Finding
from data_pipeline.statistics import Column, Spread, columns, common_sizes

MAX_CARDS = 12  # offenders of a kind that are shown; the others are named
MAX_COPIES = 4  # pictures of a group of duplicates
MAX_SIDE = 320  # larger images are shown reduced
BINS = 24
CHARTS = ("brightness of targets", "brightness of inputs", "residual deviation", "PSNR of inputs", "clipped in inputs")
PAIR_KINDS = ("identical", "turned", "shifted", "mis-paired", "swapped")
COPY_KINDS = ("duplicate", "near-duplicate", "shared target")

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1b2430;--muted:#5d6b7c;--line:#e0e5ec;--accent:#2563eb;
--soft:#eaf0fd;--good:#0f8a5f;--bad:#c2410c;--warn:#a16207}
@media (prefers-color-scheme:dark){:root{--bg:#10141b;--card:#181e27;--text:#e5eaf1;--muted:#93a1b3;--line:#2a3341;
--accent:#7aa7ff;--soft:#1e2a40;--good:#45c796;--bad:#fb923c;--warn:#eab308}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:27px;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:18px;margin:40px 0 4px;display:flex;gap:10px;align-items:baseline;flex-wrap:wrap}
.lead,.note{color:var(--muted);margin:0;overflow-wrap:anywhere}.note{font-size:13px;margin:0 0 12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px;margin-top:26px}
.tile,.card,.chart,.scroll,.list{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tile{padding:13px 16px}.tile b{display:block;font-size:25px;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:var(--muted);font-size:13px}
.good b{color:var(--good)}.error b,.tag.is-error{color:var(--bad)}.warning b,.tag.is-warning{color:var(--warn)}
.tag{font-size:12px;font-weight:600;border:1px solid currentColor;border-radius:99px;padding:0 9px;color:var(--muted)}
.cards{display:grid;gap:14px}.card{padding:12px 16px 16px}
.card header{margin-bottom:9px;overflow-wrap:anywhere}.card header span{color:var(--muted);font-size:13px}
.row{display:flex;flex-wrap:wrap;gap:10px}.row figure{margin:0;max-width:320px;flex:1 1 180px}
.row img{display:block;width:100%;height:auto;max-height:320px;object-fit:contain;object-position:left top;
border-radius:7px}
figcaption{font-size:13px;color:var(--muted);padding-top:4px;overflow-wrap:anywhere}
.list{margin:14px 0 0;padding:10px 16px 10px 34px;font-size:13.5px;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(330px,100%),1fr));gap:14px;margin-bottom:14px}
.chart{margin:0;padding:12px 14px}.chart figcaption{font-weight:600;font-size:14px;color:var(--text);padding:0 0 4px}
svg{display:block;width:100%;height:auto}svg text{fill:var(--muted);font-size:12px}
rect{fill:var(--accent)}line{stroke:var(--muted);stroke-opacity:.6}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:6px 14px;text-align:right;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums;
white-space:nowrap}tr:last-child td{border-bottom:0}
th{font-size:12.5px;color:var(--muted);font-weight:600}th:first-child,td:first-child{text-align:left}
pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:0;padding:12px 16px;
background:var(--soft);border-radius:9px;white-space:pre-wrap;overflow-wrap:anywhere}
"""


def render(diagnosis: Diagnosis, *, command: str) -> str:
    """The page. command: the command line that makes it again. Reads the images it shows from the dataset."""
    title = f"Dataset check: {diagnosis.subject.uri}"
    groups = diagnosis.by_kind()
    parts = [_tiles(diagnosis)]
    parts += [_section(diagnosis, kind, found) for kind, found in groups.items()]
    parts += [_statistics(diagnosis), f"<h2>Made with</h2><pre>{escape(command)}</pre>"]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(_lead(diagnosis))}</p>\n{"".join(parts)}\n'
        "</main></body></html>\n"
    )


def _lead(diagnosis: Diagnosis) -> str:
    manifest = diagnosis.manifest
    words = [f"fingerprint {manifest.fingerprint[:12]}", f"{len(manifest.shards)} shard(s)", f"codec {manifest.codec}"]
    words += [f"{', '.join(manifest.fields)}"]
    if manifest.tiling is not None:
        words.append(f"tiles of {manifest.tiling.size} px with {manifest.tiling.overlap} px overlap, checked as images")
    if diagnosis.other is not None:
        words.append(f"compared with {diagnosis.other.uri}")
    return "; ".join(words)


def _tiles(diagnosis: Diagnosis) -> str:
    counts = {
        severity: sum(finding.severity == severity for finding in diagnosis.findings)
        for severity in ("error", "warning", "note")
    }
    verdict = ("sound", "good") if diagnosis.is_sound else ("not sound", "error")
    tiles = [
        ("verdict", *verdict),
        ("images", f"{diagnosis.subject.num_images:,}", ""),
        ("looked at", f"{len(diagnosis.subject.entries):,}", ""),
        ("errors", str(counts["error"]), "error" if counts["error"] else "good"),
        ("warnings", str(counts["warning"]), "warning" if counts["warning"] else "good"),
        ("shard hashes", "compared" if diagnosis.is_hashed else "not read", ""),
    ]
    cells = "".join(
        f'<div class="tile {look}"><span>{escape(label)}</span><b>{escape(value)}</b></div>'
        for label, value, look in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _section(diagnosis: Diagnosis, kind: str, found: Sequence[Finding]) -> str:
    about = KINDS[kind]
    head = (
        f'<h2>{escape(about.title)} <span class="tag is-{about.severity}">{about.severity}</span></h2>'
        f'<p class="note">{len(found)} found. {escape(about.meaning)}</p>'
    )
    is_shown = kind in (*PAIR_KINDS, *COPY_KINDS, "altered", "leak")
    cards = "".join(_card(diagnosis, finding) for finding in found[:MAX_CARDS]) if is_shown else ""
    rest = found[MAX_CARDS:] if is_shown else found
    items = "".join(f"<li>{escape(finding.line)}</li>" for finding in rest)
    listed = f'<ul class="list">{items}</ul>' if items else ""
    return f'{head}<div class="cards">{cards}</div>{listed}' if cards else head + listed


def _card(diagnosis: Diagnosis, finding: Finding) -> str:
    pictures = _pictures(diagnosis, finding)
    figures = "".join(
        f'<figure><img alt="{escape(caption)}" src="{data_uri(image)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, image in pictures
    )
    name = f"<b>{escape(finding.keys[0])}</b> " if finding.kind in PAIR_KINDS else ""
    return (
        f'<article class="card"><header>{name}<span>{escape(finding.text)}</span></header>'
        f'<div class="row">{figures}</div></article>'
    )


def _pictures(diagnosis: Diagnosis, finding: Finding) -> list[tuple[str, np.ndarray]]:
    """(caption, (H, W, 3) uint8) of what a finding is about."""
    if finding.kind == "altered":
        return diagnosis.subject.altered(finding.keys[0])[:MAX_COPIES]
    samples = {key: diagnosis.subject.sample(key) for key in finding.keys[:MAX_COPIES]}
    first = samples[finding.keys[0]]
    if finding.kind in PAIR_KINDS:
        assert first.input is not None, "pairs have inputs"
        difference, gain = amplified_difference(first.input, first.target)
        pictures = [("input", first.input), ("target", first.target), (f"input - target, x{gain:g}", difference)]
        if finding.companion:
            other = diagnosis.subject.sample(finding.companion)
            pictures.append((f"target of {finding.companion}", other.target))
        return pictures
    if finding.kind == "shared target":
        inputs = [(f"input of {key}", sample.input) for key, sample in samples.items() if sample.input is not None]
        return [(f"target of {first.key}", first.target), *inputs]
    pictures = [(key, sample.target) for key, sample in samples.items()]
    for key in finding.other_keys[:MAX_COPIES]:
        assert diagnosis.other is not None, "leaks lead to another dataset"
        pictures.append((f"{key} in {diagnosis.other.uri}", diagnosis.other.sample(key).target))
    return pictures


def data_uri(image: np.ndarray) -> str:
    """(H, W, 3) uint8  ->  a data: URI of a JPEG, at most MAX_SIDE pixels a side"""
    picture = Image.fromarray(image)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _statistics(diagnosis: Diagnosis) -> str:
    facts = [m.facts for m in diagnosis.measurements]
    if not facts:
        return ""
    table = columns(facts)
    charts = [histogram(column) for column in table if column.name in CHARTS] + [_size_bars(common_sizes(facts))]
    rows = ""
    for column in table:
        spread = Spread.of(column.values)
        if spread is not None:
            cells = "".join(f"<td>{value:,.1f}</td>" for value in (spread.mean, spread.low, spread.high))
            rows += f"<tr><td>{escape(column.name)}</td>{cells}<td>{escape(column.unit)}</td></tr>"
    head = "<tr><th></th><th>mean</th><th>lowest</th><th>highest</th><th>unit</th></tr>"
    return (
        f'<h2>Statistics</h2><p class="note">Of {len(facts):,} images; levels are 0 to 255, the residual is input - '
        f'target.</p><div class="charts">{"".join(charts)}</div><div class="scroll"><table>{head}{rows}</table></div>'
    )


def histogram(column: Column) -> str:
    """A <figure> with BINS bars from the lowest to the highest finite value."""
    values = np.array([value for value in column.values if math.isfinite(value)])
    if not len(values):
        return ""
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(values, bins=BINS, range=(low, high))
    width, height = 300 / BINS, 96
    bars = "".join(
        f'<rect x="{10 + i * width:.1f}" y="{12 + height * (1 - count / counts.max()):.1f}" width="{width - 1.5:.1f}" '
        f'height="{height * count / counts.max():.1f}"><title>{count}</title></rect>'
        for i, count in enumerate(counts.tolist())
        if count
    )
    unit = f" {column.unit}" if column.unit else ""
    labels = (
        f'<text x="10" y="126">{low:.4g}{escape(unit)}</text>'
        f'<text x="310" y="126" text-anchor="end">{high:.4g}{escape(unit)}</text>'
        f'<text x="160" y="126" text-anchor="middle">mean {values.mean():.4g}</text>'
    )
    return _figure(column.name, 132, f'{bars}<line x1="10" x2="310" y1="108.5" y2="108.5"/>{labels}')


def _size_bars(sizes: Sequence[tuple[str, int]], shown: int = 5) -> str:
    """A <figure> with a bar for each of the most frequent sizes and one for the rest."""
    bars = list(sizes[:shown])
    if len(sizes) > shown:
        bars.append((f"{len(sizes) - shown} more", sum(count for _, count in sizes[shown:])))
    most = max(count for _, count in bars)
    rows = "".join(
        f'<text x="86" y="{22 + 19 * i}" text-anchor="end">{escape(name)}</text>'
        f'<rect x="94" y="{12 + 19 * i}" width="{max(1.0, 170 * count / most):.1f}" height="12"/>'
        f'<text x="{100 + 170 * count / most:.1f}" y="{22 + 19 * i}">{count}</text>'
        for i, (name, count) in enumerate(bars)
    )
    return _figure("sizes in pixels", 132, rows)


def _figure(caption: str, height: int, content: str) -> str:
    name = escape(caption)
    return (
        f'<figure class="chart"><figcaption>{name}</figcaption>'
        f'<svg viewBox="0 0 320 {height}" role="img" aria-label="{name}">{content}</svg></figure>'
    )
