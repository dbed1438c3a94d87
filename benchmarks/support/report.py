"""What every benchmark prints and writes: medians with their spread, Markdown tables, the machine, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

RESULTS = Path(__file__).parents[1] / "results"
NOISY_SPREAD = 1.2

Summary = dict[str, float]


def make_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it stands and has --json FILE (benchmarks/results/NAME.json)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, default=RESULTS / f"{name}.json", help=f"file of results (benchmarks/results/{name}.json)"
    )
    return parser


def require_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Iterable[str]) -> None:
    """End with the parser's message where an option is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")


def run_main(main: Callable[[], None]) -> None:
    """Run a script; a user's mistake becomes one line and its exit code."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def summarize(values: Sequence[float]) -> Summary:
    """Median, least and most of a non-empty sequence."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show_summary(summary: Summary, digits: int) -> str:
    """For a cell of a table: median (least-most)."""
    return f"{summary['median']:.{digits}f} ({summary['min']:.{digits}f}-{summary['max']:.{digits}f})"


def show(value: Any) -> str:
    """For a cell of a table: three digits behind the point, yes and no, lists with plus signs."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " + ".join(str(item) for item in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table whose columns also line up on a console."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")


def print_noise(what: str, summary: Summary) -> None:
    """Say so where something whose speed should not change did.   summary: of the same measurement in each round"""
    spread = summary["max"] / summary["min"]
    if spread > NOISY_SPREAD:
        print(
            f"noisy: from round to round {what} varied by a factor of {spread:.2f}; something else used this machine, "
            "repeat on a quiet one before comparing"
        )


def describe_machine(packages: Iterable[str]) -> dict[str, Any]:
    """Cores, platform, and versions of Python and the packages."""
    return {
        "cpu_cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


class Report:
    """The record of a run: make it when the run starts, write it when all is measured.

    name: of the benchmark; packages: those whose versions matter.
    """

    def __init__(self, name: str, packages: Sequence[str]) -> None:
        self._name, self._packages = name, packages
        self._started, self._load_before = time.perf_counter(), os.getloadavg()[0]

    def write(self, path: Path, *, settings: dict[str, Any], results: Any) -> None:
        """Print how busy the machine was, and write everything to `path`.   settings, results: JSON values"""
        load_average, wall_s = [self._load_before, os.getloadavg()[0]], time.perf_counter() - self._started
        document = {
            "benchmark": self._name,
            "machine": {**describe_machine(self._packages), "load_average": load_average},
            "settings": settings,
            "results": results,
            "wall_s": wall_s,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"load average {load_average[0]:.1f} before, {load_average[1]:.1f} after, {os.cpu_count()} CPU cores")
        print(f"{wall_s:.0f} s; written to {path}")
