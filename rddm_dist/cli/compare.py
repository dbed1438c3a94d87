"""`rddm compare`: reports of one protocol and one dataset in one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rddm_dist.cli.dataset import check_output, write_output
from rddm_dist.cli.progress import console, say

if TYPE_CHECKING:
    from rddm_dist.evaluation.compare_formats import Grid

EXAMPLE = "Example: rddm compare runs/*/report --out table.tex --baseline nafnet"
BEST = "*"


def register(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLE)(compare)


def compare(
    reports: Annotated[list[str], typer.Argument(metavar="REPORT...", help="report.json files, or their folders")],
    out: Annotated[str, typer.Option(help="Also a file: .md, .tex, .csv or .html")] = "",
    metrics: Annotated[str, typer.Option(help="Which, with commas: psnr,ssim; default: all")] = "",
    baseline: Annotated[str, typer.Option(help="Name that differences are to; default: the first")] = "",
) -> int:
    """Put models and other methods side by side, with intervals and paired differences."""
    from rddm_dist.evaluation import compare_formats
    from rddm_dist.evaluation.compare import compare as compare_reports
    from rddm_dist.evaluation.compare_reports import load_report

    suffix = compare_formats.output_format(out) if out else ""
    if out:
        check_output(out)
    wanted = [name.strip() for name in metrics.split(",") if name.strip()]
    comparison = compare_reports([load_report(uri) for uri in reports], metrics=wanted, baseline=baseline)
    print_grid(compare_formats.score_grid(comparison))
    differences = compare_formats.difference_grid(comparison)
    if differences is not None:
        print_grid(differences)
    for sentence in compare_formats.caption(comparison, BEST):
        say(sentence)
    if out:
        write_output(out, compare_formats.render(comparison, suffix).encode())
        say(f"written: {out}")
    return 0


def print_grid(grid: Grid) -> None:
    """A table on the console: intervals below their values, the best value of a column in bold and marked."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(grid.title), title_justify="left")
    for place, (name, _) in enumerate(grid.heads):
        table.add_column(Text(name), justify="right" if place else "left", overflow="fold")
    for row in grid.rows:
        fields = []
        for field in row:
            text = Text(f"{field.text}{BEST if field.is_best else ''}", style="bold" if field.is_best else "")
            fields.append(text.append("".join(f"\n{note}" for note in field.notes), style="dim not bold"))
        table.add_row(*fields)
    console.print(table)
