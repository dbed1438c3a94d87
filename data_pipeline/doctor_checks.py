"""Findings of the dataset doctor, and its verdicts on pairs: identical, turned, shifted, mis-paired, swapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_pipeline.doctor_measures import Measurement

Severity = Literal["error", "warning", "note"]

FLAT = 2.0  # gray levels: a target with less structure is not judged by what it shows
DARK = 0.25  # the same for inputs, which may be much darker
TURN_GAIN, TURN_REST = 0.05, 0.25  # a turn raises the correlation by this, and leaves at most this part of the misfit
# An offset taken back raises the correlation by this, to this, and leaves at most this part of the misfit.
SHIFT_GAIN, MIN_ALIGNED, SHIFT_REST = 0.005, 0.5, 0.7
RELATED = 0.3  # correlation that the median pair must have for others to count as mis-paired
UNRELATED = 0.3  # where the median pair reaches CLEAR, one below this is mis-paired whatever the others look like
CLEAR = 0.8
PART_OF_MEDIAN, OTHER_PART, OTHER_GAIN = 0.5, 0.8, 0.3  # far below the median; another target near it, clearly better
MIN_PAIRS = 8  # fewer do not say what is usual
USUAL = 0.9  # part of the pairs that must agree on what the degradation does
CLEARLY = 0.05, 0.1  # the opposite: by this (in natural logarithms), and by this part of the median
BLOCK = 4096


@dataclass(frozen=True)
class Kind:
    """A kind of finding: how bad it is, its name in a headline, and what it means for training."""

    severity: Severity
    title: str
    meaning: str


KINDS: dict[str, Kind] = {
    "shard": Kind("error", "Broken shards", "A shard or its index is missing, or not the one the manifest names."),
    "hash": Kind("error", "Altered shards", "The sha256 of the file is not that of the manifest: fetch it again."),
    "key": Kind("error", "Repeated keys", "A key must name one sample of the dataset."),
    "unreadable": Kind("error", "Unreadable samples", "Training would replace them; pack again from sound files."),
    "altered": Kind("error", "Altered samples", "Their bytes are not those that were packed: fetch the shard again."),
    "leak": Kind("error", "Leaks", "The same picture is in both datasets: scores on one are no test of the other."),
    "identical": Kind("warning", "Inputs equal to their targets", "They teach the model to leave an image as it is."),
    "turned": Kind("warning", "Mirrored or rotated inputs", "The input fits its target much better after a turn."),
    "shifted": Kind("warning", "Shifted inputs", "The input fits its target clearly better when it is moved."),
    "mis-paired": Kind("warning", "Mis-paired", "Input and target hardly show the same, unlike the other pairs."),
    "swapped": Kind(
        "warning", "Input and target swapped", "The pair does the opposite of what nearly all pairs of the dataset do."
    ),
    "duplicate": Kind("warning", "Duplicates", "The same pixels several times: these count more than the others."),
    "near-duplicate": Kind("warning", "Near-duplicates", "Targets that show nearly the same picture."),
    "shared target": Kind("note", "Targets with several inputs", "One target, degraded in different ways."),
    "partial": Kind("note", "Not everything was looked at", "A full run rules out what this one cannot."),
}


@dataclass(frozen=True)
class Finding:
    """Something the doctor found. kind: one of KINDS; keys: images of the dataset it is about; text: one line that says
    what; other_keys: images of the dataset compared with; companion: a key of this dataset to show beside."""

    kind: str
    keys: tuple[str, ...]
    text: str
    other_keys: tuple[str, ...] = ()
    companion: str = ""

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind].severity

    @property
    def line(self) -> str:
        """The text, with the key it is about where the text does not name it."""
        is_named = not self.keys or self.keys[0] in self.text
        return self.text if is_named else f"{self.keys[0]}: {self.text}"


def suspicious_pairs(measurements: Sequence[Measurement]) -> list[Finding]:
    """Pairs that are not what they should be, at most one finding for each, in the order given.

    identical: all pixels agree. turned: mirroring or rotating the input raises the correlation of the thumbnails by
    TURN_GAIN and leaves at most TURN_REST of the misfit. shifted: taking back an offset raises the correlation of
    their middle frequencies by SHIFT_GAIN, to at least MIN_ALIGNED, and leaves at most SHIFT_REST of the misfit.
    mis-paired, swapped: see find_mispaired, find_swapped. Images with hardly any structure (FLAT, DARK) are judged for
    identity and swapping alone.
    """
    pairs = [m for m in measurements if m.fit is not None and m.input is not None]
    found: dict[str, Finding] = {}
    for m in pairs:
        finding = _identical(m) or (_turned(m) or _shifted(m) if has_structure(m) else None)
        if finding is not None:
            found[m.key] = finding
    for judge in (find_mispaired, find_swapped):
        for finding in judge([m for m in pairs if m.key not in found]):
            found[finding.keys[0]] = finding
    return [found[m.key] for m in pairs if m.key in found]


def has_structure(m: Measurement) -> bool:
    """Whether there is enough to see in both images of a pair to say how they lie on each other."""
    return m.input is not None and m.target.contrast >= FLAT and m.input.contrast >= DARK


def _identical(m: Measurement) -> Finding | None:
    assert m.input is not None
    if m.input.digest != m.target.digest:
        return None
    return Finding("identical", (m.key,), "the input has the target's pixels")


def _turned(m: Measurement) -> Finding | None:
    assert m.fit is not None
    plain, turned = m.fit.correlation, m.fit.turned
    if turned < plain + TURN_GAIN or 1.0 - turned > TURN_REST * (1.0 - plain):
        return None
    return Finding("turned", (m.key,), f"the input is {m.fit.turn}: correlation {turned:.2f} instead of {plain:.2f}")


def _shifted(m: Measurement) -> Finding | None:
    assert m.fit is not None
    before, after = m.fit.unaligned, m.fit.aligned
    if after < MIN_ALIGNED or after < before + SHIFT_GAIN or 1.0 - after > SHIFT_REST * (1.0 - before):
        return None
    rows, columns = m.fit.offset
    parts = [f"{abs(rows)} px {'down' if rows > 0 else 'up'}"] * (rows != 0)
    parts += [f"{abs(columns)} px {'to the right' if columns > 0 else 'to the left'}"] * (columns != 0)
    text = (
        f"the input lies {' and '.join(parts)}: moved back, its detail correlates {after:.3f} instead of {before:.3f}"
    )
    return Finding("shifted", (m.key,), text)


def find_mispaired(pairs: Sequence[Measurement]) -> list[Finding]:
    """Pairs whose thumbnails correlate below PART_OF_MEDIAN of the median pair, while another target fits the input
    nearly as well as is usual; or hardly at all, where pairs usually fit well."""
    judged = [m for m in pairs if has_structure(m)]
    if len(judged) < 2:
        return []
    correlations = [m.fit.correlation for m in judged if m.fit is not None]
    median = float(np.median(correlations))
    if median < RELATED:
        return []
    suspects = [(m, r) for m, r in zip(judged, correlations, strict=True) if r < PART_OF_MEDIAN * median]
    if not suspects:
        return []
    best, where = _best_targets([m for m, _ in suspects], judged)
    findings = []
    for (m, own), other, at in zip(suspects, best.tolist(), where.tolist(), strict=True):
        if other >= OTHER_PART * median and other >= own + OTHER_GAIN:
            key = judged[at].key
            text = f"the input shows what the target of {key} shows: correlation {other:.2f}, {own:.2f} with its own"
            findings.append(Finding("mis-paired", (m.key,), text, companion=key))
        elif median >= CLEAR and own < UNRELATED:
            text = f"correlation {own:.2f}, the median pair has {median:.2f}; no other target looked at fits better"
            findings.append(Finding("mis-paired", (m.key,), text))
    return findings


def _best_targets(suspects: Sequence[Measurement], judged: Sequence[Measurement]) -> tuple[np.ndarray, np.ndarray]:
    """For each suspect's input the best correlation with a target of `judged`, and which.   -> (n,) float, (n,) int"""
    inputs = normalized([m.input.structure for m in suspects if m.input is not None])
    best, where = np.full(len(suspects), -1.0), np.zeros(len(suspects), np.int64)
    for start in range(0, len(judged), BLOCK):
        targets = normalized([m.target.structure for m in judged[start : start + BLOCK]])
        for first in range(0, len(suspects), BLOCK):
            rows = slice(first, first + BLOCK)
            likeness = inputs[rows] @ targets.T
            at = likeness.argmax(axis=1)
            value = likeness[np.arange(len(at)), at]
            is_better = value > best[rows]
            best[rows] = np.where(is_better, value, best[rows])
            where[rows] = np.where(is_better, start + at, where[rows])
    return best, where


def normalized(structures: Sequence[np.ndarray]) -> np.ndarray:
    """Structures as rows of length 1: their products are correlations.   n x (T*T,) int8  ->  (n, T*T) float32"""
    rows = np.stack(structures).astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def find_swapped(pairs: Sequence[Measurement]) -> list[Finding]:
    """Pairs that get clearly sharper (or darker) from target to input where nearly all get smoother (or brighter).

    What is usual takes MIN_PAIRS pairs of which USUAL agree; clearly the opposite is CLEARLY, in logarithms of the
    ratio of sharpness or brightness. Where both are usual, neither may speak against it.
    """
    if len(pairs) < MIN_PAIRS:
        return []
    changes = np.array([_changes(m) for m in pairs])
    median = np.median(changes, axis=0)
    against = -changes * np.sign(median)
    least = np.maximum(CLEARLY[0], CLEARLY[1] * np.abs(median))
    is_usual = ((against < 0.0).mean(axis=0) >= USUAL) & (np.abs(median) >= least)
    votes = np.where(is_usual, (against >= least).astype(int) - (against < 0.0), 0)
    findings = []
    for m, row, vote in zip(pairs, changes, votes, strict=True):
        if vote.max() > 0 and vote.min() >= 0:
            column = int(vote.argmax())
            name = ("sharpness", "brightness")[column]
            ratio, usual = np.exp(row[column]), np.exp(median[column])
            text = f"{name} of input to target is {ratio:.2f}, of the median pair {usual:.2f}"
            findings.append(Finding("swapped", (m.key,), text))
    return findings


def _changes(m: Measurement) -> tuple[float, float]:
    """Natural logarithms of sharpness and brightness of the input relative to the target."""
    assert m.input is not None and m.facts.pair is not None
    return (
        float(np.log((m.input.sharpness + 0.1) / (m.target.sharpness + 0.1))),
        float(np.log((m.facts.pair.input_brightness + 1.0) / (m.facts.brightness + 1.0))),
    )
