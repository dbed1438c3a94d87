"""The pictures of a report: the worst and the best images, chosen while the results come in."""

from __future__ import annotations

import base64
import bisect
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipeline import storage

log = logging.getLogger(__name__)

FOLDER = "cases"
NUM_CASES = 12  # of the worst images, and of the best
MAX_SIDE = 640  # larger images are shown reduced
PNG_BYTES = 64 * 1024  # what compresses worse than this is shown as JPEG
SIDES = ("input", "restored", "target", "mean", "spread")
SPREAD_FULL = 32.0  # standard deviation in 8-bit levels that is shown in white


@dataclass(frozen=True)
class Case:
    """One image in a report.   sides: those of SIDES that there are, in this order, as data: URIs"""

    key: str
    sides: Mapping[str, str]

    def to_json(self) -> str:
        return json.dumps({"key": self.key, "sides": dict(self.sides)})

    @staticmethod
    def from_json(text: str | bytes) -> Case:
        return Case(**json.loads(text))


def make_case(key: str, **sides: np.ndarray | None) -> Case:
    """A case of (H, W, 3) uint8 images of any sizes; spread: (H, W) float in 8-bit levels."""
    shown = {}
    for side in SIDES:
        image = sides.get(side)
        if image is not None:
            shown[side] = data_uri(heat_map(image) if side == "spread" else image)
    return Case(key, shown)


def heat_map(spread: np.ndarray) -> np.ndarray:
    """Black at 0, red, yellow, white from SPREAD_FULL on, by its square root.   (H, W) float -> (H, W, 3) uint8

    So a model that is nearly sure still shows where it is less so, and maps can be compared.
    """
    level = 3.0 * np.sqrt(np.clip(spread / SPREAD_FULL, 0.0, 1.0))[..., None] - np.arange(3.0)
    return np.rint(255.0 * np.clip(level, 0.0, 1.0)).astype(np.uint8)


def data_uri(image: np.ndarray) -> str:
    """(H, W, 3) uint8 -> a data: URI, reduced to MAX_SIDE; PNG, or JPEG where PNG is large."""
    picture = Image.fromarray(image)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "png"
    picture.save(buffer, "PNG", optimize=True)
    if buffer.tell() > PNG_BYTES:
        buffer, kind = io.BytesIO(), "jpeg"
        picture.save(buffer, "JPEG", quality=92, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Extremes:
    """Which of the images seen so far have the lowest and the highest scores, `count` of each."""

    def __init__(self, count: int = NUM_CASES) -> None:
        self._count = count
        self._low: list[tuple[float, str]] = []
        self._high: list[tuple[float, str]] = []

    def add(self, score: float, key: str) -> bool:
        """Count an image in, once however often it comes.   -> whether it is among them now

        An image that is among them at the end was so among any part of the images: whoever sees a part may leave out
        the pictures of the others.
        """
        for kept in (self._low, self._high):
            if (score, key) not in kept:
                bisect.insort(kept, (score, key))
        del self._low[self._count :]
        del self._high[: -self._count]
        return (score, key) in self._low or (score, key) in self._high

    @property
    def keys(self) -> list[str]:
        """From the lowest score to the highest, each once."""
        return [key for _, key in sorted({*self._low, *self._high})]


class CaseStore:
    """Cases below `folder`, a path or a URL, one file each; they outlive an interrupted evaluation."""

    def __init__(self, folder: str) -> None:
        self._folder = storage.join(folder, FOLDER)
        storage.make_folder(self._folder)

    def put(self, case: Case) -> None:
        storage.write_bytes_atomic(self._path(case.key), case.to_json().encode())

    def load(self, keys: Sequence[str]) -> list[Case]:
        """Those of the keys that are there, in their order."""
        found = {key: self._read(key) for key in self._stored.intersection(keys)}
        return [case for key in keys if (case := found.get(key)) is not None]

    def keep(self, keys: Iterable[str]) -> None:
        """Remove all others."""
        for key in self._stored.difference(keys):
            storage.remove(self._path(key))

    @property
    def keys(self) -> set[str]:
        """Of the cases that are there and whole."""
        return {case.key for case in self.load(sorted(self._stored))}

    @property
    def _stored(self) -> set[str]:
        names = storage.list_names(self._folder)
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def _read(self, key: str) -> Case | None:
        """None for a damaged one, which its evaluation makes again."""
        try:
            case = Case.from_json(storage.read_bytes(self._path(key)))
        except (TypeError, ValueError) as error:
            log.warning("%s is damaged and made again: %s", self._path(key), error)
            return None
        return case if case.key == key else None

    def _path(self, key: str) -> str:
        return storage.join(self._folder, f"{key}.json")
