"""Previews during training: a few fixed images restored or generated with the EMA weights, as a grid and a PSNR."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.degradations import parse_degradation
from data_pipeline.errors import DataError
from data_pipeline.preprocess import Preprocess
from data_pipeline.reader import Dataset
from data_pipeline.records import Sample
from data_pipeline.retry import RetryPolicy
from data_pipeline.rng import stable_id
from rddm_dist.config import Config
from rddm_dist.evaluation.generate import Generator, make_grid
from rddm_dist.evaluation.protocol import PROTOCOLS, score
from rddm_dist.evaluation.restore import Restorer, restore_settings
from rddm_dist.factory import make_net, make_sampling_schedule
from rddm_dist.training.data import make_preprocess
from rddm_dist.training.prepare import Prepared


class Preview:
    """The first readable samples of the evaluation data (else of the training data), made as training makes them.

    Cut to their centre and kept in memory. A run that learns to generate shows the images of the first numbers instead,
    made in the size of training and then cut, and reads no data.
    """

    def __init__(self, prepared: Prepared) -> None:
        config = self._config = prepared.config
        if config.diffusion.generate:
            data = prepared.data
            self._size = data.rows.shape(data.manifests, data.rows.crop[max(data.rows.crop)])
            return
        uri = config.data.eval_uri or config.data.uris[0]
        dataset = Dataset(uri, retry=RetryPolicy(deadline_s=config.data.read_deadline_s))
        samples = [_prepare(sample, config) for sample in dataset.first(config.sample.images)]
        if not samples:
            raise DataError(f"no sample of {uri} can be read; look at it with rddm doctor data")
        size = min(config.sample.size, *(side for sample in samples for side in sample.target.shape[:2]))
        self._ids = [stable_id(sample.key) for sample in samples]
        self._inputs = np.stack([_center(sample.input, size) for sample in samples if sample.input is not None])
        self._targets = np.stack([_center(sample.target, size) for sample in samples])
        self._input_psnr = _mean_psnr(self._inputs, self._targets)
        masks = [_center(sample.mask, size) for sample in samples if sample.mask is not None]
        self._masks = np.stack(masks) if masks else None

    def make(self, state: dict[str, Tensor]) -> tuple[dict[str, float], Image.Image]:
        """Restore with these weights.   -> metrics, and a grid with a row per image: input, restored, target

        Of generated images there is nothing to measure: no metrics, and a grid that is nearly square.
        """
        config = self._config
        net = make_net(config)
        net.load_state_dict(state)
        if config.diffusion.generate:
            generator = Generator(net, make_sampling_schedule(config), restore_settings(config), size=self._size)
            side = min(config.sample.size, *self._size)
            images = [_center(image, side) for image in generator.generate(range(config.sample.images))]
            return {}, make_grid(np.stack(images))
        # The images are preprocessed already: whole, and then cut.
        settings = replace(restore_settings(config), preprocess=Preprocess())
        restored = Restorer(net, make_sampling_schedule(config), settings).restore(self._inputs, self._ids, self._masks)
        rows = [np.concatenate(row, axis=1) for row in zip(self._inputs, restored, self._targets, strict=True)]
        metrics = {"preview/psnr": _mean_psnr(restored, self._targets), "preview/input_psnr": self._input_psnr}
        return metrics, Image.fromarray(np.concatenate(rows, axis=0))


def _prepare(sample: Sample, config: Config) -> Sample:
    """The sample as training sees it: preprocessed whole; with data.degrade, its input made from the target by key."""
    preprocess = make_preprocess(config.data)
    target = preprocess.apply(sample.target, field="target")
    if config.data.degrade:
        ids = torch.tensor([stable_id(sample.key)])
        inputs, masks = parse_degradation(config.data.degrade).apply(target[None], seed=config.train.seed, ids=ids)
        return replace(sample, input=inputs[0], target=target, mask=None if masks is None else masks[0])
    assert sample.input is not None, "checked when the run was prepared"
    mask = None if sample.mask is None else preprocess.apply(sample.mask, field="mask")
    return replace(sample, input=preprocess.apply(sample.input, field="input"), target=target, mask=mask)


def _mean_psnr(images: np.ndarray, targets: np.ndarray) -> float:
    """Mean over images of PSNR in dB.   images, targets: (B, H, W, 3) uint8"""
    pairs = zip(images, targets, strict=True)
    return float(np.mean([score(PROTOCOLS["rgb"], x, y, metrics=("psnr",))["psnr"] for x, y in pairs]))


def _center(image: np.ndarray, size: int) -> np.ndarray:
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]
