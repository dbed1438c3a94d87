"""Numbers, intervals and protocols as people read them: what the parts of a page share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PLUS_MINUS, MINUS, TIMES = "\u00b1", "\u2212", "\u00d7"
REGIONS = ("_non_shadow", "_shadow")


def decimals(value: Any, digits: int) -> str:
    """A number, or what float() reads, as text with `digits` decimals; "-" for None."""
    return "-" if value is None else f"{float(value):.{digits}f}"


def half_width(score: Mapping[str, Any], digits: int) -> str:
    """Half of the interval of a score as "+-0.45" with the sign in one character; "" where there is no interval."""
    if score.get("low") is None or score.get("high") is None:
        return ""
    return f"{PLUS_MINUS}{(float(score['high']) - float(score['low'])) / 2:.{digits}f}"


def interval(score: Mapping[str, Any], digits: int) -> str:
    """The interval of a score as "31.20 to 32.10"; "" where there is none."""
    if score.get("low") is None or score.get("high") is None:
        return ""
    return f"{decimals(score['low'], digits)} to {decimals(score['high'], digits)}"


def in_order(scores: Mapping[str, Any]) -> list[str]:
    """The names of all scores as they are shown: each followed by that of the input, the gain behind the PSNR."""
    ordered = []
    for name in scores:
        if name == "gain_db" or (name.startswith("input_") and name[len("input_") :] in scores):
            continue
        after = [f"input_{name}", *(["gain_db"] if name == "psnr" else [])]
        ordered += [name, *(other for other in after if other in scores)]
    return ordered + [name for name in scores if name not in ordered]


def has_region(name: str) -> bool:
    """Whether the score is over a part of each image only."""
    return name.endswith(REGIONS)


def row_score(row: Mapping[str, Any], name: str) -> float | None:
    """The score of one image; the gain is computed where the row does not hold it. None where it has none."""
    if name in row:
        value = row[name]
    elif name == "gain_db" and "psnr" in row and "input_psnr" in row:
        value = float(row["psnr"]) - float(row["input_psnr"])
    else:
        value = None
    return None if value is None else float(value)


def finite_scores(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The finite values of a score over the images that have it."""
    found = (row_score(row, name) for row in rows)
    return [value for value in found if value is not None and math.isfinite(value)]


def exceptions(report: Mapping[str, Any]) -> list[str]:
    """What the mean PSNR does not hold, in words: images restored exactly, failed, or without a number."""
    score = report["scores"].get("psnr", {})
    parts = []
    if score.get("infinite"):
        parts.append(f"{score['infinite']} restored exactly (PSNR inf)")
    if score.get("nan"):
        parts.append(f"{score['nan']} without a PSNR (nan)")
    kinds = Counter(str(failure.get("kind", "failed")) for failure in report.get("failed", ()))
    return parts + [f"{count} {kind}" for kind, count in sorted(kinds.items())]


def protocol_words(protocol: Mapping[str, Any]) -> str:
    """The name of a protocol and what it is, in one line; whose images were resized before it says so."""
    summary, size = str(protocol.get("summary", "")), str(protocol.get("size", "native"))
    if "native" in summary and size != "native":
        summary += f"; here {size}"
    return f"protocol {protocol['name']}{': ' if summary else ''}{summary}"


def flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of everything in nested mappings; lists are joined, what is empty is left out."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            if value:
                yield f"{prefix}{key}", ", ".join(str(item) for item in value)
        elif value is not None and value != "":
            yield f"{prefix}{key}", str(value)
