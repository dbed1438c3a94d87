"""Line charts as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 16, 48
MAX_POINTS = 600


@dataclass(frozen=True)
class Series:
    """Points to join. `role` decides the look: main, faint (behind it) or reference (dashed)."""

    name: str
    points: Sequence[tuple[float, float]]
    role: Literal["main", "faint", "reference"] = "main"


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_y: bool = False, from_zero: bool = False
) -> str:
    """A <figure> with axes, ticks, labels and a legend. Points that are not finite (or, with log_y, not positive)
    are left out; with no point at all the figure says so. `from_zero` lets the y axis start at 0."""
    shown = [Series(s.name, _thin(_drawable(s.points, log_y)), s.role) for s in series]
    shown = [s for s in shown if s.points]
    caption = f"<figcaption>{escape(title)}</figcaption>"
    if not shown:
        return f'<figure class="chart">{caption}<p class="note">No points were logged.</p></figure>'
    xs = [x for s in shown for x, _ in s.points]
    ys = [_scale_y(y, log_y) for s in shown for _, y in s.points]
    x_range, y_range = _padded(min(xs), max(xs), 0.0), _padded(min(ys), max(ys), 0.06)
    if from_zero:
        y_range = (0.0, y_range[1])
    parts = [_axes(x_range, y_range, x_label=x_label, y_label=y_label, log_y=log_y)]
    parts += [_line(s, x_range, y_range, log_y) for s in shown]
    legend = "".join(f'<span><i class="key {s.role}"></i>{escape(s.name)}</span>' for s in shown)
    return (
        f'<figure class="chart">{caption}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
        f'<div class="legend">{legend}</div></figure>'
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _axes(
    x_range: tuple[float, float], y_range: tuple[float, float], *, x_label: str, y_label: str, log_y: bool
) -> str:
    parts = []
    bottom = HEIGHT - BOTTOM
    for value in _y_ticks(y_range, log_y):
        y = _to_pixel(_scale_y(value, log_y), y_range, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in nice_ticks(*x_range):
        x = _to_pixel(value, x_range, LEFT, WIDTH - RIGHT)
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + bottom) / 2
    parts.append(f'<text class="label" x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}{' (log)' if log_y else ''}</text>"
    )
    return "".join(parts)


def _line(series: Series, x_range: tuple[float, float], y_range: tuple[float, float], log_y: bool) -> str:
    pixels = [
        (
            _to_pixel(x, x_range, LEFT, WIDTH - RIGHT),
            _to_pixel(_scale_y(y, log_y), y_range, HEIGHT - BOTTOM, TOP),
            f"<title>{escape(series.name)}: {_number(y, digits=5)} at {_number(x)}</title>",
        )
        for x, y in series.points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in pixels)
    parts = [f'<polyline class="{series.role}" points="{line}"/>']
    if series.role == "main" and len(pixels) <= 30:
        parts += [f'<circle class="main" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>' for x, y, title in pixels]
    return "".join(parts)


def _drawable(points: Sequence[tuple[float, float]], log_y: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS of them, evenly spread, with the first and the last."""
    if len(points) <= MAX_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _scale_y(value: float, log_y: bool) -> float:
    return math.log10(value) if log_y else value


def _y_ticks(y_range: tuple[float, float], log_y: bool) -> list[float]:
    if not log_y:
        return nice_ticks(*y_range)
    decades = range(math.floor(y_range[0]), math.ceil(y_range[1]) + 1)
    ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    return [tick for tick in ticks if y_range[0] <= math.log10(tick) <= y_range[1]]


def _padded(low: float, high: float, part: float) -> tuple[float, float]:
    if low == high:
        return low - (abs(low) * 0.05 or 1.0), high + (abs(high) * 0.05 or 1.0)
    return low - (high - low) * part, high + (high - low) * part


def _to_pixel(value: float, value_range: tuple[float, float], start: float, end: float) -> float:
    low, high = value_range
    return start + (value - low) / (high - low) * (end - start)


def _number(value: float, digits: int = 4) -> str:
    if abs(value) >= 10_000 and value == int(value):
        return f"{value / 1000:g}k"
    return f"{value:.{digits}g}"
