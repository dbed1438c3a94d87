"""Synthetic degradations of a batch of images; what is random is a counted function of (seed, id), row by row."""

from __future__ import annotations

import io
import math
from statistics import NormalDist

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.rng import normal_image, uniform

# A parameter is one number for the whole batch or a (B,) tensor with one for each row.
# A row comes out bit for bit the same in any batch. Sums over neighbouring pixels are therefore written as shifted
# products, each correctly rounded: a convolution picks its algorithm, and so its rounding, by the size of the batch.


def gaussian_noise(images: Tensor, sigma: float | Tensor, *, seed: int, ids: Tensor) -> Tensor:
    """Additive white Gaussian noise.   images: (B, H, W, C) float32 in [0, 1]; ids: (B,) int64  ->  the same, unclipped

    sigma: standard deviation on the 0-255 scale.
    """
    return images + _per_image(_rows(sigma, images) / 255.0) * _noise_like(images, "gaussian_noise", seed, ids)


def poisson_noise(images: Tensor, peak: float | Tensor, *, seed: int, ids: Tensor) -> Tensor:
    """Shot noise.   images: (B, H, W, C) float32 in [0, 1]; ids: (B,) int64  ->  the same, unclipped

    peak: photons counted where the image is 1. The Gaussian approximation of the Poisson law: the variance is
    image / peak, which is close from some ten photons on.
    """
    deviation = (images.clamp(min=0.0) / _per_image(_rows(peak, images))).sqrt()
    return images + deviation * _noise_like(images, "poisson_noise", seed, ids)


def rain(
    images: Tensor,
    *,
    seed: int,
    ids: Tensor,
    density: float | Tensor = 0.01,
    length: int | Tensor = 21,
    strength: float | Tensor = 0.8,
    max_angle: float | Tensor = 25.0,
) -> Tensor:
    """Rain streaks added to images.   images: (B, H, W, C) float32; ids: (B,) int64  ->  the same, clipped to [0, 1]

    density: streaks per pixel, 0..1; length: rows a streak spans; strength: brightness of the brightest streaks;
    max_angle: all streaks of an image lean by one angle, uniform in +-max_angle degrees.
    """
    height, width = images.shape[1:3]
    turns = 2.0 * uniform(seed, "rain_angle", ids, count=1)[:, 0] - 1.0
    slopes = [math.tan(math.radians(angle)) for angle in (_rows(max_angle, images) * turns).tolist()]
    lengths = [int(rows) for rows in _rows(length, images).tolist()]
    # Streaks that start outside the image reach into it.
    margins = [math.ceil(abs(slope) * rows) + 1 for slope, rows in zip(slopes, lengths, strict=True)]
    drops = normal_image(
        seed, "rain_drops", ids, channels=2, height=height + max(lengths) - 1, width=width + 2 * max(margins)
    )
    limits = [
        NormalDist().inv_cdf(1.0 - share) if share > 0.0 else math.inf for share in _rows(density, images).tolist()
    ]
    presence, glare = drops.unbind(1)
    brightness = 0.5 + 0.5 * (glare.abs() / 2.0).clamp(max=1.0)
    heads = torch.where(presence > torch.tensor(limits, dtype=torch.float32)[:, None, None], brightness, 0.0)
    streaks = torch.zeros((len(images), height, width))
    for number, (slope, rows, margin) in enumerate(zip(slopes, lengths, margins, strict=True)):
        for row in range(rows):
            left = margin + round(row * slope)
            top = rows - 1 - row
            streaks[number] += heads[number, top : top + height, left : left + width]
    veil = _per_image(_rows(strength, images)) * streaks.clamp(max=1.0)[..., None]
    return (images + veil).clamp(0.0, 1.0)


def lowlight(
    images: Tensor, *, gamma: float | Tensor, scale: float | Tensor, sigma: float | Tensor, seed: int, ids: Tensor
) -> Tensor:
    """Too little light: scale * image ** gamma, plus sensor noise.

    images: (B, H, W, C) float32 in [0, 1], below 0 counts as 0; ids: (B,) int64  ->  the same, unclipped
    gamma: 1 keeps the contrast, above it shadows sink; scale: 0..1, exposure; sigma: standard deviation of the noise
    on the 0-255 scale. The power is taken in float64, whose last bits hardly ever show.
    """
    dark = images.double().clamp_(min=0.0).pow_(_rows(gamma, images).view(-1, 1, 1, 1)).float()
    noise = _noise_like(images, "lowlight_noise", seed, ids)
    return _per_image(_rows(scale, images)) * dark + _per_image(_rows(sigma, images) / 255.0) * noise


def gaussian_blur(images: Tensor, sigma: float | Tensor) -> Tensor:
    """Gaussian blur; the border is mirrored, so that the mean stays.   images: (B, H, W, C) float32  ->  the same

    sigma: standard deviation in pixels, 0 for none. A pixel depends on those up to blur_reach(sigma) away.
    """
    sigmas = _rows(sigma, images).tolist()
    radius = max(blur_reach(value) for value in sigmas)
    weights = torch.tensor([_gaussian_weights(value, radius) for value in sigmas], dtype=torch.float32)
    taps = [_per_image(weights[:, distance]) for distance in range(radius + 1)]
    for axis in (1, 2):
        side = images.shape[axis]
        padded = _mirror(images, axis, radius)
        total = images * taps[0]
        for distance in range(1, radius + 1):
            ahead = padded.narrow(axis, radius + distance, side)
            total += (padded.narrow(axis, radius - distance, side) + ahead).mul_(taps[distance])
        images = total
    return images


def blur_reach(sigma: float) -> int:
    """How far a Gaussian blur looks, in pixels: three standard deviations."""
    return math.ceil(3.0 * sigma)


def motion_blur(images: Tensor, length: float | Tensor, *, angle: float | Tensor) -> Tensor:
    """Blur along a straight line, mirrored at the border.   images: (B, H, W, C) float32  ->  the same

    length: of the line in pixels, up to 1 for none; angle: of the line in degrees, counter-clockwise from the
    horizontal. A pixel depends on those up to motion_reach(length) away.
    """
    height, width = images.shape[1:3]
    lengths = _rows(length, images).tolist()
    reach = max(motion_reach(value) for value in lengths)
    padded = _mirror(_mirror(images, 1, reach), 2, reach)
    result = torch.zeros_like(images)
    for number, (size, degrees) in enumerate(zip(lengths, _rows(angle, images).tolist(), strict=True)):
        for row, column, weight in _motion_taps(size, degrees):
            top, left = reach + row, reach + column
            result[number] += padded[number, top : top + height, left : left + width] * weight
    return result


def motion_reach(length: float) -> int:
    """How far a motion blur looks, in pixels: half the line, whatever its angle."""
    return math.ceil(length / 2.0 + 0.5) - 1


def jpeg(images: Tensor, quality: int | Tensor) -> Tensor:
    """A round trip through JPEG (4:2:0).   images: (B, H, W, 3) float32  ->  the same, multiples of 1/255 in [0, 1]

    quality: Pillow's, 1..100.
    """
    pixels = to_pixels(images).numpy()
    qualities = _rows(quality, images).tolist()
    decoded = [_through_jpeg(image, int(value)) for image, value in zip(pixels, qualities, strict=True)]
    return to_images(np.stack(decoded))


def fill_holes(images: Tensor, holes: Tensor, *, fill: float | Tensor) -> Tensor:
    """Paint over what a mask marks.   images: (B, H, W, C) float32; holes: (B, H, W) uint8, 0 where kept  ->  images

    fill: the gray level of the holes, 0..1.
    """
    return torch.where((holes > 0)[..., None], _per_image(_rows(fill, images)), images)


def to_images(pixels: np.ndarray) -> Tensor:
    """(B, H, W, C) uint8  ->  float32 in [0, 1]"""
    return torch.from_numpy(pixels.astype(np.float32, order="C")).div_(255.0)


def to_pixels(images: Tensor) -> Tensor:
    """(B, H, W, C) float32  ->  uint8, clipped to [0, 1] and rounded to the nearest level"""
    return images.clamp(0.0, 1.0).mul_(255.0).round_().to(torch.uint8)


def _rows(value: float | Tensor, images: Tensor) -> Tensor:
    """(B,) float64: a parameter for each row."""
    return torch.as_tensor(value, dtype=torch.float64).expand(len(images))


def _per_image(values: Tensor) -> Tensor:
    """(B,)  ->  (B, 1, 1, 1) float32"""
    return values.float().view(-1, 1, 1, 1)


def _noise_like(images: Tensor, purpose: str, seed: int, ids: Tensor) -> Tensor:
    """(B, H, W, C) float32, standard normal."""
    height, width, channels = images.shape[1:]
    return normal_image(seed, purpose, ids, channels=channels, height=height, width=width).permute(0, 2, 3, 1)


def _mirror(images: Tensor, axis: int, margin: int) -> Tensor:
    """Continue the images by `margin` pixels on both ends of an axis: ... b a | a b c | c b ..."""
    if margin == 0:
        return images
    side = images.shape[axis]
    index = torch.arange(-margin, side + margin) % (2 * side)
    return images.index_select(axis, torch.minimum(index, 2 * side - 1 - index))


def _gaussian_weights(sigma: float, radius: int) -> list[float]:
    """Weights at distances 0..radius; both sides together sum to 1, and beyond the blur's own reach they are 0."""
    bell = [
        math.exp(-0.5 * (distance / sigma) ** 2) if sigma > 0.0 else 1.0 for distance in range(blur_reach(sigma) + 1)
    ]
    total = 2.0 * sum(bell) - bell[0]
    return [value / total for value in bell] + [0.0] * (radius + 1 - len(bell))


def _motion_taps(length: float, degrees: float) -> list[tuple[int, int, float]]:
    """A line through the origin as (row, column, weight), weights summing to 1.

    One step along the axis that the line is nearer to, weighted by how much of the pixel the line covers, and shared
    between the two pixels it passes between.
    """
    across, along = -math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    is_steep = abs(across) > abs(along)
    if is_steep:
        across, along = along, across
    half = abs(along) * length / 2.0
    last = motion_reach(2.0 * half)
    taps = []
    for step in range(-last, last + 1):
        cover = min(half + 0.5 - abs(step), 1.0)
        offset = round(step * across / along, 6)  # cos(90 degrees) is not quite 0
        near = math.floor(offset)
        for place, share in ((near, near + 1 - offset), (near + 1, offset - near)):
            if share > 0.0:
                row, column = (step, place) if is_steep else (place, step)
                taps.append((row, column, cover * share))
    total = sum(weight for _, _, weight in taps)
    return [(row, column, weight / total) for row, column, weight in taps]


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """(H, W, 3) uint8  ->  the same, compressed and decoded"""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(buffer) as picture:
        return np.asarray(picture)
