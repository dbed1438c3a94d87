"""The same picture twice, within a dataset or in two: exact by digest, nearly by perceptual hashes in buckets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.doctor_checks import BLOCK, FLAT, Finding, normalized
from data_pipeline.doctor_measures import THUMBNAIL, Look, Measurement

MAX_DISTANCE = 7  # bits of 64; unrelated photographs differ in 9 and more
SAME_PICTURE = 0.9  # correlation of the structures that confirms a near-duplicate; unrelated photographs stay below 0.7
BANDS = MAX_DISTANCE + 1  # hashes that differ in fewer bits than there are bands agree in one of these
BAND_BITS = 64 // BANDS
MAX_BLOCK = 1 << 22  # distances held at a time
SHOWN = 4


def find_duplicates(measurements: Sequence[Measurement]) -> list[Finding]:
    """Images of a dataset that have the same target pixels, or nearly show the same picture.

    One finding for a group: duplicate where inputs agree too (or there are none), shared target where one target has
    several inputs, near-duplicate for targets of which each is close to another of the group.
    """
    groups: dict[bytes, list[Measurement]] = {}
    for m in measurements:
        groups.setdefault(m.target.digest, []).append(m)
    findings = []
    for members in groups.values():
        by_input: dict[bytes, list[str]] = {}
        for m in members:
            by_input.setdefault(b"" if m.input is None else m.input.digest, []).append(m.key)
        for keys in by_input.values():
            if len(keys) > 1:
                findings.append(Finding("duplicate", tuple(keys), f"{_listed(keys)} have the same pixels"))
        if len(by_input) > 1:
            keys = [m.key for m in members]
            findings.append(Finding("shared target", tuple(keys), f"{_listed(keys)} have one target"))
    first = [members[0] for members in groups.values()]
    for group in connected(len(first), near_copies([m.target for m in first], None)):
        keys = [first[i].key for i in group]
        findings.append(Finding("near-duplicate", tuple(keys), f"{_listed(keys)} show nearly the same"))
    return findings


def find_leaks(measurements: Sequence[Measurement], others: Sequence[Measurement], *, other_uri: str) -> list[Finding]:
    """Images whose target is also a target of another dataset: the same pixels, nearly the same, or its mirror image.

    One finding for an image of `measurements`, with all images of `others` that show the same.
    """
    first_of: dict[bytes, list[int]] = {}
    for index, m in enumerate(others):
        first_of.setdefault(m.target.digest, []).append(index)
    hits: dict[int, dict[int, str]] = {}
    for index, m in enumerate(measurements):
        for other in first_of.get(m.target.digest, ()):
            hits.setdefault(index, {})[other] = "has the pixels of"
    mine, theirs = [m.target for m in measurements], [m.target for m in others]
    for words, is_mirrored in (("nearly shows the picture of", False), ("shows the mirror image of", True)):
        for index, other in near_copies(mine, theirs, is_mirrored=is_mirrored).tolist():
            hits.setdefault(index, {}).setdefault(other, words)
    findings = []
    for index in sorted(hits):
        keys = [others[other].key for other in sorted(hits[index])]
        words = next(iter(hits[index].values()))
        text = f"{measurements[index].key} {words} {_listed(keys)} in {other_uri}"
        findings.append(Finding("leak", (measurements[index].key,), text, other_keys=tuple(keys)))
    return findings


def near_copies(looks: Sequence[Look], others: Sequence[Look] | None, *, is_mirrored: bool = False) -> np.ndarray:
    """Pairs of images that nearly show the same.   -> (k, 2) int64, sorted: an index of `looks`, one of `others`

    others: None compares `looks` with each other, the smaller index first. is_mirrored: compare the mirror images of
    `looks`. Either hash may propose a pair, by MAX_DISTANCE bits at most; SAME_PICTURE confirms it. Images with hardly
    any structure (FLAT) are left out: all of them look alike.
    """
    mine = [i for i, look in enumerate(looks) if look.contrast >= FLAT]
    theirs = mine if others is None else [i for i, look in enumerate(others) if look.contrast >= FLAT]
    references = looks if others is None else others
    proposals = [
        near_hashes(
            _hashes([looks[i] for i in mine], name_of_query),
            _hashes([references[i] for i in theirs], name),
            is_self=others is None,
        )
        for name, name_of_query in (
            ("dct_hash", "mirrored_dct_hash" if is_mirrored else "dct_hash"),
            ("gradient_hash", "mirrored_gradient_hash" if is_mirrored else "gradient_hash"),
        )
    ]
    pairs = np.unique(np.concatenate(proposals), axis=0)
    pairs = np.stack([np.array(mine, np.int64)[pairs[:, 0]], np.array(theirs, np.int64)[pairs[:, 1]]], axis=1)
    turn = _mirror if is_mirrored else _as_it_is
    is_same = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), BLOCK):
        block = pairs[start : start + BLOCK]
        left = normalized([turn(looks[i].structure) for i in block[:, 0]])
        right = normalized([references[i].structure for i in block[:, 1]])
        is_same[start : start + BLOCK] = (left * right).sum(axis=1) >= SAME_PICTURE
    return pairs[is_same]


def near_hashes(queries: np.ndarray, references: np.ndarray, *, is_self: bool = False) -> np.ndarray:
    """Pairs of hashes at most MAX_DISTANCE bits apart.   queries: (n,) uint64; references: (m,) uint64
    ->  (k, 2) int64, sorted: a row of `queries`, a row of `references`; is_self: only pairs with the first below the
    second.

    Two such hashes agree in one of BANDS bands at least, so only those of one bucket of a band are compared.
    """
    found = [np.zeros((0, 2), np.int64)]
    values = np.arange((1 << BAND_BITS) + 1)
    for band in range(BANDS):
        sides = []
        for hashes in (queries, references):
            part = (hashes >> np.uint64(band * BAND_BITS)) & np.uint64((1 << BAND_BITS) - 1)
            order = np.argsort(part, kind="stable")
            sides.append((order, np.searchsorted(part[order], values.astype(np.uint64))))
        (mine, my_starts), (theirs, their_starts) = sides
        for value in values[:-1]:
            rows = mine[my_starts[value] : my_starts[value + 1]]
            columns = theirs[their_starts[value] : their_starts[value + 1]]
            found += _close(queries, references, rows, columns, is_self=is_self)
    return np.unique(np.concatenate(found), axis=0)


def _close(
    queries: np.ndarray, references: np.ndarray, rows: np.ndarray, columns: np.ndarray, *, is_self: bool
) -> list[np.ndarray]:
    """The close pairs of one bucket, a bounded block of distances at a time."""
    if not len(rows) or not len(columns):
        return []
    found = []
    height = max(1, MAX_BLOCK // len(columns))
    for start in range(0, len(rows), height):
        block = rows[start : start + height]
        distances = np.bitwise_count(queries[block][:, None] ^ references[columns][None])
        hits = np.argwhere(distances <= MAX_DISTANCE)
        pairs = np.stack([block[hits[:, 0]], columns[hits[:, 1]]], axis=1)
        found.append(pairs[pairs[:, 0] < pairs[:, 1]] if is_self else pairs)
    return found


def connected(count: int, pairs: np.ndarray) -> list[list[int]]:
    """Groups of 0..count-1 that the pairs join, each of two and more, ascending.   pairs: (k, 2) integers"""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in pairs.tolist():
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for node in range(count):
        groups.setdefault(root(node), []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _hashes(looks: Sequence[Look], name: str) -> np.ndarray:
    """(n,) uint64"""
    return np.array([getattr(look, name) for look in looks], dtype=np.uint64)


def _mirror(structure: np.ndarray) -> np.ndarray:
    """(T*T,) -> (T*T,), of the mirror image"""
    return structure.reshape(THUMBNAIL, THUMBNAIL)[:, ::-1].ravel()


def _as_it_is(structure: np.ndarray) -> np.ndarray:
    return structure


def _listed(keys: Sequence[str]) -> str:
    """The first few keys, for a line."""
    if len(keys) > SHOWN:
        return f"{', '.join(keys[:SHOWN])} and {len(keys) - SHOWN} more"
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
