"""The data of a run: the datasets that its configuration names, checked, and the loader over them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.cache import NodeCache
from data_pipeline.degradations import parse_degradation
from data_pipeline.errors import ConfigError
from data_pipeline.loader import Pace, Share, TrainLoader, build_train_loader
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import choose_mixture_lanes
from data_pipeline.order import choose_lanes
from data_pipeline.preprocess import Preprocess
from data_pipeline.reader import Dataset
from data_pipeline.retry import RetryPolicy
from data_pipeline.rows import RowSettings
from rddm_dist.config import Config, DataSection
from rddm_dist.training.plan import BatchPlan


@dataclass(frozen=True)
class TrainData:
    """The datasets of a run.   weights, lanes: one per dataset; rows: what becomes of their samples"""

    uris: tuple[str, ...]
    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]
    lanes: tuple[int, ...]
    rows: RowSettings
    cache_bytes: int

    @property
    def fingerprint(self) -> str:
        """Names the data: of one dataset its own fingerprint, of several a sha256 over theirs."""
        fingerprints = [manifest.fingerprint for manifest in self.manifests]
        return (
            fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()
        )

    @property
    def num_samples(self) -> int:
        return sum(manifest.num_samples for manifest in self.manifests)

    @property
    def has_mask(self) -> bool:
        return "mask" in self.rows.outputs(self.manifests[0])

    def describe(self) -> str:
        """One line for the plan."""
        parts = []
        for uri, manifest, weight, lanes in zip(self.uris, self.manifests, self.weights, self.lanes, strict=True):
            share = f", {weight / sum(self.weights):.1%} of every batch" if len(self.uris) > 1 else ""
            parts.append(
                f"{uri}: {manifest.num_samples} samples in {len(manifest.shards)} shard(s), fingerprint "
                f"{manifest.fingerprint[:12]}, {lanes} lane(s){share}"
            )
        open_bytes = self._open_bytes()
        if 0 < self.cache_bytes < open_bytes:
            parts.append(
                f"data.cache_gb={self.cache_bytes / 1e9:g} is less than the {open_bytes / 1e9:.2g} GB of shards that "
                "are read side by side, so shards may be fetched again and again: raise it, or set it to 0 for range "
                "reads"
            )
        return "; ".join(parts)

    def _open_bytes(self) -> int:
        """Bytes of the shards open at one time, over all workers."""
        largest = [max(manifest.shards.column("bytes")) for manifest in self.manifests]
        return sum(lanes * size for lanes, size in zip(self.lanes, largest, strict=True))


def find_data(config: Config) -> TrainData:
    """Read the manifests of a run's datasets and check that they give what the configuration asks for.

    Raises ConfigError or DataError with the key to change.
    """
    data, global_batch = config.data, config.train.global_batch
    if not data.uris:
        raise ConfigError(
            "data.uri is not set; give the dataset that `rddm pack` wrote, for example data.uri=data/train"
        )
    retry = RetryPolicy(deadline_s=data.read_deadline_s)
    manifests = tuple(Manifest.load(uri, retry=retry) for uri in data.uris)
    rows = row_settings(data, targets_only=config.diffusion.generate)
    rows.check(data.uris, manifests)
    weights = data.weights or tuple(float(manifest.num_samples) for manifest in manifests)
    num_shards = [len(manifest.shards) for manifest in manifests]
    if len(manifests) == 1:
        lanes: tuple[int, ...] = (data.lanes or choose_lanes(num_shards[0], global_batch),)
    elif data.lanes:
        raise ConfigError(f"data.lanes={data.lanes} is for a single dataset; leave it at 0 with several in data.uri")
    else:
        lanes = choose_mixture_lanes(num_shards, weights=weights, global_batch=global_batch)
    cache_bytes = int(data.cache_gb * 1e9)
    largest = max(size for manifest in manifests for size in manifest.shards.column("bytes"))
    if 0 < cache_bytes < largest:
        raise ConfigError(
            f"data.cache_gb={data.cache_gb:g} holds no shard of {largest / 1e9:.3g} GB; raise it, or set it to 0 for "
            "range reads"
        )
    return TrainData(data.uris, manifests, weights, lanes, rows, cache_bytes)


def absent_datasets(config: Config) -> tuple[str, ...]:
    """The training datasets that the configuration names in local folders that do not exist."""
    return tuple(uri for uri in config.data.uris if "://" not in uri and not Path(uri).exists())


def row_settings(data: DataSection, *, targets_only: bool) -> RowSettings:
    return RowSettings(
        crop=data.crop_schedule,
        flip=data.flip,
        rotate=data.rotate,
        preprocess=make_preprocess(data),
        degrade=parse_degradation(data.degrade) if data.degrade else None,
        targets_only=targets_only,
    )


def make_preprocess(data: DataSection) -> Preprocess:
    """What is done to whole images, in training as in restoring."""
    return Preprocess(**data.preprocess.model_dump())


def open_loader(config: Config, data: TrainData, plan: BatchPlan, *, rank: int, start_step: int) -> TrainLoader:
    """This worker's batches from `start_step` on."""
    settings = config.data
    retry = RetryPolicy(deadline_s=settings.read_deadline_s)
    cache = None
    if data.cache_bytes:
        cache = NodeCache(_cache_dir(settings), data.cache_bytes, retry)
    datasets = [
        # Every lane keeps one shard open, two where it changes over.
        Dataset(uri, manifest, cache=cache, retry=retry, open_indexes=2 * lanes + 8)
        for uri, manifest, lanes in zip(data.uris, data.manifests, data.lanes, strict=True)
    ]
    return build_train_loader(
        datasets,
        data.rows,
        seed=config.train.seed,
        global_batch=plan.global_batch,
        lanes=data.lanes,
        weights=data.weights,
        share=Share(rank, plan.world_size, plan.rows_per_rank),
        start_step=start_step,
        pace=Pace(settings.threads, settings.prefetch_batches, settings.prefetch_mb * 10**6),
    )


def _cache_dir(settings: DataSection) -> Path:
    return Path(settings.cache_dir or Path(tempfile.gettempdir()) / f"rddm-{os.getuid()}")
