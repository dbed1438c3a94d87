"""Joint transforms of the images of one sample; random ones from counted numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.rng import uniform


@dataclass(frozen=True)
class Augment:
    """What happens to one training sample: a window, given as fractions of the room there is, and a mirror image."""

    top: float
    left: float
    mirrored: bool


def draw_augments(seed: int, positions: np.ndarray, *, flip: bool) -> list[Augment]:
    """Augmentations by position in the run, whatever the batch.   positions: (n,) int64"""
    numbers = uniform(seed, "augment", torch.from_numpy(positions), count=4).tolist()
    return [Augment(top, left, flip and toss < 0.5) for top, left, toss, _ in numbers]


def cut(image: np.ndarray, augment: Augment, *, crop: int) -> np.ndarray:
    """The augmented window of an image.   image: (H, W, C)  ->  (crop, crop, C), or (H, W, C) for crop 0; a view

    Images of one size give the same window, which keeps the images of a sample aligned.
    """
    if crop:
        top = int(augment.top * (image.shape[0] - crop + 1))
        left = int(augment.left * (image.shape[1] - crop + 1))
        image = image[top : top + crop, left : left + crop]
    return image[:, ::-1] if augment.mirrored else image
