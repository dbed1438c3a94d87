"""Evaluation as units of work: which images go through the network together, and what one unit yields.

A unit is a forward batch cut from the list of keys sorted by (height, width, key): its images have one size, and the
cut depends on the data and the recorded batch size alone. Whoever runs the units, in whatever order, the report is the
same.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import BadSample, ConfigError, DataError
from data_pipeline.manifest import Manifest
from data_pipeline.reader import Dataset, EvalEntry, Place
from data_pipeline.records import Sample
from data_pipeline.rng import stable_id
from rddm_dist.evaluation.protocol import PROTOCOLS, score
from rddm_dist.evaluation.restore import load_restorer, write_png

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSettings:
    """Everything a score depends on besides weights and data; recorded in the report.

    overrides: `sample.KEY=VALUE`, changes of the model's own sampler settings (see `loading.override_sampler`).
    """

    protocol: str = "rgb"
    steps: int = 5
    eta: float = 0.0
    seed: int = 0
    batch_size: int = 4
    threads: int = 1
    device: str = "cpu"
    overrides: tuple[str, ...] = ()

    def check(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"--protocol={self.protocol} is unknown; choose one of {', '.join(sorted(PROTOCOLS))}")


@dataclass(frozen=True)
class Unit:
    """One forward batch: images of one size."""

    rows: tuple[EvalEntry, ...]

    def to_json(self) -> str:
        return json.dumps(self.rows)

    @staticmethod
    def from_json(text: str) -> Unit:
        return Unit(
            tuple(
                EvalEntry(key, width, height, tuple(Place(*place) for place in places))
                for key, width, height, places in json.loads(text)
            )
        )


def plan_units(uri: str, manifest: Manifest, *, batch_size: int, limit: int = 0) -> list[Unit]:
    """Cut the dataset, or its first `limit` keys, into forward batches; the tiles of an image make one image again.

    Raises DataError for a dataset without inputs.
    """
    if not manifest.has_input:
        raise DataError(f"{uri} holds clean images only; pack it with --degrade to evaluate on it")
    entries = Dataset(uri, manifest).images()
    if limit:
        entries = entries[:limit]
    entries = sorted(entries, key=lambda entry: (entry.height, entry.width, entry.key))
    units: list[Unit] = []
    rows: list[EvalEntry] = []
    size: tuple[int, int] | None = None
    for entry in entries:
        if rows and (len(rows) == batch_size or size != (entry.height, entry.width)):
            units.append(Unit(tuple(rows)))
            rows = []
        size = (entry.height, entry.width)
        rows.append(entry)
    if rows:
        units.append(Unit(tuple(rows)))
    return units


class UnitRunner:
    """Holds the model once and runs units. Scores are those of the 8-bit images it would write."""

    def __init__(self, model: str, uri: str, settings: EvalSettings, *, images_dir: str = "") -> None:
        torch.set_num_threads(settings.threads)
        self._restorer = load_restorer(
            model,
            steps=settings.steps,
            eta=settings.eta,
            seed=settings.seed,
            device=settings.device,
            overrides=settings.overrides,
        )
        self._dataset = Dataset(uri)
        self._settings = settings
        self._images_dir = Path(images_dir) if images_dir else None

    def run(self, unit: Unit) -> list[dict[str, Any]]:
        """Restore and score one forward batch.

        -> one row per image: key, name, scores, digest of the result; or key and `error` for one that cannot be read
        """
        samples, failed = [], []
        for entry in unit.rows:
            try:
                samples.append(self._dataset.whole(entry))
            except BadSample as error:
                failed.append({"key": entry.key, "error": str(error)})
        return [*self._score(samples), *failed]

    def _score(self, samples: list[Sample]) -> list[dict[str, Any]]:
        if not samples:
            return []
        inputs = np.stack([sample.input for sample in samples if sample.input is not None])
        masks = [sample.mask for sample in samples if sample.mask is not None]
        restored = self._restorer.restore(
            inputs, ids=[stable_id(sample.key) for sample in samples], masks=np.stack(masks) if masks else None
        )
        protocol = PROTOCOLS[self._settings.protocol]
        rows = []
        for sample, degraded, image in zip(samples, inputs, restored, strict=True):
            # Resized like the image that the network saw, where it saw one of another size.
            degraded, target = (self._restorer.as_restored(pixels) for pixels in (degraded, sample.target))
            before, after = score(protocol, degraded, target), score(protocol, image, target)
            if self._images_dir is not None:
                write_png(self._images_dir / f"{sample.key}.png", image)
            rows.append(
                {
                    "key": sample.key,
                    "name": sample.name,
                    "width": image.shape[1],
                    "height": image.shape[0],
                    **{f"input_{name}": value for name, value in before.items()},
                    **after,
                    "restored_sha256": hashlib.sha256(image.tobytes()).hexdigest(),
                }
            )
        return rows


def run_here(
    model: str, uri: str, units: Iterable[Unit], settings: EvalSettings, *, images_dir: str = ""
) -> Iterator[list[dict[str, Any]]]:
    """Run the units in this process, one after the other."""
    runner = UnitRunner(model, uri, settings, images_dir=images_dir)
    for unit in units:
        yield runner.run(unit)
