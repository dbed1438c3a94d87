"""One worker of an evaluation: it holds the model once and turns units into tables of rows."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.errors import BadSample, ModelError
from data_pipeline.rng import stable_id
from rddm_dist.evaluation import results
from rddm_dist.evaluation.allocator import keep_freed_memory
from rddm_dist.evaluation.cases import Extremes, make_case
from rddm_dist.evaluation.job import Job, Unit
from rddm_dist.evaluation.protocol import score
from rddm_dist.evaluation.restore import NOT_FINITE, Restorer, be_exact_on_gpu, make_restorer, round_levels
from rddm_dist.evaluation.sources import Images, open_source, pixel_digest

GENERATED_CASES = 24  # images of a generation that its report shows


class UnitRunner:
    """Runs units of a job.

    Raises ModelError where the weights are no longer those that the job names.
    """

    def __init__(self, job: Job) -> None:
        settings = job.settings
        torch.set_num_threads(settings.threads)
        if settings.device == "cpu":
            keep_freed_memory()
        else:
            be_exact_on_gpu()
        self._job, self._settings, self._protocol = job, settings, job.protocol
        self._device = settings.device
        self._source = open_source(job.source) if job.source else None
        self._extremes = Extremes()
        self._restorer: Restorer | None = None
        self._takes_mask = False
        self._lpips = self._features = None
        if settings.lpips and "lpips" in settings.pair_metrics:
            from rddm_dist.evaluation.features import load_lpips

            self._lpips = load_lpips(settings.lpips, device=self._device)
            self._require("lpips", settings.lpips, self._lpips.digest)
        if settings.features:
            from rddm_dist.evaluation.features import load_features

            self._features = load_features(settings.features, device=self._device)
            self._require("features", settings.features, self._features.digest)
        if job.model:
            self._load_model()

    def run(self, data: bytes) -> bytes:
        """A unit's bytes -> the bytes of its table."""
        unit = Unit.from_bytes(data)
        work = {
            "restoration": self._score, "files": self._score, "generation": self._generate, "features": self._look_at
        }  # fmt: skip
        rows = work[self._job.kind](unit)
        return results.to_bytes(results.make_table(rows, unit=unit.digest(self._job.digest)))

    def _require(self, kind: str, path: str, digest: str) -> None:
        """Raise ModelError where a node holds another network file than the one that the job names."""
        wanted = self._job.identity["networks"][kind]["sha256"]
        if digest != wanted:
            raise ModelError(
                f"--{kind} {path} is another file here than where the evaluation began ({digest[:12]}, not "
                f"{wanted[:12]}); give every machine the same one"
            )

    def _load_model(self) -> None:
        from rddm_dist.evaluation.generate import make_generator
        from rddm_dist.loading import load_model

        job, settings = self._job, self._settings
        model = load_model(job.model, overrides=settings.overrides)
        if model.digest != job.weights_digest:
            raise ModelError(
                f"{job.model} holds other weights than when the evaluation began ({model.digest[:12]}, not "
                f"{job.weights_digest[:12]}); evaluate a checkpoint that stays, or an export"
            )
        options: dict[str, Any] = {
            "steps": settings.steps,
            "eta": settings.eta,
            "seed": settings.seed,
            "device": self._device,
            "precision": settings.precision,
        }
        if job.kind == "generation":
            self._generator = make_generator(model, size=job.size, **options)
        else:
            self._restorer = make_restorer(model, **options)
            self._takes_mask = model.config.model.condition == "input_mask"

    def _read(self, unit: Unit) -> tuple[list[Images], list[dict[str, Any]]]:
        """The images of a unit, and a row for each that cannot be read."""
        assert self._source is not None, "who reads has a source"
        read, failed = [], []
        for entry in unit.entries:
            try:
                read.append(self._source.read(entry))
            except BadSample as error:
                failed.append({"key": entry.key, "name": entry.name, "kind": results.UNREADABLE, "error": str(error)})
        return read, failed

    def _score(self, unit: Unit) -> list[dict[str, Any]]:
        """Score what the model restores, or what another method has restored."""
        images, failed = self._read(unit)
        if not images:
            return failed
        if self._restorer is None:
            levels = [[image.restored.astype(np.float32)] for image in images if image.restored is not None]
            seconds = None
        else:
            levels, seconds = self._restore(images)
        rows = []
        for image, outputs in zip(images, levels, strict=True):
            row: dict[str, Any] = {"key": image.key, "name": image.name, "target_sha256": pixel_digest(image.target)}
            if image.input is not None:
                row["input_sha256"] = pixel_digest(image.input)
            if seconds is not None:
                row["seconds"] = seconds
            if not all(np.isfinite(output).all() for output in outputs):
                rows.append({**row, "kind": results.NOT_FINITE, "error": f"{image.name}: {NOT_FINITE}"})
                continue
            rows.append({**row, **self._score_image(image, outputs)})
        self._add_features(rows, images, levels)
        return [*rows, *failed]

    def _restore(self, images: Sequence[Images]) -> tuple[list[list[np.ndarray]], float]:
        """The levels of every image, one array per sample of it, and the seconds that an image took once."""
        assert self._restorer is not None, "a model restores"
        inputs = np.stack([image.input for image in images if image.input is not None])
        masks = [image.mask for image in images if image.mask is not None] if self._takes_mask else []
        stacked = np.stack(masks) if masks else None
        ids = [stable_id(image.key) for image in images]
        started = time.perf_counter()
        samples, seconds = [], 0.0
        for number in range(self._settings.samples):
            samples.append(self._restorer.restore_levels(inputs, ids, stacked, seed=self._settings.seed + number))
            seconds = seconds or (time.perf_counter() - started) / len(images)
        return [[sample[i] for sample in samples] for i in range(len(images))], seconds

    def _score_image(self, image: Images, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        """Scores of one image.   outputs: (H, W, 3) float32 levels, one per sample"""
        target, degraded = image.target, image.input
        if self._restorer is not None and not self._protocol.side:
            # Resized like the image that the network saw, where it saw one of another size.
            target = self._restorer.as_restored(target)
            degraded = None if degraded is None else self._restorer.as_restored(degraded)
        restored = round_levels(outputs[0])
        scores = self._compare(outputs[0], target, image.mask)
        before = {} if degraded is None else self._compare(degraded, target, image.mask)
        row: dict[str, Any] = {
            "width": restored.shape[1],
            "height": restored.shape[0],
            **{f"input_{name}": value for name, value in before.items() if not name.startswith("pixels")},
            **scores,
            "restored_sha256": hashlib.sha256(restored.tobytes()).hexdigest(),
        }
        mean = spread = None
        if len(outputs) > 1:
            stack = np.stack(outputs).astype(np.float64)
            mean_levels, spread = stack.mean(axis=0), stack.std(axis=0, ddof=1).mean(axis=-1)
            mean = round_levels(mean_levels)
            combined = self._compare(mean_levels.astype(np.float32), target, image.mask)
            row |= {
                f"mean{len(outputs)}_{name}": value for name, value in combined.items() if not name.startswith("pixels")
            }
            row["spread"] = float(spread.mean())
        if "psnr" in scores and self._extremes.add(scores["psnr"], image.key):
            case = make_case(image.key, input=degraded, restored=restored, target=target, mean=mean, spread=spread)
            row[results.CASE] = case.to_json()
        if self._job.keep_images:
            row[results.PNG] = _png(restored)
        return row

    def _compare(self, levels: np.ndarray, target: np.ndarray, mask: np.ndarray | None) -> dict[str, float]:
        """Scores of (H, W, 3) levels, rounded unless the protocol says otherwise."""
        image = levels if self._protocol.rounding == "float" or levels.dtype == np.uint8 else round_levels(levels)
        return score(self._protocol, image, target, mask=mask, metrics=self._settings.pair_metrics, lpips=self._lpips)

    def _generate(self, unit: Unit) -> list[dict[str, Any]]:
        numbers = [int(entry.key) for entry in unit.entries]
        started = time.perf_counter()
        levels = self._generator.generate_levels(numbers)
        seconds = (time.perf_counter() - started) / len(numbers)
        rows: list[dict[str, Any]] = []
        for entry, output in zip(unit.entries, levels, strict=True):
            row: dict[str, Any] = {"key": entry.key, "name": entry.key, "seconds": seconds}
            if np.isfinite(output).all():
                image = round_levels(output)
                row |= {"width": image.shape[1], "height": image.shape[0]}
                row["restored_sha256"] = hashlib.sha256(image.tobytes()).hexdigest()
                if self._job.keep_images:
                    row[results.PNG] = _png(image)
                if int(entry.key) < GENERATED_CASES:
                    row[results.CASE] = make_case(entry.key, restored=image).to_json()
            else:
                row |= {"kind": results.NOT_FINITE, "error": f"image {entry.key}: {NOT_FINITE}"}
            rows.append(row)
        self._attach(rows, "features", list(levels))
        return rows

    def _look_at(self, unit: Unit) -> list[dict[str, Any]]:
        """Features of images as they are."""
        images, failed = self._read(unit)
        rows: list[dict[str, Any]] = []
        for image in images:
            row: dict[str, Any] = {"key": image.key, "name": image.name, "target_sha256": pixel_digest(image.target)}
            row |= {"width": image.target.shape[1], "height": image.target.shape[0]}
            if self._job.shows_cases and self._extremes.add(stable_id(image.key), image.key):
                row[results.CASE] = make_case(image.key, restored=image.target).to_json()
            rows.append(row)
        self._attach(rows, "features", [image.target for image in images])
        return [*rows, *failed]

    def _add_features(
        self, rows: list[dict[str, Any]], images: Sequence[Images], levels: Sequence[Sequence[np.ndarray]]
    ) -> None:
        """Features of the restored images and of their targets, where set metrics are asked for."""
        if self._features is None:
            return
        self._attach(rows, "features", [outputs[0] for outputs in levels])
        as_restored = self._restorer.as_restored if self._restorer is not None else np.asarray
        self._attach(rows, "target_features", [as_restored(image.target) for image in images])

    def _attach(self, rows: list[dict[str, Any]], name: str, pixels: Sequence[np.ndarray]) -> None:
        """Put the feature vectors of images into those rows that did not fail.   pixels: (H, W, 3) levels or uint8"""
        if self._features is None:
            return
        chosen = [(row, round_levels(image)) for row, image in zip(rows, pixels, strict=True) if "kind" not in row]
        for group in _by_size(chosen):
            batch = torch.from_numpy(np.stack([image for _, image in group])).permute(0, 3, 1, 2).float()
            features, logits = self._features(batch.to(self._device))
            for i, (row, _) in enumerate(group):
                row[name] = features[i].float().cpu().numpy()
                if name == "features" and logits is not None and "is" in self._settings.set_metrics:
                    row["logits"] = logits[i].float().cpu().numpy()


def run_here(job: Job, units: Sequence[Unit]) -> Iterator[bytes]:
    """Run units in this process, one after the other."""
    runner = UnitRunner(job)
    for unit in units:
        yield runner.run(unit.to_bytes())


def _by_size(chosen: Sequence[tuple[Any, np.ndarray]]) -> list[list[tuple[Any, np.ndarray]]]:
    groups: dict[tuple[int, ...], list[tuple[Any, np.ndarray]]] = {}
    for row, image in chosen:
        groups.setdefault(image.shape, []).append((row, image))
    return list(groups.values())


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
