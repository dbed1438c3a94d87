"""Previews during training: a few fixed images restored with the EMA weights, as a grid and a PSNR."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.degradations import parse_degradation
from data_pipeline.reader import Dataset
from data_pipeline.records import Sample
from data_pipeline.rng import stable_id
from rddm_dist.config import Config
from rddm_dist.evaluation.protocol import PROTOCOLS, score
from rddm_dist.evaluation.restore import Restorer, RestoreSettings
from rddm_dist.factory import make_net, make_schedule
from rddm_dist.training.data import make_preprocess
from rddm_dist.training.prepare import Prepared


class Preview:
    """The first keys of the evaluation data (else of the training data), cut to their centre, kept in memory."""

    def __init__(self, prepared: Prepared) -> None:
        self._config = prepared.config
        config = prepared.config
        dataset = Dataset(config.data.eval_uri or config.data.uris[0])
        entries = dataset.images()[: config.sample.images]
        size = min(config.sample.size, *(side for entry in entries for side in (entry.width, entry.height)))
        samples = [_complete(dataset.whole(entry), config) for entry in entries]
        self._ids = [stable_id(sample.key) for sample in samples]
        self._inputs = np.stack([_center(sample.input, size) for sample in samples if sample.input is not None])
        self._targets = np.stack([_center(sample.target, size) for sample in samples])
        masks = [_center(sample.mask, size) for sample in samples if sample.mask is not None]
        self._masks = np.stack(masks) if masks else None

    def make(self, state: dict[str, Tensor]) -> tuple[dict[str, float], Image.Image]:
        """Restore with these weights.   -> metrics, and a grid with a row per image: input, restored, target"""
        config = self._config
        net = make_net(config.model)
        net.load_state_dict(state)
        settings = RestoreSettings(
            objective=config.diffusion.objective,
            steps=config.sample.steps,
            eta=config.sample.eta,
            clip_residual=config.diffusion.residual_clip,
            time_input=config.diffusion.time_input,
            preprocess=make_preprocess(config.data),
        )
        restorer = Restorer(net, make_schedule(config.diffusion), settings)
        restored = restorer.restore(self._inputs, self._ids, self._masks)
        inputs, targets = (
            np.stack([restorer.as_restored(image) for image in images]) for images in (self._inputs, self._targets)
        )
        rows = [np.concatenate(row, axis=1) for row in zip(inputs, restored, targets, strict=True)]
        metrics = {"preview/psnr": _mean_psnr(restored, targets), "preview/input_psnr": _mean_psnr(inputs, targets)}
        return metrics, Image.fromarray(np.concatenate(rows, axis=0))


def _complete(sample: Sample, config: Config) -> Sample:
    """The sample as pairs are made in training: a clean image gets an input, drawn by its key."""
    if sample.input is not None:
        return sample
    ids = torch.tensor([stable_id(sample.key)])
    inputs, masks = parse_degradation(config.data.degrade).apply(sample.target[None], seed=config.train.seed, ids=ids)
    return replace(sample, input=inputs[0], mask=None if masks is None else masks[0])


def _mean_psnr(images: np.ndarray, targets: np.ndarray) -> float:
    """Mean over images of PSNR in dB.   images, targets: (B, H, W, 3) uint8"""
    pairs = zip(images, targets, strict=True)
    return float(np.mean([score(PROTOCOLS["rgb"], x, y, metrics=("psnr",))["psnr"] for x, y in pairs]))


def _center(image: np.ndarray, size: int) -> np.ndarray:
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]
