"""The dataset doctor on images and pairs: what it measures, and that it finds what is wrong and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.doctor_checks import Finding, suspicious_pairs
from data_pipeline.doctor_duplicates import (
    MAX_DISTANCE,
    connected,
    find_duplicates,
    find_leaks,
    near_copies,
    near_hashes,
)
from data_pipeline.doctor_measures import TURNS, Measurement, alignment, look, luma, measure
from data_pipeline.records import Sample
from tests.support.datasets import random_image

SIDE = 96
COUNT = 12


def scene(seed: int) -> np.ndarray:
    """Something with edges and shading, different for every seed.   -> (SIDE, SIDE, 3) uint8"""
    coarse = Image.fromarray(random_image(seed, (SIDE // 4, SIDE // 4)))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.float32)
    blocks = random_image(seed + 500, (SIDE, SIDE)).astype(np.float32)
    return np.clip(0.5 * smooth + 0.5 * blocks, 0, 255).astype(np.uint8)


def noisy(image: np.ndarray, seed: int, sigma: float = 12.0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0.0, sigma, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def measured(pairs: Mapping[str, tuple[np.ndarray | None, np.ndarray]]) -> list[Measurement]:
    return [measure(Sample(key, key, *pair, None), num_bytes=1) for key, pair in pairs.items()]


def clean_pairs() -> dict[str, tuple[np.ndarray | None, np.ndarray]]:
    return {f"p{i:02d}": (noisy(scene(i), 100 + i), scene(i)) for i in range(COUNT)}


def kinds(findings: list[Finding]) -> list[str]:
    return [finding.kind for finding in findings]


# --- pairs -------------------------------------------------------------------------------------------------------


def test_sound_pairs_are_not_suspected() -> None:
    assert suspicious_pairs(measured(clean_pairs())) == []


def enlarged(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    """An image in the size of another."""
    return np.asarray(Image.fromarray(image).resize((like.shape[1], like.shape[0]), Image.Resampling.NEAREST))


Fault = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

FAULTS: dict[str, tuple[str, Fault]] = {
    "input is target": ("identical", lambda x, y, other: (y, y)),
    "mirrored": ("turned", lambda x, y, other: (x[:, ::-1], y)),
    "upside down": ("turned", lambda x, y, other: (x[::-1], y)),
    "turned by 180": ("turned", lambda x, y, other: (x[::-1, ::-1], y)),
    "turned by 90": ("turned", lambda x, y, other: (np.rot90(x), y)),
    "turned by 270": ("turned", lambda x, y, other: (np.rot90(x, 3), y)),
    "transposed": ("turned", lambda x, y, other: (x.transpose(1, 0, 2), y)),
    "two pixels off": ("shifted", lambda x, y, other: (np.roll(x, 2, axis=0), y)),
    "off in both": ("shifted", lambda x, y, other: (np.roll(x, (-5, 7), axis=(0, 1)), y)),
    "another picture's input": ("mis-paired", lambda x, y, other: (other, y)),
    "a picture from elsewhere": ("mis-paired", lambda x, y, other: (enlarged(scene(999), y), y)),
    "swapped": ("swapped", lambda x, y, other: (y, x)),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("at", [0, 7])
def test_a_fault_is_found_in_the_pair_that_has_it_and_nowhere_else(name: str, at: int) -> None:
    kind, fault = FAULTS[name]
    pairs = clean_pairs()
    key = f"p{at:02d}"
    other = pairs[f"p{at + 1:02d}"][0]
    degraded, target = pairs[key]
    assert degraded is not None and other is not None
    pairs[key] = fault(degraded, target, other)
    found = suspicious_pairs(measured(pairs))
    assert [(finding.kind, finding.keys) for finding in found] == [(kind, (key,))]
    if name == "another picture's input":
        assert found[0].companion == f"p{at + 1:02d}"


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_photographs_are_found(name: str, polyu: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    kind, fault = FAULTS[name]
    keys = list(polyu)
    pairs: dict[str, tuple[np.ndarray | None, np.ndarray]] = {key: polyu[key] for key in keys[::8]}
    key, other = keys[8], keys[16]
    pairs[key] = fault(*polyu[key], polyu[other][0])
    assert [(found.kind, found.keys) for found in suspicious_pairs(measured(pairs))] == [(kind, (key,))]


def test_real_photographs_raise_no_false_alarm(polyu: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    rows = measured(polyu)
    assert len(rows) == 100
    assert suspicious_pairs(rows) == [] and find_duplicates(rows) == []
    assert find_leaks(rows[::2], rows[1::2], other_uri="other") == []


@pytest.fixture(scope="module")
def polyu() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All pairs of a set of real noisy photographs, by name."""
    root = Path(__file__).resolve().parents[3] / "shared" / "data" / "polyu"
    if not root.is_dir():
        pytest.skip("real images are not there: shared/data/polyu beside the checkout")
    rows = [line.split("\t") for line in (root / "pairs.tsv").read_text().splitlines()[1:]]
    return {
        Path(degraded).stem: (np.asarray(Image.open(root / degraded)), np.asarray(Image.open(root / target)))
        for _, _, degraded, target in rows
    }


def test_pictures_of_nothing_are_not_judged_by_what_they_show() -> None:
    """Noise on even gray: each fits every other as badly as its own, and its mirror image as well."""
    even = np.full((SIDE, SIDE, 3), 128, np.uint8)
    pairs = clean_pairs() | {"even": (noisy(even, 1), even)}
    assert suspicious_pairs(measured(pairs)) == []


def test_where_pairs_disagree_on_the_degradation_none_is_called_swapped() -> None:
    pairs = clean_pairs()
    for key in list(pairs)[::2]:
        pairs[key] = (pairs[key][1], pairs[key][0])  # type: ignore[assignment]
    assert suspicious_pairs(measured(pairs)) == []


def test_the_verdicts_do_not_depend_on_the_order_of_the_pairs() -> None:
    pairs = clean_pairs()
    pairs["p03"] = (pairs["p03"][1], pairs["p03"][0])  # type: ignore[assignment]
    pairs["p05"] = (pairs["p06"][0], pairs["p05"][1])
    rows = measured(pairs)
    forward, backward = suspicious_pairs(rows), suspicious_pairs(rows[::-1])
    assert kinds(forward) == ["swapped", "mis-paired"] and forward == backward[::-1]


@pytest.mark.parametrize("name", TURNS)
def test_the_named_turn_is_the_one_that_was_done(name: str) -> None:
    """Undoing is what TURNS holds: whatever it makes of an image, some turn of the image is that image again."""
    image = scene(1)[:, :, 0]
    done = next(done for done in TURNS.values() if np.array_equal(TURNS[name](done(image)), image))
    degraded = np.stack([done(noisy(image, 3))] * 3, axis=2)
    [row] = measured({"a": (degraded, scene(1)[:, :, :1].repeat(3, axis=2))})
    assert row.fit is not None and row.fit.turn == name


def test_the_direction_of_a_turn_is_said_as_seen() -> None:
    clockwise = np.asarray(
        Image.fromarray(scene(1)).transpose(Image.Transpose.ROTATE_270)
    )  # Pillow counts the other way
    pairs = clean_pairs() | {"turned": (clockwise, scene(1))}
    [finding] = suspicious_pairs(measured(pairs))
    assert "rotated by 90 degrees clockwise" in finding.text


@pytest.mark.parametrize("offset", [(0, 0), (0, 1), (1, 0), (-2, 3), (10, -11), (-17, -17)])
def test_an_offset_comes_back_with_its_sign(offset: tuple[int, int]) -> None:
    """The input shows the scene moved by `offset` (rows, columns): down and to the right are positive."""
    wide = np.kron(np.random.default_rng(0).integers(0, 256, (40, 40)), np.ones((4, 4))).astype(np.uint8)
    target = wide[20:120, 20:120]
    degraded = wide[20 - offset[0] : 120 - offset[0], 20 - offset[1] : 120 - offset[1]]
    found, aligned, unaligned = alignment(noisy(degraded, 1), target)
    assert found == offset
    assert aligned > 0.9 and (aligned > unaligned + 0.02 or offset == (0, 0))


def test_images_too_small_to_align_are_left_alone() -> None:
    assert alignment(scene(1)[:31, :, 0], scene(2)[:31, :, 0]) == ((0, 0), 0.0, 0.0)


# --- duplicates --------------------------------------------------------------------------------------------------


def test_near_hashes_are_those_that_comparing_all_with_all_finds() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 1 << 63, 60, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, size, replace=False)) for size in range(15) for _ in range(8)]
    hashes = np.concatenate([base, base[rng.integers(0, 60, len(flips))] ^ np.array(flips, np.uint64)])
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    close = np.argwhere(distances <= MAX_DISTANCE)
    assert {MAX_DISTANCE, MAX_DISTANCE + 1} <= set(distances.ravel().tolist())
    assert np.array_equal(near_hashes(hashes, hashes), close)
    assert np.array_equal(near_hashes(hashes, hashes, is_self=True), close[close[:, 0] < close[:, 1]])
    assert near_hashes(hashes[:0], hashes).shape == (0, 2)


def test_connected_groups() -> None:
    pairs = np.array([[5, 1], [2, 3], [1, 4], [3, 2]])
    assert connected(7, pairs) == [[1, 4, 5], [2, 3]]
    assert connected(3, np.zeros((0, 2), np.int64)) == []


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "compressed": lambda x: as_jpeg(x, 40),
    "brighter": lambda x: np.clip(x * 1.1 + 8.0, 0, 255).astype(np.uint8),
    "noisy": lambda x: noisy(x, 5, sigma=20.0),
    "smaller": lambda x: np.asarray(Image.fromarray(x).resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS)),
    "gray": lambda x: np.stack([luma(x)] * 3, axis=2),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_copy_is_a_near_duplicate(name: str) -> None:
    images = {f"p{i}": (None, scene(i)) for i in range(20)} | {"copy": (None, EDITS[name](scene(4)))}
    [finding] = find_duplicates(measured(images))
    assert (finding.kind, finding.keys) == ("near-duplicate", ("p4", "copy"))


def test_same_pixels_are_told_apart_by_their_inputs() -> None:
    degraded = [noisy(scene(i), i) for i in range(3)]
    images = {
        "a": (degraded[0], scene(0)),
        "again": (degraded[0], scene(0)),
        "b": (degraded[1], scene(1)),
        "other": (noisy(scene(1), 77), scene(1)),
        "c": (degraded[2], scene(2)),
    }
    found = [(finding.kind, finding.keys) for finding in find_duplicates(measured(images))]
    assert found == [("duplicate", ("a", "again")), ("shared target", ("b", "other"))]


def test_flat_images_are_no_near_duplicates_of_each_other() -> None:
    flat = [look(image, luma(image)) for level in (0, 90, 91, 255) for image in [np.full((40, 40, 3), level, np.uint8)]]
    assert len(near_copies(flat, None)) == 0
    ramp = np.tile(np.linspace(90, 91, 40), (40, 1))[:, :, None].repeat(3, axis=2).astype(np.uint8)
    assert len(near_copies([*flat, look(ramp, luma(ramp))], flat)) == 0


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda x: x, "has the pixels of"),
        (lambda x: x[:, ::-1], "shows the mirror image of"),
        (lambda x: as_jpeg(x, 50), "nearly shows the picture of"),
        (lambda x: as_jpeg(x[:, ::-1], 50), "shows the mirror image of"),
    ],
)
def test_a_picture_of_the_other_dataset_is_a_leak(edit: Callable[[np.ndarray], np.ndarray], said: str) -> None:
    mine = measured({f"t{i}": (None, scene(i)) for i in range(10)} | {"leaked": (None, edit(scene(104)))})
    theirs = measured({f"p{i}": (None, scene(100 + i)) for i in range(10)})
    [finding] = find_leaks(mine, theirs, other_uri="train")
    assert (finding.kind, finding.keys, finding.other_keys) == ("leak", ("leaked",), ("p4",))
    assert finding.severity == "error" and f"leaked {said} p4 in train" in finding.text
