"""Random joint transforms of the images of a sample: a window, a mirror image, quarter turns, from counted numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.decode import Window
from data_pipeline.rng import uniform


class Augments(NamedTuple):
    """What happens to training samples.

    top, left: (n,) float64 in [0, 1), the window's place as a part of the room there is; is_mirrored: (n,) bool,
    left-right; turns: (n,) int64 quarter turns counter-clockwise, after the mirror image.
    """

    top: np.ndarray
    left: np.ndarray
    is_mirrored: np.ndarray
    turns: np.ndarray


def draw_augments(seed: int, positions: np.ndarray, *, flip: bool, rotate: bool = False) -> Augments:
    """Augmentations by position in the run, whatever the batch.   positions: (n,) int64"""
    top, left, toss, turn = uniform(seed, "augment", torch.from_numpy(positions), count=4).numpy().T
    turns = (4.0 * turn).astype(np.int64) if rotate else np.zeros(len(positions), np.int64)
    return Augments(top, left, (toss < 0.5) & flip, turns)


def place_window(top: float, left: float, *, shape: tuple[int, int], crop: int) -> Window:
    """The window of crop x crop pixels at a drawn place of an image of `shape` (H, W); crop 0: the whole image."""
    height, width = shape
    if not crop:
        return Window(0, 0, height, width)
    return Window(int(top * (height - crop + 1)), int(left * (width - crop + 1)), crop, crop)


def turn_rows(images: Tensor, augments: Augments) -> None:
    """Mirror and turn the rows of a batch in place.   images: (n, H, W, C); turned ones are square"""
    # Row by row: gathering them into a tensor of their own costs more than it saves.
    for row in np.flatnonzero(augments.is_mirrored).tolist():
        images[row] = images[row].flip(1)
    for row in np.flatnonzero(augments.turns).tolist():
        images[row] = torch.rot90(images[row], int(augments.turns[row]), (0, 1))


def crop_at(step: int, crop: Mapping[int, int]) -> int:
    """Side of the crop in force at batch `step`.   crop: first step -> side; its smallest key is 0"""
    return crop[max(start for start in crop if start <= step)]
