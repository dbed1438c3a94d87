"""Restoring 8-bit images of any size with a trained network; the noise belongs to the image, not to the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.errors import DataError, ModelError
from data_pipeline.preprocess import Preprocess
from data_pipeline.rng import Draws
from rddm_dist.diffusion.path import PathChoice
from rddm_dist.diffusion.sampler import check_sampling, sample
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.model.net import Network

if TYPE_CHECKING:
    from rddm_dist.config import Config
    from rddm_dist.loading import Model


@dataclass(frozen=True)
class RestoreSettings:
    """How a network is sampled; `describe()` goes into report.json beside the protocol."""

    objective: str
    steps: int = 5
    eta: float = 0.0
    seed: int = 0
    update: str = "pred_noise"
    path: PathChoice = "simultaneous"
    use: str = "all"
    process: str = "rddm"
    self_condition: bool = False
    clip_residual: tuple[float, float] = (-2.0, 2.0)
    time_input: str = "index"
    preprocess: Preprocess = Preprocess()

    def describe(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**vars(self), "clip_residual": list(self.clip_residual), "preprocess": asdict(self.preprocess)}


class Restorer:
    """A network with its schedule and sampler settings; the tables follow the network's device."""

    def __init__(self, net: Network, schedule: Schedule, settings: RestoreSettings) -> None:
        check_sampling(
            schedule,
            objective=settings.objective,
            steps=settings.steps,
            eta=settings.eta,
            update=settings.update,
            process=settings.process,
            path=settings.path,
            use=settings.use,
        )
        self._device = next(net.parameters()).device
        self._net, self._schedule = net.eval(), schedule.to(self._device)
        self.settings = settings

    def restore(self, images: np.ndarray, ids: Sequence[int], masks: np.ndarray | None = None) -> np.ndarray:
        """Restore images of one size.

        images: (B, H, W, 3) uint8; ids: B ids of the images (`stable_id(key)`), which decide their noise;
        masks: (B, H, W) or (B, H, W, 1) uint8 or None  ->  (B, H, W, 3) uint8, round(255 (x0 + 1) / 2).
        The network sees the images preprocessed as in training, then padded at the bottom and the right to the multiple
        it needs; padding is cut off again, a resized image stays as it is, (B, resize, resize, 3). An image's noise
        does not depend on padding, batch or device.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise DataError(f"images must be (B, H, W, 3) uint8, got {images.shape} {images.dtype}")
        if len(ids) != len(images):
            raise DataError(f"{len(images)} images need as many ids, got {len(ids)}")
        preprocess = self.settings.preprocess
        if masks is not None:
            masks = masks.reshape(*images.shape[:3], 1)
        height, width = (preprocess.resize, preprocess.resize) if preprocess.resize else images.shape[1:3]
        if not preprocess.is_identity:
            images = np.stack([preprocess.apply(image, field="input") for image in images])
            masks = None if masks is None else np.stack([preprocess.apply(mask, field="mask") for mask in masks])
        x_in = torch.tensor(images).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        mask = None
        if masks is not None:
            mask = torch.tensor(masks).to(self._device).permute(0, 3, 1, 2).float() / 255.0
        x0 = sample(
            self._net,
            self._schedule,
            objective=self.settings.objective,
            x_in=pad_to_multiple(x_in, self._net.multiple_of),
            steps=self.settings.steps,
            draws=Draws(self.settings.seed, torch.tensor(list(ids), dtype=torch.int64), str(self._device)),
            eta=self.settings.eta,
            mask=None if mask is None else pad_to_multiple(mask, self._net.multiple_of),
            update=self.settings.update,
            clip_residual=self.settings.clip_residual,
            time_input=self.settings.time_input,
            process=self.settings.process,
            self_condition=self.settings.self_condition,
            path=self.settings.path,
            use=self.settings.use,
        )[..., :height, :width]
        if not bool(torch.isfinite(x0).all()):
            raise ModelError("the network's output is not finite: the weights are damaged or the training diverged")
        restored = ((x0 + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return restored.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def as_restored(self, image: np.ndarray) -> np.ndarray:
        """An image in the geometry of the restored ones, for comparing: resized where they are.   (H, W, C) uint8"""
        return self.settings.preprocess.apply(image, field="target") if self.settings.preprocess.resize else image


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Extend at the bottom and the right until H and W are multiples: mirrored, or the edge repeated where the image
    is smaller than the padding.   (B, C, H, W) float -> (B, C, H', W')"""
    height, width = x.shape[-2:]
    down, right = -height % multiple, -width % multiple
    x = F.pad(x, (0, right, 0, 0), mode="reflect" if right < width else "replicate")
    return F.pad(x, (0, 0, 0, down), mode="reflect" if down < height else "replicate")


def restore_settings(
    config: Config, *, steps: int | None = None, eta: float | None = None, seed: int = 0
) -> RestoreSettings:
    """How a model of this configuration is sampled; None takes its own sample.steps and sample.eta."""
    return RestoreSettings(
        objective=config.diffusion.objective,
        steps=config.sample.steps if steps is None else steps,
        eta=config.sample.eta if eta is None else eta,
        seed=seed,
        update=config.sample.update,
        path=config.sample.path,
        use=config.sample.use,
        process=config.diffusion.process,
        self_condition=config.model.self_condition,
        clip_residual=config.diffusion.residual_clip,
        time_input=config.diffusion.time_input,
        preprocess=Preprocess(**config.data.preprocess.model_dump()),
    )


def make_restorer(
    model: Model, *, steps: int | None = None, eta: float | None = None, seed: int = 0, device: str = "cpu"
) -> Restorer:
    """A restorer for a loaded model; None takes the model's own sample.steps and sample.eta."""
    settings = restore_settings(model.config, steps=steps, eta=eta, seed=seed)
    return Restorer(model.net.to(device), model.schedule, settings)


def load_restorer(
    path: str | Path, *, steps: int | None = None, eta: float | None = None, seed: int = 0, device: str = "cpu"
) -> Restorer:
    """A restorer from a .safetensors export, a run folder or a checkpoint; see `rddm_dist.loading.load_model`."""
    from rddm_dist.loading import load_model

    return make_restorer(load_model(str(path)), steps=steps, eta=eta, seed=seed, device=device)
