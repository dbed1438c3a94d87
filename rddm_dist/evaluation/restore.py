"""Restoring 8-bit images of any size with a trained network; the noise belongs to the image, not to the batch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.errors import DataError, ModelError
from data_pipeline.preprocess import Preprocess
from data_pipeline.rng import Draws
from rddm_dist.diffusion.path import PathChoice
from rddm_dist.diffusion.sampler import check_sampling, sample
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.model.folding import folded
from rddm_dist.model.net import Network

if TYPE_CHECKING:
    from rddm_dist.config import Config
    from rddm_dist.loading import Model

NOT_FINITE = "the network's output is not finite: the weights are damaged or the training diverged"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RestoreSettings:
    """How a network is sampled; `describe()` goes into report.json beside the protocol.

    `schedule` is for the record: the settings that the tables of training were made of, and under "sampling" those that
    replace them.
    """

    objective: str
    steps: int = 5
    eta: float = 0.0
    seed: int = 0
    update: str = "pred_noise"
    path: PathChoice = "simultaneous"
    use: str = "all"
    process: str = "rddm"
    generate: bool = False
    self_condition: bool = False
    clip_residual: tuple[float, float] = (-2.0, 2.0)
    time_input: str = "index"
    preprocess: Preprocess = Preprocess()
    schedule: Mapping[str, Any] = field(default_factory=dict)

    def check(self, schedule: Schedule) -> None:
        """Raise ConfigError where they cannot be sampled with these tables."""
        check_sampling(
            schedule,
            objective=self.objective,
            steps=self.steps,
            eta=self.eta,
            update=self.update,
            process=self.process,
            path=self.path,
            use=self.use,
        )

    def check_restoring(self) -> None:
        """Raise ModelError for a network that restores nothing."""
        if self.generate:
            raise ModelError(
                "this model generates images from noise alone (diffusion.generate=true) and restores none; use "
                "rddm sample, or rddm evaluate --num N"
            )

    def check_generating(self) -> None:
        """Raise ModelError for a network that generates nothing."""
        if not self.generate:
            raise ModelError(
                "this model restores degraded images and generates none; use rddm restore, or a model trained with "
                "diffusion.generate=true"
            )

    def describe(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**vars(self), "clip_residual": list(self.clip_residual), "preprocess": asdict(self.preprocess)}


class NetSampler:
    """A network ready to be sampled: its filters folded once, its tables on its device.

    The network that was given stays as it is and where it is.
    """

    def __init__(
        self,
        net: Network,
        schedule: Schedule,
        settings: RestoreSettings,
        *,
        device: str | torch.device | None = None,
        precision: str = "fp32",
    ) -> None:
        settings.check(schedule)
        self.device = next(net.parameters()).device if device is None else torch.device(device)
        # Folded where it lies, so that a GPU holds the folded filters alone.
        self._net = folded(net).to(self.device)
        self._schedule, self._settings = schedule.to(self.device), settings
        self._precision = precision
        self.multiple_of = net.multiple_of

    def __call__(
        self, x_in: Tensor, ids: Sequence[int], mask: Tensor | None = None, *, seed: int | None = None
    ) -> Tensor:
        """x_in: (B, C, H, W) float32 in [-1, 1] on the device, H and W multiples of `multiple_of`; of a generating
        network its shape alone counts; ids: B ids that decide the noise; mask: (B, 1, H, W) float32 in [0, 1] or None;
        seed: other than that of the settings  ->  (B, C, H, W) float32 in [-1, 1]."""
        settings = self._settings
        seed = settings.seed if seed is None else seed
        return sample(
            self._forward,
            self._schedule,
            objective=settings.objective,
            x_in=x_in,
            steps=settings.steps,
            draws=Draws(
                settings.seed if seed is None else seed, torch.tensor(list(ids), dtype=torch.int64), str(self.device)
            ),
            eta=settings.eta,
            mask=mask,
            update=settings.update,
            clip_residual=settings.clip_residual,
            time_input=settings.time_input,
            generate=settings.generate,
            process=settings.process,
            self_condition=settings.self_condition,
            path=settings.path,
            use=settings.use,
        )

    def _forward(self, *inputs: Any) -> list[Tensor]:
        """The network's outputs in float32; the sampler's own arithmetic is float32 whatever the network runs in."""
        if self._precision == "fp32":
            return list(self._net(*inputs))
        with torch.autocast(self.device.type, AUTOCAST[self._precision]):
            return [output.float() for output in self._net(*inputs)]


class Restorer:
    """A network with its schedule and sampler settings, from 8-bit images to 8-bit images."""

    def __init__(
        self,
        net: Network,
        schedule: Schedule,
        settings: RestoreSettings,
        *,
        device: str | torch.device | None = None,
        precision: str = "fp32",
    ) -> None:
        settings.check_restoring()
        self._sampler = NetSampler(net, schedule, settings, device=device, precision=precision)
        self.settings = settings

    def restore(self, images: np.ndarray, ids: Sequence[int], masks: np.ndarray | None = None) -> np.ndarray:
        """Restore images of one size: those of `restore_levels`, rounded.   -> (B, H, W, 3) uint8

        Raises ModelError for what is not finite.
        """
        return to_images(self._restore(images, ids, masks, seed=None))

    def restore_levels(
        self, images: np.ndarray, ids: Sequence[int], masks: np.ndarray | None = None, *, seed: int | None = None
    ) -> np.ndarray:
        """Restore images of one size, without rounding.   -> (B, H, W, 3) float32, 255 (x0 + 1) / 2 or not finite

        seed: other than that of the settings; the rest: see `_restore`.
        """
        return to_levels(self._restore(images, ids, masks, seed=seed))

    def _restore(self, images: np.ndarray, ids: Sequence[int], masks: np.ndarray | None, *, seed: int | None) -> Tensor:
        """x0 of images of one size.

        images: (B, H, W, 3) uint8; ids: B ids of the images (`stable_id(key)`), which decide their noise;
        masks: (B, H, W) or (B, H, W, 1) uint8 or None  ->  (B, 3, H, W) float32.
        The network sees the images preprocessed as in training, then padded at the bottom and the right to the multiple
        it needs; padding is cut off again, a resized image stays as it is, resize x resize. An image's noise does not
        depend on padding, batch or device.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise DataError(f"images must be (B, H, W, 3) uint8, got {images.shape} {images.dtype}")
        if len(ids) != len(images):
            raise DataError(f"{len(images)} images need as many ids, got {len(ids)}")
        preprocess, device = self.settings.preprocess, self._sampler.device
        if masks is not None:
            masks = _check_masks(masks, images.shape[:3])
        height, width = (preprocess.resize, preprocess.resize) if preprocess.resize else images.shape[1:3]
        if not preprocess.is_identity:
            images = np.stack([preprocess.apply(image, field="input") for image in images])
            masks = None if masks is None else np.stack([preprocess.apply(mask, field="mask") for mask in masks])
        x_in = torch.tensor(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        mask = None
        if masks is not None:
            mask = torch.tensor(masks).to(device).permute(0, 3, 1, 2).float() / 255.0
            mask = pad_to_multiple(mask, self._sampler.multiple_of)
        x0 = self._sampler(pad_to_multiple(x_in, self._sampler.multiple_of), ids, mask, seed=seed)
        return x0[..., :height, :width]

    def as_restored(self, image: np.ndarray) -> np.ndarray:
        """An image in the geometry of the restored ones, for comparing: resized where they are.   (H, W, C) uint8"""
        return self.settings.preprocess.apply(image, field="target") if self.settings.preprocess.resize else image


def _check_masks(masks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(B, H, W, 1) of the masks for images of shape (B, H, W)."""
    if masks.dtype != np.uint8 or masks.shape not in (shape, (*shape, 1)):
        raise DataError(f"masks for these images must be {shape} uint8, got {masks.shape} {masks.dtype}")
    return masks.reshape(*shape, 1)


def to_images(x0: Tensor) -> np.ndarray:
    """(B, C, H, W) float in [-1, 1]  ->  (B, H, W, C) uint8, rounded; ModelError for what is not finite."""
    if not bool(torch.isfinite(x0).all()):
        raise ModelError(NOT_FINITE)
    pixels = ((x0 + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def be_exact_on_gpu() -> None:
    """Let fp32 mean fp32 in this process (by default convolutions round to TF32), with the same kernels every time."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def to_levels(x0: Tensor) -> np.ndarray:
    """(B, C, H, W) float in [-1, 1]  ->  (B, H, W, C) float32 in [0, 255], neither rounded nor checked."""
    return ((x0 + 1.0) * 127.5).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def round_levels(levels: np.ndarray) -> np.ndarray:
    """Finite levels as the 8-bit image that `to_images` makes of them.   (..., 3) float32  ->  uint8"""
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image as PNG, whole or not at all, with the folders it lies in.   image: (H, W, 3) uint8"""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(image).save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
        generate=config.diffusion.generate,
        self_condition=config.model.self_condition,
        clip_residual=config.diffusion.residual_clip,
        time_input=config.diffusion.time_input,
        preprocess=Preprocess(**config.data.preprocess.model_dump()),
        schedule={
            **config.diffusion.schedule.model_dump(),
            "num_timesteps": config.diffusion.num_timesteps,
            "sum_scale": config.diffusion.sum_scale,
            "parity": config.diffusion.parity,
            "sampling": config.sample.schedule.model_dump(),
        },
    )


def make_restorer(
    model: Model,
    *,
    steps: int | None = None,
    eta: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "fp32",
) -> Restorer:
    """A restorer for a loaded model; None takes the model's own sample.steps and sample.eta."""
    settings = restore_settings(model.config, steps=steps, eta=eta, seed=seed)
    return Restorer(model.net, model.schedule, settings, device=device, precision=precision)


def load_restorer(
    path: str | Path,
    *,
    steps: int | None = None,
    eta: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    overrides: Sequence[str] = (),
) -> Restorer:
    """A restorer from a .safetensors export, a run folder or a checkpoint; see `rddm_dist.loading.load_model`."""
    from rddm_dist.loading import load_model

    return make_restorer(load_model(str(path), overrides=overrides), steps=steps, eta=eta, seed=seed, device=device)
