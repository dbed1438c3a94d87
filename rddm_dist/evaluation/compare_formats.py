"""A comparison as Markdown, LaTeX, CSV and HTML; names in it are others' text and are escaped for each format."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import PurePosixPath
from typing import Any, Literal

from data_pipeline.errors import ConfigError
from rddm_dist.evaluation.compare import INPUT, Cell, Comparison, Row
from rddm_dist.evaluation.compare_reports import plain
from rddm_dist.evaluation.metrics import MetricInfo, metric_info
from rddm_dist.evaluation.page import render_page
from rddm_dist.evaluation.statistics import Difference
from rddm_dist.evaluation.wording import decimals, protocol_words

TITLE = "Comparison of methods"
DIGEST_DIGITS = 12
TEXT_CLASS = ' class="text"'
# CommonMark: a backslash before ASCII punctuation makes it text; < and & are entities, which every renderer knows.
MARKDOWN = {**{char: f"\\{char}" for char in "\\`*_[]#|~$"}, "<": "&lt;", ">": "&gt;", "&": "&amp;"}
LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    '"': "{\\char34}",
}
Head = tuple[str, Literal["higher", "lower", ""]]
FORMULA = ("=", "+", "-", "@")  # a spreadsheet computes what starts with one of these


@dataclass(frozen=True)
class Field:
    """A field of a table: its text, what stands beside it in small print, and whether it is the best of its column."""

    text: str
    notes: tuple[str, ...] = ()
    is_best: bool = False


@dataclass(frozen=True)
class Grid:
    """A table as text. heads: name and which way is better ("" for none) of each column; the first column is text."""

    title: str
    heads: tuple[Head, ...]
    rows: tuple[tuple[Field, ...], ...]


def output_format(out: str) -> str:
    """The suffix of the file, which says its format; ConfigError for another one."""
    suffix = PurePosixPath(out.partition("?")[0]).suffix.lower()
    if suffix not in RENDERERS:
        raise ConfigError(f"--out {out}: the ending says the format; choose one of {', '.join(RENDERERS)}")
    return suffix


def render(comparison: Comparison, suffix: str) -> str:
    """The whole file.   suffix: ".md", ".tex" (needs booktabs), ".csv" or ".html\""""
    return RENDERERS[suffix](comparison)


def score_grid(comparison: Comparison) -> Grid:
    """The methods, a row each, with their scores and intervals."""
    infos = [metric_info(name) for name in comparison.metrics]
    rows = tuple(
        (
            Field(row.name),
            Field("-" if row.steps is None else str(row.steps)),
            Field(str(row.images)),
            Field(str(row.failed)),
            *(_score_field(cell, info) for cell, info in zip(row.cells, infos, strict=True)),
        )
        for row in comparison.rows
    )
    plain_heads: tuple[Head, ...] = (("method", ""), ("steps", ""), ("images", ""), ("failed", ""))
    return Grid("Scores", (*plain_heads, *((_heading(info), info.better) for info in infos)), rows)


def difference_grid(comparison: Comparison) -> Grid | None:
    """The differences to the baseline of the rows that have any; None where no row has."""
    having = [row for row in comparison.rows if any(row.differences)]
    places = [place for place in range(len(comparison.metrics)) if any(row.differences[place] for row in having)]
    if not places:
        return None
    infos = [metric_info(comparison.metrics[place]) for place in places]
    rows = tuple(
        (
            Field(row.name),
            *(_difference_field(row.differences[place], info) for place, info in zip(places, infos, strict=True)),
        )
        for row in having
    )
    title = f"Differences to {comparison.baseline} on the same images"
    return Grid(title, (("method", ""), *((_heading(info), info.better) for info in infos)), rows)


def caption(comparison: Comparison, best: str) -> list[str]:
    """What the numbers are, a sentence each.   best: how the best value of a column is marked, such as "bold" """
    counts = sorted({row.images for row in comparison.rows if row.kind != INPUT})
    images = f"{counts[0]} images" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} images"
    digest = comparison.targets_digest[:DIGEST_DIGITS] or "unknown"
    infos = [metric_info(name) for name in comparison.metrics]
    parts = [f"{_sentence(plain(protocol_words(comparison.protocol)))}; {images}, targets {digest}."]
    if any(cell.low is not None for row in comparison.rows for cell in row.cells) or difference_grid(comparison):
        parts.append(
            f"In brackets: {100 * comparison.confidence:g} % bootstrap interval of the mean over images "
            f"({comparison.resamples} resamples)."
        )
    for way in ("higher", "lower"):
        labels = [info.label for info in infos if info.better == way]
        if labels:
            parts.append(f"{_sentence(way)} is better: {', '.join(labels)}.")
    if any(cell.is_best for row in comparison.rows for cell in row.cells):
        parts.append(f"Best of a column: {best}.")
    return [*parts, *comparison.notes]


def to_markdown(comparison: Comparison) -> str:
    """Tables of GitHub's Markdown, the best values in bold, and the caption below."""
    parts = []
    for grid in _grids(comparison):
        heads = [
            _escaped(name, MARKDOWN) + {"higher": " \u2191", "lower": " \u2193", "": ""}[way]
            for name, way in grid.heads
        ]
        lines = [heads, [":--", *["--:"] * (len(heads) - 1)]]
        lines += [_markdown_row(row) for row in grid.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{_escaped(grid.title, MARKDOWN)}**\n\n{table}\n")
    parts.append(_escaped(" ".join(caption(comparison, "bold")), MARKDOWN) + "\n")
    return "\n".join(parts)


def to_latex(comparison: Comparison) -> str:
    r"""A table environment for each grid, for \usepackage{booktabs}; the caption stands in the first."""
    parts = []
    for place, grid in enumerate(_grids(comparison)):
        heads = [
            _escaped(name, LATEX) + {"higher": " $\\uparrow$", "lower": " $\\downarrow$", "": ""}[way]
            for name, way in grid.heads
        ]
        words = f"{grid.title}." if place else " ".join([f"{grid.title}.", *caption(comparison, "bold")])
        lines = [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_escaped(words, LATEX)}}}",
            f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
            "\\toprule",
            f"{' & '.join(heads)} \\\\",
            "\\midrule",
            *(f"{' & '.join(_latex_row(row))} \\\\" for row in grid.rows),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def to_csv(comparison: Comparison) -> str:
    """One line per row in full precision, each with the caption, so that it stands for itself."""
    words = " ".join(caption(comparison, "1 in the column that ends in _best"))
    records = [_csv_record(row, comparison) | {"caption": words} for row in comparison.rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def to_html(comparison: Comparison) -> str:
    """A self-contained page with sortable tables."""
    body = "".join(f"<h2>{escape(grid.title)}</h2>{_html_table(grid)}" for grid in _grids(comparison))
    body += f'<p class="note">{escape(" ".join(caption(comparison, "bold")))}</p>'
    count = sum(row.kind != INPUT for row in comparison.rows)
    lead = f"{count} report(s), {plain(protocol_words(comparison.protocol))}"
    return render_page(TITLE, lead, body)


RENDERERS: Mapping[str, Callable[[Comparison], str]] = {
    ".md": to_markdown,
    ".tex": to_latex,
    ".csv": to_csv,
    ".html": to_html,
}


def _grids(comparison: Comparison) -> list[Grid]:
    differences = difference_grid(comparison)
    return [score_grid(comparison), *([differences] if differences else [])]


def _heading(info: MetricInfo) -> str:
    return f"{info.label}, {info.unit}" if info.unit else info.label


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _score_field(cell: Cell, info: MetricInfo) -> Field:
    notes = []
    if cell.low is not None and cell.high is not None:
        notes.append(f"[{cell.low:.{info.digits}f}, {cell.high:.{info.digits}f}]")
    if cell.std is not None:
        notes.append(f"std {cell.std:.{info.digits}f}")
    if cell.pooled is not None:
        notes.append(f"pooled {cell.pooled:.{info.digits}f}")
    return Field(decimals(cell.value, info.digits), tuple(notes), cell.is_best)


def _difference_field(difference: Difference | None, info: MetricInfo) -> Field:
    if difference is None or difference.mean is None:
        return Field("-")
    notes = []
    if difference.low is not None and difference.high is not None:
        notes.append(f"[{difference.low:+.{info.digits}f}, {difference.high:+.{info.digits}f}]")
    notes.append(f"better on {difference.better} of {difference.count}")
    return Field(f"{difference.mean:+.{info.digits}f}", tuple(notes))


def _escaped(text: str, table: Mapping[str, str]) -> str:
    return "".join(table.get(char, char) for char in text)


def _markdown_row(row: tuple[Field, ...]) -> list[str]:
    numbers = [f"**{field.text}**" if field.is_best else field.text for field in row[1:]]
    return [
        _escaped(row[0].text, MARKDOWN),
        *(" ".join([number, *field.notes]) for number, field in zip(numbers, row[1:], strict=True)),
    ]


def _latex_row(row: tuple[Field, ...]) -> list[str]:
    # In braces: a name that starts with [ or * would belong to the line end before it.
    return [f"{{{_escaped(row[0].text, LATEX)}}}", *map(_latex_number, row[1:])]


def _latex_number(field: Field) -> str:
    text, note = ("--" if part == "-" else part.replace("-", "$-$") for part in (field.text, " ".join(field.notes)))
    text = f"\\textbf{{{text}}}" if field.is_best else text
    return f"{text} {{\\scriptsize {note}}}" if note else text


def _html_table(grid: Grid) -> str:
    arrows = {"higher": " &uarr;", "lower": " &darr;", "": ""}
    head = "".join(
        f"<th{' class=text' if not place else ''}><button>{escape(name)}{arrows[way]}</button></th>"
        for place, (name, way) in enumerate(grid.heads)
    )
    body = "".join(
        f"<tr>{''.join(_html_field(field, place) for place, field in enumerate(row))}</tr>" for row in grid.rows
    )
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _html_field(field: Field, place: int) -> str:
    text = f"<b>{escape(field.text)}</b>" if field.is_best else escape(field.text)
    note = "".join(f"<br><small>{escape(part)}</small>" for part in field.notes)
    value = "NaN" if field.text == "-" else field.text  # what the column is sorted by
    return f'<td{"" if place else TEXT_CLASS} data-value="{escape(value)}">{text}{note}</td>'


def _csv_text(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text


def _csv_record(row: Row, comparison: Comparison) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": _csv_text(row.name),
        "kind": row.kind,
        "steps": row.steps,
        "images": row.images,
        "failed": row.failed,
        "baseline": int(row.is_baseline),
    }
    for name, cell, difference in zip(comparison.metrics, row.cells, row.differences, strict=True):
        record[name] = cell.value
        for part in ("low", "high", "std", "pooled"):
            record[f"{name}_{part}"] = getattr(cell, part)
        record[f"{name}_best"] = int(cell.is_best)
        record[f"{name}_diff"] = difference.mean if difference else None
        for part in ("low", "high", "better", "equal", "worse", "count", "left_out"):
            record[f"{name}_diff_{part}"] = getattr(difference, part) if difference else None
    return record
