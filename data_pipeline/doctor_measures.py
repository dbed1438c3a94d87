"""What the dataset doctor measures on one image or pair: fingerprints, likeness under turns, alignment, sharpness."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from data_pipeline.records import Sample
from data_pipeline.statistics import SampleFacts, sample_facts

THUMBNAIL = 32  # pixels a side of what images are compared by
SMOOTH = 3  # the lowest SMOOTH x SMOOTH frequencies of a thumbnail say little about what it shows
ALIGN_SIDE = 256  # pixels a side, at most, of the window in which an offset is looked for
MIN_ALIGN_SIDE = 32
EDGE = 16  # pixels that the band pass reaches over an edge
WHITENING = 0.7  # 1 counts phases alone, where noise weighs as much as edges; 0 is plain correlation
HIGH_PASS, LOW_PASS = 0.03, 0.2  # cycles per pixel: between shading and noise lies what an offset is seen by

# How a square image can lie; the first two turns of a mirrored image keep the shape of any.
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mirrored left to right": lambda x: x[:, ::-1],
    "mirrored top to bottom": lambda x: x[::-1],
    "rotated by 180 degrees": lambda x: x[::-1, ::-1],
    "rotated by 90 degrees clockwise": lambda x: np.rot90(x),
    "rotated by 90 degrees counter-clockwise": lambda x: np.rot90(x, 3),
    "mirrored along a diagonal": lambda x: x.T,
    "mirrored along the other diagonal": lambda x: x[::-1, ::-1].T,
}
TURNS_OF_ANY_SHAPE = 3


@dataclass(frozen=True, eq=False)
class Look:
    """An image as it is compared with others.

    digest: of shape and pixels; dct_hash, gradient_hash: 64 bits each, of the image and (mirrored_*) of its mirror
    image; structure: (THUMBNAIL**2,) int8, the thumbnail without its smooth part, scaled to length ~1024 (zeros for a
    flat image); contrast: standard deviation of that structure in gray levels; sharpness: mean absolute Laplacian of
    the luma in gray levels.
    """

    digest: bytes
    dct_hash: int
    gradient_hash: int
    mirrored_dct_hash: int
    mirrored_gradient_hash: int
    structure: np.ndarray
    contrast: float
    sharpness: float


@dataclass(frozen=True)
class Fit:
    """How well an input lies on its target; correlations are in -1..1.

    correlation: of the structures of both; turn: the turn of the input under which it is best, turned: what it is then;
    offset: (rows, columns) by which the input is moved against the target as phase correlation has it; aligned and
    unaligned: correlation of their middle frequencies with and without that offset taken back. (0, 0) and equal
    correlations where no offset was found.
    """

    correlation: float
    turn: str
    turned: float
    offset: tuple[int, int]
    aligned: float
    unaligned: float


@dataclass(frozen=True, eq=False)
class Measurement:
    """All that is kept of an image of the dataset; input and fit are None where the dataset has no inputs."""

    key: str
    facts: SampleFacts
    target: Look
    input: Look | None = None
    fit: Fit | None = None


def measure(sample: Sample, *, num_bytes: int) -> Measurement:
    """Measure a decoded sample; num_bytes: what its images take encoded."""
    facts, target_luma = sample_facts(sample, num_bytes=num_bytes), luma(sample.target)
    target = look(sample.target, target_luma)
    if sample.input is None:
        return Measurement(sample.key, facts, target)
    input_luma = luma(sample.input)
    degraded = look(sample.input, input_luma)
    return Measurement(sample.key, facts, target, degraded, fit(degraded, target, input_luma, target_luma))


def luma(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8  ->  (H, W) uint8 BT.601 luma"""
    return np.asarray(Image.fromarray(image).convert("L"))


def look(image: np.ndarray, gray: np.ndarray) -> Look:
    """An image as it is compared.   image: (H, W, 3) uint8; gray: (H, W) uint8, its luma"""
    small = thumbnail(gray)
    details = without_smooth_part(small)
    contrast = float(details.std())
    scale = 1024.0 / (contrast * THUMBNAIL) if contrast > 1e-3 else 0.0
    return Look(
        digest=hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16, salt=_salt(image)).digest(),
        dct_hash=dct_hash(small),
        gradient_hash=gradient_hash(small),
        mirrored_dct_hash=dct_hash(small[:, ::-1]),
        mirrored_gradient_hash=gradient_hash(small[:, ::-1]),
        structure=np.clip(np.rint(details * scale), -127, 127).astype(np.int8).ravel(),
        contrast=contrast,
        sharpness=sharpness(gray),
    )


def _salt(image: np.ndarray) -> bytes:
    return image.shape[0].to_bytes(4, "little") + image.shape[1].to_bytes(4, "little")


def thumbnail(gray: np.ndarray) -> np.ndarray:
    """(H, W) uint8  ->  (THUMBNAIL, THUMBNAIL) float32 gray levels, the means of equal parts of the image"""
    picture = Image.fromarray(gray).convert("F")  # means keep their fractions: a dark image has little else
    return np.asarray(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def without_smooth_part(small: np.ndarray) -> np.ndarray:
    """A thumbnail without mean, slopes and bows, which most photographs share.   (T, T) float32  ->  the same"""
    basis = _cosines()
    frequencies = basis @ small @ basis.T
    frequencies[:SMOOTH, :SMOOTH] = 0.0
    return basis.T @ frequencies @ basis


def dct_hash(small: np.ndarray) -> int:
    """64 bits: signs of the 8 x 8 lowest frequencies that vary in both directions.   small: (T, T) float32"""
    basis = _cosines()[1:9]
    return _pack_bits(basis @ small @ basis.T > 0.0)


def gradient_hash(small: np.ndarray) -> int:
    """64 bits: whether the image gets brighter from each cell of an 8 x 9 grid to its right neighbour."""
    picture = Image.fromarray(np.ascontiguousarray(small))
    cells = np.asarray(picture.resize((9, 8), Image.Resampling.BOX))
    return _pack_bits(cells[:, 1:] > cells[:, :-1])


def _pack_bits(bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@cache
def _cosines() -> np.ndarray:
    """(T, T) float32: the orthonormal DCT-II, a row for each frequency."""
    steps = np.arange(THUMBNAIL)
    basis = np.cos(math.pi / THUMBNAIL * steps[:, None] * (steps[None] + 0.5)) * math.sqrt(2.0 / THUMBNAIL)
    basis[0] /= math.sqrt(2.0)
    return basis.astype(np.float32)


def sharpness(gray: np.ndarray) -> float:
    """Mean absolute Laplacian in gray levels: fine detail and noise raise it, blur lowers it.   gray: (H, W) uint8"""
    if min(gray.shape) < 3:
        return 0.0
    x = gray.astype(np.int16)
    laplacian = 4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]
    return float(np.abs(laplacian).mean())


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation of two arrays of one shape; 0 when one of them is constant."""
    x, y = x - x.mean(dtype=np.float64), y - y.mean(dtype=np.float64)
    norm = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / norm if norm else 0.0


def fit(degraded: Look, target: Look, input_luma: np.ndarray, target_luma: np.ndarray) -> Fit:
    """How well an input lies on its target.   input_luma, target_luma: (H, W) uint8"""
    mine = degraded.structure.reshape(THUMBNAIL, THUMBNAIL)
    other = target.structure.reshape(THUMBNAIL, THUMBNAIL)
    height, width = target_luma.shape
    names = list(TURNS)[: None if height == width else TURNS_OF_ANY_SHAPE]
    turned = {name: correlation(TURNS[name](mine), other) for name in names}
    best = max(names, key=lambda name: turned[name])
    offset, aligned, unaligned = alignment(input_luma, target_luma)
    return Fit(correlation(mine, other), best, turned[best], offset, aligned, unaligned)


def alignment(input_luma: np.ndarray, target_luma: np.ndarray) -> tuple[tuple[int, int], float, float]:
    """The offset of an input against its target in whole pixels, by phase correlation in their busiest window.

    input_luma, target_luma: (H, W) uint8  ->  (rows, columns), correlation with the offset taken back, correlation
    without. Offsets reach up to a quarter of the window's side. Images below MIN_ALIGN_SIDE are not judged: (0, 0).
    """
    height, width = target_luma.shape
    if min(height, width) < MIN_ALIGN_SIDE:
        return (0, 0), 0.0, 0.0
    part = _busiest(target_luma)
    x, y = (gray[part].astype(np.float32) for gray in (input_luma, target_luma))
    band = _band(*x.shape)
    taper = np.outer(np.hanning(x.shape[0]), np.hanning(x.shape[1])).astype(np.float32)
    cross = np.fft.rfft2((x - x.mean()) * taper) * np.conj(np.fft.rfft2((y - y.mean()) * taper))
    cross /= np.maximum(np.abs(cross), 1e-6) ** WHITENING
    surface = np.fft.irfft2(cross * band, s=x.shape)
    rows, columns = (_nearest_offsets(side) for side in x.shape)
    near = surface[np.ix_(rows, columns)]
    row, column = np.unravel_index(int(near.argmax()), near.shape)
    offset = int(rows[row]), int(columns[column])
    mine, other = (np.fft.irfft2(np.fft.rfft2(z - z.mean()) * band, s=z.shape) for z in (x, y))
    unaligned = _overlap_correlation(mine, other, (0, 0))
    return offset, unaligned if offset == (0, 0) else _overlap_correlation(mine, other, offset), unaligned


def _busiest(gray: np.ndarray) -> tuple[slice, slice]:
    """The window of at most ALIGN_SIDE a side with the most contrast, of nine evenly spread ones."""
    sides = [min(ALIGN_SIDE, length) for length in gray.shape]
    rooms = [length - side for length, side in zip(gray.shape, sides, strict=True)]
    starts = [sorted({room * i // 2 for i in range(3)}) for room in rooms]
    windows = [(slice(top, top + sides[0]), slice(left, left + sides[1])) for top in starts[0] for left in starts[1]]
    return max(windows, key=lambda window: float(gray[window][::2, ::2].std()))


def _band(height: int, width: int) -> np.ndarray:
    """(height, width // 2 + 1) float32 weights of a band pass, for rfft2."""
    squares = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width)[None] ** 2
    return (np.exp(-squares / LOW_PASS**2) - np.exp(-squares / HIGH_PASS**2)).astype(np.float32)


def _nearest_offsets(side: int) -> np.ndarray:
    """Offsets from -side/4 to side/4; as indexes they address a circular correlation."""
    return np.arange(-(side // 4), side // 4 + 1)


def _overlap_correlation(x: np.ndarray, y: np.ndarray, offset: tuple[int, int]) -> float:
    """Correlation of x, moved back by `offset`, with y where both are known.

    A margin is left out: the band pass takes an image for periodic, so what it makes of the edges is not in the image.
    """
    margins = [min(EDGE, side // 8) for side in x.shape]
    inner = tuple(slice(margin, -margin) for margin in margins)
    x, y = x[inner], y[inner]
    mine = tuple(slice(max(step, 0), side + min(step, 0)) for step, side in zip(offset, x.shape, strict=True))
    other = tuple(slice(max(-step, 0), side + min(-step, 0)) for step, side in zip(offset, x.shape, strict=True))
    return correlation(x[mine], y[other])
