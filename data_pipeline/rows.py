"""From places in datasets to the rows of a batch: read, decode the window, augment, degrade, replace what is bad."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Replaced
from data_pipeline.decode import Window
from data_pipeline.degradations import Degradation
from data_pipeline.errors import BadSample, ConfigError, DataError
from data_pipeline.index import Entry
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import Mixture
from data_pipeline.preprocess import Preprocess
from data_pipeline.reader import Dataset
from data_pipeline.records import decode_member
from data_pipeline.transforms import Augments, place_window, turn_rows

log = logging.getLogger(__name__)

# A bad sample at place q of its dataset's run is replaced by the one at q + 7919, q + 2 * 7919, ...: a function of the
# position alone.
SUBSTITUTE_STRIDE = 7919
MAX_SUBSTITUTES = 16
CHANNELS = {"input": 3, "target": 3, "mask": 1}
# What degrading may take per thread, and about what a pixel takes: float32 images with a few copies on the way.
WORK_BYTES, WORK_BYTES_PER_PIXEL = 64 << 20, 64


@dataclass(frozen=True)
class RowSettings:
    """What becomes of a sample.

    crop: side of the random window in pixels by the batch it starts with, {0: 128, 50000: 192}; side 0: whole images,
    all of one size. flip, rotate: mirror images, quarter turns. preprocess: done to whole images first. degrade: makes
    the input (and mask) from the target, anew at every position; stored inputs are not read then. targets_only: of
    each sample the target alone, for generation.
    """

    crop: Mapping[int, int] = field(default_factory=lambda: {0: 0})
    flip: bool = True
    rotate: bool = False
    preprocess: Preprocess = Preprocess()
    degrade: Degradation | None = None
    targets_only: bool = False

    def fields(self, manifest: Manifest) -> tuple[str, ...]:
        """What is read of each sample."""
        return ("target",) if self.targets_only or self.degrade is not None else manifest.fields

    def outputs(self, manifest: Manifest) -> tuple[str, ...]:
        """What a batch holds."""
        if self.degrade is None:
            return self.fields(manifest)
        return ("input", "target", "mask") if self.degrade.has_mask else ("input", "target")

    def check(self, uris: Sequence[str], manifests: Sequence[Manifest]) -> None:
        """Raise ConfigError where the datasets cannot give such rows."""
        if self.degrade is not None and self.preprocess.equalize:
            raise ConfigError(
                "data.degrade with data.preprocess.equalize: inputs made from windows have no whole histogram; pack "
                "the degraded images instead"
            )
        for uri, manifest in zip(uris, manifests, strict=True):
            if "input" not in self.outputs(manifest) and not self.targets_only:
                raise ConfigError(
                    f"{uri} holds clean images only; set data.degrade, for example noise(sigma=25), or "
                    "diffusion.generate=true to generate such images"
                )
            if self.outputs(manifest) != self.outputs(manifests[0]):
                first, other = (", ".join(self.outputs(given)) for given in (manifests[0], manifest))
                raise ConfigError(f"{uris[0]} gives {first}, {uri} {other}; datasets of one run must agree")
        if min(self.crop, default=1) != 0:
            raise ConfigError(f"data.crop={dict(self.crop)} must say what holds from step 0 on")
        self._check_sizes(uris, manifests)

    def shape(self, manifests: Sequence[Manifest], crop: int) -> tuple[int, int]:
        """Height and width of a batch's images."""
        first = manifests[0]
        return (crop, crop) if crop else self.preprocess.output_size(first.min_height, first.min_width)

    def _check_sizes(self, uris: Sequence[str], manifests: Sequence[Manifest]) -> None:
        whole = self.shape(manifests, 0)
        for uri, manifest in zip(uris, manifests, strict=True):
            low = self.preprocess.output_size(manifest.min_height, manifest.min_width)
            high = self.preprocess.output_size(manifest.max_height, manifest.max_width)
            for crop in self.crop.values():
                if crop < 0 or crop > min(low):
                    raise ConfigError(
                        f"data.crop={crop}: {uri} holds images of {manifest.describe_sizes()}; set data.crop to 0 or "
                        f"1..{min(low)}"
                    )
                if not crop and not whole == low == high:
                    raise ConfigError(
                        f"data.crop=0 needs images of one size, {uri} holds {manifest.describe_sizes()}; set data.crop "
                        f"to 1..{min(low)}"
                    )
                if self.rotate and not crop and whole[0] != whole[1]:
                    raise ConfigError(
                        f"data.rotate=true needs square images or data.crop; {uri} is {whole[1]}x{whole[0]}"
                    )


class Row(NamedTuple):
    """A row of a batch: its position in the run, its place in a dataset, and where its window lies (parts of 1)."""

    position: int
    dataset: int
    shard_index: int
    offset: int
    top: float
    left: float


# What reading a row yields, before anything is decoded.
Fetched = tuple[Entry, dict[str, tuple[str, bytes]]]


class RowReader:
    """Fills rows of batches; any number of threads may call it."""

    def __init__(self, datasets: Sequence[Dataset], mixture: Mixture, settings: RowSettings, *, seed: int) -> None:
        self._datasets, self._mixture, self._settings, self._seed = datasets, mixture, settings, seed
        self._manifests = [dataset.manifest for dataset in datasets]
        self._fields = settings.fields(self._manifests[0])
        # Pixels a degradation needs around its window.
        self._reach = settings.degrade.reach if settings.degrade is not None else 0
        self._reported: set[tuple[int, str]] = set()
        self._lock = threading.Lock()

    def allocate(self, num_rows: int, crop: int) -> dict[str, Tensor]:
        """Empty images of a batch.   -> field -> (num_rows, H, W, C) uint8"""
        height, width = self._settings.shape(self._manifests, crop)
        fields = self._settings.outputs(self._manifests[0])
        return {name: torch.empty((num_rows, height, width, CHANNELS[name]), dtype=torch.uint8) for name in fields}

    def batch_bytes(self, num_rows: int, crop: int) -> int:
        """Bytes of a batch's pixels."""
        height, width = self._settings.shape(self._manifests, crop)
        fields = self._settings.outputs(self._manifests[0])
        return num_rows * height * width * sum(CHANNELS[name] for name in fields)

    def chunk_rows(self, crop: int, *, most: int) -> int:
        """Rows to fill at once: fewer where degradations need large windows around them."""
        if self._settings.degrade is None:
            return most
        height, width = self._settings.shape(self._manifests, crop)
        reach = self._reach if crop else 0
        return max(1, min(most, WORK_BYTES // (WORK_BYTES_PER_PIXEL * (height + 2 * reach) * (width + 2 * reach))))

    def fetch(self, dataset: int, shard_index: int, offset: int) -> Fetched:
        """The encoded images of a sample. Raises BadSample, and DataError for a lost shard."""
        entry = self._datasets[dataset].index(shard_index)[offset]
        return entry, self._datasets[dataset].read(shard_index, entry, self._fields)

    def fill(
        self,
        images: Mapping[str, Tensor],
        rows: Sequence[Row],
        augments: Augments,
        *,
        crop: int,
        fetched: Sequence[Future[Fetched]] | None = None,
    ) -> tuple[list[str], list[Replaced]]:
        """Fill rows of a batch.   images: field -> (n, H, W, C) uint8, written; rows, augments: n each

        fetched: reads that were started ahead. -> the rows' keys, and the bad samples that were met
        """
        reach = self._reach if crop else 0
        decoded = dict(images)
        if reach:
            side = crop + 2 * reach
            decoded["target"] = torch.empty((len(rows), side, side, 3), dtype=torch.uint8)
        arrays = {name: decoded[name].numpy() for name in self._fields}
        keys: list[str] = []
        replaced: list[Replaced] = []
        for number, row in enumerate(rows):
            future = fetched[number] if fetched is not None else None
            pixels = {name: array[number] for name, array in arrays.items()}
            keys.append(self._fill_row(pixels, row, future, replaced, crop=crop, reach=reach))
        for name in self._fields:
            turn_rows(decoded[name], augments)
        if self._settings.degrade is not None:
            positions = torch.tensor([row.position for row in rows])
            self._degrade(images, decoded["target"], positions, reach=reach)
        return keys, replaced

    def _degrade(self, images: Mapping[str, Tensor], targets: Tensor, positions: Tensor, *, reach: int) -> None:
        assert self._settings.degrade is not None
        inputs, masks = self._settings.degrade.apply(targets.numpy(), seed=self._seed, ids=positions, margin=reach)
        height, width = images["target"].shape[1:3]
        images["input"].numpy()[:] = inputs
        images["target"].numpy()[:] = targets.numpy()[:, reach : reach + height, reach : reach + width]
        if masks is not None:
            images["mask"].numpy()[:] = masks

    def _fill_row(
        self,
        pixels: Mapping[str, np.ndarray],
        row: Row,
        future: Future[Fetched] | None,
        replaced: list[Replaced],
        *,
        crop: int,
        reach: int,
    ) -> str:
        """Fill one row with its sample, or with the first sound one among its substitutes.   -> the key"""
        shard_index, offset = row.shard_index, row.offset
        for attempt in range(1 + MAX_SUBSTITUTES):
            if attempt:
                shard_index, offset = self._substitute(row, attempt)
            try:
                is_ahead = future is not None and not attempt
                entry, members = future.result() if is_ahead else self.fetch(row.dataset, shard_index, offset)  # type: ignore[union-attr]
                self._decode(pixels, entry, members, row, crop=crop, reach=reach)
                return entry.key
            except BadSample as error:
                key = self._datasets[row.dataset].index(shard_index)[offset].key
                replaced.append(Replaced(row.position, row.dataset, shard_index, offset, key, str(error)))
                self._report(row.dataset, key, str(error))
        raise DataError(
            f"{self._datasets[row.dataset].uri}: {1 + MAX_SUBSTITUTES} samples in a row cannot be read, the last: "
            f"{replaced[-1].reason}"
        )

    def _decode(
        self,
        pixels: Mapping[str, np.ndarray],
        entry: Entry,
        members: Mapping[str, tuple[str, bytes]],
        row: Row,
        *,
        crop: int,
        reach: int,
    ) -> None:
        preprocess, stored = self._settings.preprocess, (entry.height, entry.width)
        shape = preprocess.output_size(*stored)
        if min(shape) < crop or (not crop and shape != pixels["target"].shape[:2]):
            raise BadSample(
                f"{entry.key} is {entry.width}x{entry.height}, which the manifest's range of sizes excludes"
            )
        window = place_window(row.top, row.left, shape=shape, crop=crop)
        inner = _grow(window, reach, shape) if reach else window
        for name, member in members.items():
            if preprocess.is_identity:
                image = decode_member(entry.key, name, member, shape=stored, window=inner)
            else:
                image = inner.cut(preprocess.apply(decode_member(entry.key, name, member, shape=stored), field=name))
            pixels[name][:] = _reflect(image, inner, window, reach) if reach else image

    def _substitute(self, row: Row, attempt: int) -> tuple[int, int]:
        _, own = self._mixture.split(np.array([row.position]))
        places = self._mixture.locate_in(row.dataset, own + attempt * SUBSTITUTE_STRIDE)
        return int(places.shard[0]), int(places.offset[0])

    def _report(self, dataset: int, key: str, reason: str) -> None:
        with self._lock:
            is_new = (dataset, key) not in self._reported
            self._reported.add((dataset, key))
        if is_new:
            log.warning("bad sample, another one takes its place: %s", reason)


def _grow(window: Window, reach: int, shape: tuple[int, int]) -> Window:
    """The window with `reach` pixels on each side, as far as the image of `shape` goes."""
    top, left = max(window.top - reach, 0), max(window.left - reach, 0)
    return Window(top, left, min(window.bottom + reach, shape[0]) - top, min(window.right + reach, shape[1]) - left)


def _reflect(image: np.ndarray, inner: Window, window: Window, reach: int) -> np.ndarray:
    """The grown window with what lies beyond the image's edges mirrored in, as degradations mirror them."""
    above, before = inner.top - (window.top - reach), inner.left - (window.left - reach)
    below, after = window.bottom + reach - inner.bottom, window.right + reach - inner.right
    if not (above or before or below or after):
        return image
    return np.pad(image, ((above, below), (before, after), (0, 0)), mode="symmetric")
