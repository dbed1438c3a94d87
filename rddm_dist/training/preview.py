"""Previews during training: a few fixed images restored with the EMA weights, as a grid and a PSNR."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from data_pipeline.loader import eval_index, read_sample
from data_pipeline.manifest import Manifest
from data_pipeline.rng import stable_id
from rddm_dist.evaluation.protocol import PROTOCOLS, score
from rddm_dist.evaluation.restore import Restorer, RestoreSettings
from rddm_dist.factory import make_net, make_schedule
from rddm_dist.training.prepare import Prepared


class Preview:
    """The first keys of the evaluation data (else of the training data), cut to their centre, kept in memory."""

    def __init__(self, prepared: Prepared) -> None:
        self._config = prepared.config
        uri = prepared.config.data.eval_uri or prepared.config.data.uri
        manifest = Manifest.load(uri)
        size = min(prepared.config.sample.size, manifest.min_width, manifest.min_height)
        entries = eval_index(uri, manifest)[: prepared.config.sample.images]
        samples = [read_sample(uri, manifest, entry.shard_index, entry.offset) for entry in entries]
        self._ids = [stable_id(sample.key) for sample in samples]
        self._inputs = np.stack([_center(sample.input, size) for sample in samples])
        self._targets = np.stack([_center(sample.target, size) for sample in samples])
        self._input_psnr = _mean_psnr(self._inputs, self._targets)
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
        )
        restored = Restorer(net, make_schedule(config.diffusion), settings).restore(
            self._inputs, self._ids, self._masks
        )
        rows = [np.concatenate(row, axis=1) for row in zip(self._inputs, restored, self._targets, strict=True)]
        metrics = {"preview/psnr": _mean_psnr(restored, self._targets), "preview/input_psnr": self._input_psnr}
        return metrics, Image.fromarray(np.concatenate(rows, axis=0))


def _mean_psnr(images: np.ndarray, targets: np.ndarray) -> float:
    """Mean over images of PSNR in dB.   images, targets: (B, H, W, 3) uint8"""
    pairs = zip(images, targets, strict=True)
    return float(np.mean([score(PROTOCOLS["rgb"], x, y, metrics=("psnr",))["psnr"] for x, y in pairs]))


def _center(image: np.ndarray, size: int) -> np.ndarray:
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]
