"""Line charts and histograms as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 16, 48
MAX_POINTS = 600
BINS = 24  # about that many bars over the range of a histogram
ROUNDING = 1e-12  # values that differ by less than this part of them are equal
SMALLEST = 1e-300  # and those that differ by less than this

Role = Literal["main", "second", "faint", "reference"]


@dataclass(frozen=True)
class Series:
    """Points to join. `role` decides the look: main, second, faint (behind it) or reference (dashed).

    intervals: x of a point -> (low, high) of a vertical bar through it.
    """

    name: str
    points: Sequence[tuple[float, float]]
    role: Role = "main"
    intervals: Mapping[float, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Values to count in bins; those that are not finite are not drawn. `role` as of a Series: main or reference."""

    name: str
    values: Sequence[float]
    role: Role = "main"


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` (with `log`: their decimal logarithms) onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def pixel(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
        inside = [tick for tick in ticks if self.low - 1e-9 <= math.log10(tick) <= self.high + 1e-9]
        return inside if len(inside) > 1 else nice_ticks(10.0**self.low, 10.0**self.high, 4)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
) -> str:
    """A <figure> with axes, ticks, labels and a legend. Points that are not finite (or, on a logarithmic axis, not
    positive) are left out; with no point at all the figure says so. `from_zero` lets the y axis start at 0."""
    shown = [_drawable(s, log_x=log_x, log_y=log_y) for s in series]
    shown = [s for s in shown if s.points]
    if not shown:
        return _figure(title, "", '<p class="note">No points were logged.</p>')
    xs = [x for s in shown for x, _ in s.points]
    ys = [y for s in shown for _, y in s.points]
    ys += [end for s in shown for bar in s.intervals.values() for end in bar]
    x_axis = _make_axis(xs, 0.03 if log_x else 0.0, (LEFT, WIDTH - RIGHT), log=log_x)
    y_axis = _make_axis(ys, 0.06, (HEIGHT - BOTTOM, TOP), log=log_y, from_zero=from_zero)
    parts = [_axes(x_axis, y_axis, x_label=x_label, y_label=f"{y_label}{' (log)' if log_y else ''}")]
    parts += [_line(s, x_axis, y_axis) for s in shown]
    return _figure(title, "".join(parts), _legend(shown))


def histogram(samples: Sequence[Sample], *, title: str, x_label: str) -> str:
    """A <figure> that counts the finite values of each sample in bins of one round width, shared by all samples."""
    finite = {sample.name: [v for v in sample.values if math.isfinite(v)] for sample in samples}
    values = [value for found in finite.values() for value in found]
    if not values:
        return _figure(title, "", '<p class="note">No finite values.</p>')
    low, high = min(values), max(values)
    span = _span(low, high) or max(abs(low) * 0.1, 1e-3)
    width = nice_step(span / BINS)
    first = math.floor(low / width)
    counts = {name: _count(found, first, width) for name, found in finite.items()}
    last = max(index for found in counts.values() for index in found)
    tallest = max(count for found in counts.values() for count in found.values())
    x_axis = _Axis((first - 1) * width, (last + 2) * width, LEFT, WIDTH - RIGHT)
    y_axis = _Axis(0.0, tallest * 1.08, HEIGHT - BOTTOM, TOP)
    parts = [_axes(x_axis, y_axis, x_label=x_label, y_label="images", whole_y=True)]
    for sample in samples:
        parts += [
            _bar(sample, (index * width, (index + 1) * width), count, x_axis, y_axis)
            for index, count in sorted(counts[sample.name].items())
        ]
    return _figure(title, "".join(parts), _legend(samples))


def _span(low: float, high: float, *, log: bool = False) -> float:
    """high - low, or 0 where that is a rounding error of the values (with `log`, whose logarithms low and high are)."""
    error = ROUNDING if log else max(ROUNDING * max(abs(low), abs(high)), SMALLEST)
    return high - low if high - low > error else 0.0


def nice_step(rough: float) -> float:
    """The least of 1, 2 or 5 times a power of ten that is not below `rough` > 0."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    step = nice_step((high - low) / count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _figure(title: str, drawing: str, below: str) -> str:
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">{drawing}</svg>'
        if drawing
        else ""
    )
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{svg}{below}</figure>'


def _legend(shown: Sequence[Series | Sample]) -> str:
    """What the colours mean; one series is named by the title alone."""
    if len(shown) < 2:
        return ""
    shape = {Series: "key", Sample: "key box"}
    keys = "".join(f'<span><i class="{shape[type(s)]} {s.role}"></i>{escape(s.name)}</span>' for s in shown)
    return f'<div class="legend">{keys}</div>'


def _axes(x_axis: _Axis, y_axis: _Axis, *, x_label: str, y_label: str, whole_y: bool = False) -> str:
    parts = []
    bottom = HEIGHT - BOTTOM
    for value in y_axis.ticks():
        if whole_y and value != round(value):
            continue
        y = y_axis.pixel(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in x_axis.ticks():
        x = x_axis.pixel(value)
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + bottom) / 2
    parts.append(f'<text class="label" x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _line(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    pixels = [(x_axis.pixel(x), y_axis.pixel(y)) for x, y in series.points]
    parts = [
        f'<line class="interval {series.role}" x1="{x_axis.pixel(x):.1f}" x2="{x_axis.pixel(x):.1f}" '
        f'y1="{y_axis.pixel(low):.1f}" y2="{y_axis.pixel(high):.1f}"/>'
        for x, (low, high) in series.intervals.items()
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    parts.append(f'<polyline class="{series.role}" points="{line}"/>')
    if series.role in ("main", "second") and len(pixels) <= 30:
        for (x, y), (at, value) in zip(pixels, series.points, strict=True):
            title = f"{escape(series.name)}: {_number(value, digits=5)} at {_number(at)}"
            parts.append(
                f'<circle class="{series.role}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{title}</title></circle>'
            )
    return "".join(parts)


def _bar(sample: Sample, edges: tuple[float, float], count: int, x_axis: _Axis, y_axis: _Axis) -> str:
    left, right = (x_axis.pixel(edge) for edge in edges)
    top = y_axis.pixel(count)
    title = f"{escape(sample.name)}: {count} from {_number(edges[0])} to {_number(edges[1])}"
    return (
        f'<rect class="bin {sample.role}" x="{left + 0.5:.1f}" y="{top:.1f}" width="{right - left - 1:.1f}" '
        f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{title}</title></rect>'
    )


def _count(values: Sequence[float], first: int, width: float) -> dict[int, int]:
    """Bin index (of [index * width, (index + 1) * width)) -> how many values."""
    counts: dict[int, int] = {}
    for value in values:
        index = max(first, math.floor(value / width))
        counts[index] = counts.get(index, 0) + 1
    return counts


def _drawable(series: Series, *, log_x: bool, log_y: bool) -> Series:
    """The points and intervals that the axes can show, thinned."""

    def fits(value: float, log: bool) -> bool:
        return math.isfinite(value) and (value > 0 or not log)

    points = _thin([(x, y) for x, y in series.points if fits(x, log_x) and fits(y, log_y)])
    drawn = {x for x, _ in points}
    intervals = {
        x: bar for x, bar in series.intervals.items() if x in drawn and fits(bar[0], log_y) and fits(bar[1], log_y)
    }
    return Series(series.name, points, series.role, intervals)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS of them, evenly spread, with the first and the last."""
    if len(points) <= MAX_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _make_axis(
    values: Sequence[float], part: float, ends: tuple[float, float], *, log: bool, from_zero: bool = False
) -> _Axis:
    """An axis over the values, wider by `part` of their range at both ends (only above with from_zero)."""
    places = [math.log10(value) if log else value for value in values]
    low, high = min(places), max(places)
    span = _span(low, high, log=log)
    flat = 1.0 if log or abs(high) < SMALLEST else abs(high) * 0.05
    padding = span * part if span else flat
    return _Axis(0.0 if from_zero else low - padding, high + padding, *ends, log=log)


def _number(value: float, digits: int = 4) -> str:
    if abs(value) >= 10_000 and value == int(value):
        return f"{value / 1000:g}k"
    return f"{value:.{digits}g}"
