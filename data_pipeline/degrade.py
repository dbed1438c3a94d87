"""Synthetic degradations, each a function of (image, seed, sample_id): counted random numbers only."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import torch

from data_pipeline.rng import normal_image, uniform


def rain(
    image: np.ndarray,
    *,
    seed: int,
    sample_id: int,
    density: float = 0.01,
    length: int = 21,
    strength: float = 0.8,
    max_angle: float = 25.0,
) -> np.ndarray:
    """Rain streaks added to an image.   image: (H, W, C) float32 in [0, 1]  ->  the same

    density: streaks per pixel; length: rows a streak spans; strength: brightness of the brightest streaks;
    max_angle: all streaks of an image lean by one angle, uniform in +-max_angle degrees.
    """
    height, width = image.shape[:2]
    ids = torch.tensor([sample_id], dtype=torch.int64)
    angle = max_angle * (2.0 * float(uniform(seed, "rain_angle", ids, count=1)) - 1.0)
    slope = math.tan(math.radians(angle))
    margin = math.ceil(abs(slope) * length) + 1  # streaks that start outside the image reach into it
    rows, columns = height + length - 1, width + 2 * margin
    drops = normal_image(seed, "rain_drops", ids, channels=2, height=rows, width=columns)
    presence, glare = drops[0].numpy()
    brightness = 0.5 + 0.5 * np.minimum(np.abs(glare) / 2.0, 1.0)
    heads = np.where(presence > NormalDist().inv_cdf(1.0 - density), brightness, np.float32(0.0))
    streaks = np.zeros((height, width), np.float32)
    for row in range(length):
        left = margin + round(row * slope)
        top = length - 1 - row
        streaks += heads[top : top + height, left : left + width]
    return np.clip(image + strength * np.minimum(streaks, 1.0)[:, :, None], 0.0, 1.0).astype(np.float32)


def gaussian_noise(image: np.ndarray, sigma: float, *, seed: int, sample_id: int) -> np.ndarray:
    """Additive white Gaussian noise.   image: (H, W, C) float32 in [0, 1]  ->  (H, W, C) float32, not clipped

    sigma: standard deviation on the 0-255 scale.
    """
    height, width, channels = image.shape
    ids = torch.tensor([sample_id], dtype=torch.int64)
    noise = normal_image(seed, "gaussian_noise", ids, channels=channels, height=height, width=width)[0]
    return (image + np.float32(sigma / 255.0) * noise.permute(1, 2, 0).numpy()).astype(np.float32)
