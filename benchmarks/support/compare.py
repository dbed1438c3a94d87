"""Arms that do the same work, measured in the same rounds: medians, ratios within a round, and their bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rddm_dist.cli.progress import ProgressBar
from support.report import print_table, show_summary, summarize


@dataclass(frozen=True)
class Timing:
    """One arm in one round.   per_s: units of work per second; cpu_ms: milliseconds of processor time for one"""

    per_s: float
    cpu_ms: float


Timings = Mapping[str, Mapping[str, Sequence[Timing]]]  # group -> arm -> one for each round
Bars = Mapping[str, Mapping[str, float | None]]  # group -> other arm -> least ratio of speeds, None: none was promised


def measure_rounds(
    title: str, groups: Mapping[str, Mapping[str, Callable[[int], Timing]]], *, rounds: int
) -> dict[str, dict[str, list[Timing]]]:
    """Time every arm of every group once in each round, in an order that turns from round to round.

    groups: group -> arm -> function of the round's number. Round 0 fills caches and is left out.
    """
    timings: dict[str, dict[str, list[Timing]]] = {group: {name: [] for name in arms} for group, arms in groups.items()}
    with ProgressBar(title, rounds + 1, every_s=5.0) as bar:
        for number in range(rounds + 1):
            for group, arms in groups.items():
                names = list(arms)
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    timing = arms[name](number)
                    if number:
                        timings[group][name].append(timing)
            bar.update(number + 1, "" if number else "warm-up")
    return timings


def make_rows(timings: Timings) -> list[dict[str, Any]]:
    """JSON values: each arm of each group with its summaries and rounds."""
    return [
        {
            "group": group,
            "arm": name,
            **_summaries([asdict(timing) for timing in own]),
            "rounds": list(map(asdict, own)),
        }
        for group, arms in timings.items()
        for name, own in arms.items()
    ]


def make_ratios(timings: Timings, ours: str, bars: Bars) -> list[dict[str, Any]]:
    """JSON values: arm `ours` divided by each arm with a bar, round by round. More per_s and less cpu_ms is better."""
    rows = []
    for group, arms in timings.items():
        for against, least in bars[group].items():
            if against not in arms:
                continue
            both = zip(arms[ours], arms[against], strict=True)
            ratios = _summaries([{"per_s": a.per_s / b.per_s, "cpu_ms": a.cpu_ms / b.cpu_ms} for a, b in both])
            is_met = None if least is None else ratios["per_s"]["median"] >= least
            rows.append({"group": group, "against": against, **ratios, "bar": least, "is_met": is_met})
    return rows


def print_comparison(
    rows: Sequence[Mapping[str, Any]], ratios: Sequence[Mapping[str, Any]], *, ours: str, group: str, unit: str
) -> None:
    """Two tables.   rows, ratios: of make_rows and make_ratios; group: what a group is; unit: of work"""
    measures = (f"{unit}s/s", f"CPU ms/{unit}")
    print_table(
        (group, "arm", *measures),
        ((row["group"], row["arm"], show_summary(row["per_s"], 0), show_summary(row["cpu_ms"], 2)) for row in rows),
    )
    print()
    print_table(
        (group, f"{ours} against", *measures, "bar"),
        (
            (row["group"], row["against"], show_summary(row["per_s"], 2), show_summary(row["cpu_ms"], 2), _verdict(row))
            for row in ratios
        ),
    )


def _summaries(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {name: summarize([value[name] for value in values]) for name in values[0]}


def _verdict(row: Mapping[str, Any]) -> str:
    return "" if row["bar"] is None else f">= {row['bar']:.2f} {'met' if row['is_met'] else 'NOT MET'}"
