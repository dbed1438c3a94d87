"""Pairs of images to measure with: cut from photographs where there are some, else synthetic."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.degradations import parse_degradation
from data_pipeline.errors import EnvironmentFault
from data_pipeline.sources import Pair, find_pairs, scan_images
from data_pipeline.threads import map_ordered
from rddm_dist.cli.demo_photos import write_demo_pairs

SEED = 0
DEGRADATION = "noise(sigma=10)"
SAVE_OPTIONS: dict[str, dict[str, Any]] = {"jpg": {"quality": 95}, "png": {}}


@dataclass(frozen=True)
class Photos:
    """Pictures to cut from: what they are, in words, and their files; without files pictures are made up."""

    what: str
    files: tuple[Path, ...]


def find_photos(folder: Path | None, scratch: Path, *, flag: str = "--photos") -> Photos:
    """The pictures in `folder`, else the photographs of `rddm demo` (written into `scratch`), else none.

    Raises DataError for a folder without images, which `flag` gave.
    """
    if folder is not None:
        files = tuple(scan_images(folder, flag=flag).values())
        return Photos(f"{len(files)} images of {folder}", files)
    try:
        splits = write_demo_pairs(scratch).values()
    except EnvironmentFault:
        return Photos("synthetic images", ())
    files = tuple(pair.target for split in splits for pair in find_pairs(split / "input", split / "target"))
    return Photos(f"{len(files)} photographs of scikit-image", files)


def write_pairs(folder: Path, photos: Photos, *, extension: str, size: tuple[int, int], count: int) -> list[Pair]:
    """Write `count` pairs as PNG or JPEG (quality 95): a cut of a picture, and the same with noise of sigma 10 on it.

    size: (H, W) of each; the pictures come in turn. What is at least twice as large is reduced before it is cut, what
    is smaller is continued by mirror images, so that no pixel is interpolated larger. The same arguments give the same
    pixels.
    """
    draw = np.random.default_rng(SEED)
    pictures = [_load(path, size) for path in photos.files[:count]]
    degrade = parse_degradation(DEGRADATION)
    for side in ("input", "target"):
        (folder / side).mkdir(parents=True)

    def cut(number: int) -> tuple[int, np.ndarray]:
        picture = pictures[number % len(pictures)] if pictures else _make_up(draw, size)
        top, left = (int(draw.integers(0, have - want + 1)) for have, want in zip(picture.shape, size, strict=False))
        return number, np.ascontiguousarray(picture[top : top + size[0], left : left + size[1]])

    def write(job: tuple[int, np.ndarray]) -> None:
        number, target = job
        input = degrade.apply(target[None], seed=SEED, ids=np.array([number]))[0][0]
        for side, image in (("input", input), ("target", target)):
            Image.fromarray(image).save(folder / side / f"{number:05d}.{extension}", **SAVE_OPTIONS[extension])

    deque(map_ordered(write, map(cut, range(count)), jobs=0), maxlen=0)
    return find_pairs(folder / "input", folder / "target")


def repeat_pairs(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """`count` samples with keys of their own that share the files of `pairs`."""
    taken = (pairs[number % len(pairs)] for number in range(count))
    return [Pair(f"{number:08d}", f"{number:08d}", pair.input, pair.target) for number, pair in enumerate(taken)]


def _load(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 of at least `size`."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    while image.height >= 2 * size[0] and image.width >= 2 * size[1]:
        image = image.reduce(2)
    short = [max(want - have, 0) for want, have in zip(size, (image.height, image.width), strict=True)]
    return np.pad(np.asarray(image), ((0, short[0]), (0, short[1]), (0, 0)), mode="symmetric")


def _make_up(draw: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Smooth colours with fine noise, (*size, 3) uint8."""
    coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), np.float32)
    return (smooth + draw.normal(0.0, 2.0, smooth.shape)).clip(0.0, 255.0).astype(np.uint8)
