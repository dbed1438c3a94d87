"""What an evaluation computes, and its units of work: forward batches named by everything their results depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch

import data_pipeline
from data_pipeline.errors import ConfigError, DataError
from rddm_dist import __version__, diffusion, evaluation, model
from rddm_dist.evaluation.metrics import METRICS, PAIR_METRICS
from rddm_dist.evaluation.protocol import Protocol, get_protocol
from rddm_dist.evaluation.sources import Entry

SET_METRICS = ("fid", "kid", "is")
RESULT_FORMAT = 1  # of the rows of a unit; another one makes other digests, so that old results are not taken

Kind = Literal["restoration", "files", "generation", "features"]


@dataclass(frozen=True)
class EvalSettings:
    """Everything a score depends on besides weights and data; recorded in the report.

    metrics: beside those of the protocol; samples: of every image, with the seeds seed, seed + 1, ...; precision: of
    the network's forward; threads: of each actor; overrides: `sample.KEY=VALUE`, changes of the model's own sampler
    settings (see `loading.override_sampler`); lpips, features: files of feature networks.
    """

    protocol: str = "rgb"
    metrics: tuple[str, ...] = ()
    steps: int = 5
    eta: float = 0.0
    seed: int = 0
    samples: int = 1
    batch_size: int = 4
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: int = 1
    device: str = "cpu"
    overrides: tuple[str, ...] = ()
    lpips: str = ""
    features: str = ""

    def check(self) -> None:
        """Raise ConfigError for settings that do not fit together."""
        protocol = get_protocol(self.protocol)
        known = [name for name in METRICS if name in PAIR_METRICS or name in SET_METRICS]
        for name in self.metrics:
            if name not in known:
                raise ConfigError(f"--metrics={name} is not known; choose from {', '.join(known)}")
            if name in PAIR_METRICS and not protocol.compares_pairs:
                raise ConfigError(
                    f"--metrics={name} compares pairs and protocol {protocol.name} has none; choose fid, kid or is"
                )
        if "lpips" in self.metrics and not self.lpips:
            raise ConfigError(
                "--metrics=lpips needs the file of its network; give --lpips FILE (rddm features makes one)"
            )
        if self.set_metrics and not self.features:
            raise ConfigError(
                f"--metrics={','.join(self.set_metrics)} needs a feature network; give --features FILE (rddm features "
                "makes one)"
            )
        if not protocol.compares_pairs and not self.features:
            raise ConfigError(
                f"protocol {protocol.name} compares sets of images through a feature network; give --features FILE "
                "(rddm features makes one)"
            )
        if self.precision == "fp16" and self.device == "cpu":
            raise ConfigError("--precision=fp16 needs a GPU; use fp32 or bf16 here")
        if not 1 <= self.samples <= 1000:
            raise ConfigError(f"--samples={self.samples} must be from 1 to 1000")

    @property
    def pair_metrics(self) -> tuple[str, ...]:
        """Metrics of every image, those of the protocol first."""
        protocol = get_protocol(self.protocol)
        more = [name for name in self.metrics if name in PAIR_METRICS and name not in protocol.metrics]
        if self.lpips and "lpips" not in more and protocol.compares_pairs:
            more.append("lpips")
        return (*protocol.metrics, *more)

    @property
    def set_metrics(self) -> tuple[str, ...]:
        """Metrics of the whole set."""
        chosen = tuple(name for name in self.metrics if name in SET_METRICS)
        return chosen or (("fid", "kid") if self.features else ())


@dataclass(frozen=True)
class Job:
    """One evaluation: what every process that works on it must know.

    kind        restoration: a model restores the inputs; files: another method has done so; generation: a model makes
                images from their numbers; features: images as they are, through the feature network alone
    source      `Source.spec()`; {} for generation
    model       path or URL of the weights, "" without
    identity    everything that the rows of a unit follow from besides its images
    """

    kind: Kind
    settings: EvalSettings
    identity: Mapping[str, Any]
    source: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    weights_digest: str = ""
    size: tuple[int, int] = (0, 0)  # height and width of generated images
    keep_images: bool = False
    shows_cases: bool = True  # of kind features

    @property
    def protocol(self) -> Protocol:
        return get_protocol(self.settings.protocol)

    @property
    def digest(self) -> str:
        return digest_of({"format": RESULT_FORMAT, "kind": self.kind, **self.identity})


def make_identity(
    settings: EvalSettings,
    *,
    fingerprint: str,
    weights_digest: str = "",
    sampler: Mapping[str, Any] | None = None,
    networks: Mapping[str, Any] | None = None,
    size: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """What the rows of a unit follow from: weights, data, sampler, protocol, networks and how they are computed."""
    return {
        "weights": weights_digest,
        "data": fingerprint,
        "sampler": dict(sampler or {}),
        "protocol": get_protocol(settings.protocol).describe(),
        "metrics": settings.pair_metrics,
        "set_metrics": settings.set_metrics,
        "networks": dict(networks or {}),
        "samples": settings.samples,
        "batch_size": settings.batch_size,
        "precision": settings.precision,
        "threads": settings.threads,
        "device": settings.device.partition(":")[0],
        "software": software(),
        "size": list(size),
    }


@dataclass(frozen=True)
class Unit:
    """One forward batch: images of one size."""

    entries: tuple[Entry, ...]

    def to_bytes(self) -> bytes:
        return json.dumps([entry.to_json() for entry in self.entries]).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Unit:
        return Unit(tuple(Entry.from_json(values) for values in json.loads(data)))

    def digest(self, job_digest: str) -> str:
        """Names the results of this unit: the job, and the keys in their order."""
        return digest_of([job_digest, [entry.key for entry in self.entries]])


def plan_units(entries: Sequence[Entry], *, batch_size: int) -> list[Unit]:
    """Cut images into forward batches of one size, from the list sorted by (height, width, key).

    The cut depends on the images and the batch size alone: whoever runs the units, in whatever order, each image is
    computed in the same company. Raises DataError for no images.
    """
    if not entries:
        raise DataError("the evaluation has no images: the dataset is empty")
    units: list[Unit] = []
    rows: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.height, entry.width, entry.key)):
        if rows and (len(rows) == batch_size or (rows[0].height, rows[0].width) != (entry.height, entry.width)):
            units.append(Unit(tuple(rows)))
            rows = []
        rows.append(entry)
    units.append(Unit(tuple(rows)))
    return units


def numbered_entries(numbers: range, size: tuple[int, int]) -> list[Entry]:
    """Entries of images to generate, keyed by their numbers.   size: (height, width)"""
    return [Entry(f"{number:08d}", size[1], size[0]) for number in numbers]


@lru_cache(maxsize=1)
def software() -> dict[str, str]:
    """What computes the digits: versions of libraries, and the sha256 of our own code that takes part."""
    digest = hashlib.sha256()
    for package in (data_pipeline, diffusion, model, evaluation):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package.__name__}/{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    versions = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    return {"rddm_dist": __version__, "code": digest.hexdigest(), **versions}


def digest_of(value: Any) -> str:
    """sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def settings_dict(settings: EvalSettings) -> dict[str, Any]:
    """The settings for report.json."""
    return {**asdict(settings), "metrics": list(settings.metrics), "overrides": list(settings.overrides)}
