"""Small folders of image pairs and small packed datasets, made of counted noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.pack import pack
from data_pipeline.sources import find_pairs


def random_image(seed: int, size: tuple[int, int], *, channels: int = 3) -> np.ndarray:
    """Smooth random pixels.   size: (height, width)  ->  (height, width, channels) uint8"""
    height, width = size
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), channels), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]


def make_folders(
    tmp_path: Path, *, count: int = 6, size: tuple[int, int] = (40, 48), seed: int = 0, mask: bool = False
) -> tuple[Path, Path]:
    """Folders tmp_path/input and tmp_path/target (and tmp_path/mask) of PNG pairs.   size: (height, width)

    The input of pair i is its target with noise of standard deviation 10; pixel (0, 0) of both is (i, i, i).
    """
    for field in ("input", "target", *(("mask",) if mask else ())):
        (tmp_path / field).mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed)
    for number in range(count):
        target = random_image(1000 * seed + number, size)
        degraded = np.clip(target + noise.normal(0.0, 10.0, target.shape), 0, 255).astype(np.uint8)
        target[0, 0] = degraded[0, 0] = number
        name = f"photo_{number:03d}.png"
        Image.fromarray(target).save(tmp_path / "target" / name)
        Image.fromarray(degraded).save(tmp_path / "input" / name)
        if mask:
            Image.fromarray((target[:, :, 0] > 127).astype(np.uint8) * 255).save(tmp_path / "mask" / name)
    return tmp_path / "input", tmp_path / "target"


def make_dataset(
    tmp_path: Path,
    *,
    count: int = 6,
    size: tuple[int, int] = (40, 48),
    seed: int = 0,
    mask: bool = False,
    name: str = "data",
    **options: Any,
) -> str:
    """Pack the pairs of make_folders into tmp_path/name.   options: those of pack   ->  the dataset's location"""
    source = tmp_path / f"{name}-source"
    input_dir, target_dir = make_folders(source, count=count, size=size, seed=seed, mask=mask)
    pairs = find_pairs(input_dir, target_dir, source / "mask" if mask else None)
    pack(pairs, str(tmp_path / name), **{"shard_mb": 0.02, "jobs": 2, **options})
    return str(tmp_path / name)
