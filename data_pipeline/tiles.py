"""Large images as overlapping tiles: where they are cut, and how the whole is put together again."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data_pipeline.decode import Window
from data_pipeline.errors import BadSample, ConfigError


def plan_tiles(height: int, width: int, *, size: int, overlap: int) -> list[Window]:
    """Windows of at most size x size that cover an image, row by row; neighbours overlap by at least `overlap` pixels.

    Tiles lie evenly spread; an image smaller than a tile in one direction is not cut in it.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ConfigError(f"--tile={size} with --overlap={overlap}: the overlap must lie in 0..{max(size - 1, 0)}")
    rows, columns = (_starts(length, size=size, overlap=overlap) for length in (height, width))
    return [Window(top, left, min(size, height), min(size, width)) for top in rows for left in columns]


def _starts(length: int, *, size: int, overlap: int) -> list[int]:
    """First pixels of the tiles along one side: as few as cover it, evenly spread from edge to edge."""
    room = max(length - size, 0)
    steps = -(-room // (size - overlap))
    return [room * i // steps for i in range(steps)] + [room]


def assemble(parts: Iterable[tuple[Window, np.ndarray]], *, height: int, width: int) -> np.ndarray:
    """The whole image of tiles that were cut from it.   parts: (window, (h, w, C) uint8)  ->  (height, width, C) uint8

    Where tiles overlap they hold the same pixels, or nearly so after a lossy codec; the later one counts. Raises
    BadSample when something is not covered.
    """
    whole: np.ndarray | None = None
    covered = np.zeros((height, width), bool)
    for window, pixels in parts:
        if whole is None:
            whole = np.zeros((height, width, pixels.shape[2]), np.uint8)
        window.cut(whole)[:] = pixels
        window.cut(covered[:, :, None])[:] = True
    if whole is None or not covered.all():
        raise BadSample(f"the tiles leave {int((~covered).sum())} of {covered.size} pixels open")
    return whole
