"""The demo's dataset: real colour photographs from scikit-image's wheel, rained on."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.degradations import parse_degradation
from data_pipeline.errors import EnvironmentFault

# Whole photographs on either side; the two views of the stereo pair (motorcycle) stay together.
TRAIN = (
    "astronaut.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
)
HELD_OUT = ("chelsea.png", "coffee.png", "rocket.jpg")
MAX_SIDE = 768
SEED = 20
DEGRADATION = "rain(density=0.01, length=21, strength=0.8, max_angle=25)+noise(sigma=12)"


def write_demo_pairs(folder: Path) -> dict[str, Path]:
    """Write input/ and target/ PNGs for the splits train and eval.   -> split -> its folder

    What is already complete is left alone.
    """
    sources = _photo_folder()
    splits = {"train": TRAIN, "eval": HELD_OUT}
    for split, names in splits.items():
        for name in names:
            stem = Path(name).stem
            paths = [folder / split / side / f"{stem}.png" for side in ("input", "target")]
            if all(path.exists() for path in paths):
                continue
            target = _load(sources / name)
            for path, image in zip(paths, (_degrade(target, stem), target), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(".tmp")
                Image.fromarray(image).save(temporary, format="PNG")
                temporary.replace(path)
    return {split: folder / split for split in splits}


def _photo_folder() -> Path:
    try:
        files = importlib.metadata.files("scikit-image")
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentFault(
            "the demo's photographs come with scikit-image: pip install 'rddm-dist[demo]'"
        ) from error
    for file in files or ():
        if file.name == HELD_OUT[0]:
            return Path(str(file.locate())).parent
    raise EnvironmentFault(f"this scikit-image holds no {HELD_OUT[0]}; install the version in constraints.txt")


def _load(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, halved until no side exceeds MAX_SIDE."""
    image = Image.open(path).convert("RGB")
    while max(image.size) > MAX_SIDE:
        image = image.reduce(2)
    return np.asarray(image)


def _degrade(target: np.ndarray, stem: str) -> np.ndarray:
    """Rain streaks, then sensor noise.   (H, W, 3) uint8 -> the same"""
    sample_id = int.from_bytes(hashlib.blake2b(stem.encode(), digest_size=7).digest(), "little")
    ids = np.array([sample_id], np.int64)
    return parse_degradation(DEGRADATION).apply(target[None], seed=SEED, ids=ids)[0][0]
