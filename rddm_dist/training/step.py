"""One optimizer step: micro-batches of the global batch through loss and backward, then the update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.rng import Draws
from rddm_dist import comm
from rddm_dist.config import DiffusionSection, OptimSection
from rddm_dist.diffusion.objective import training_loss
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.training.engine import Engine


@dataclass(frozen=True)
class StepResult:
    """What all workers know after a step. `loss`: mean over the global batch; with `is_finite` False nothing was
    updated. `has_bad_samples`: whether a row of the global batch, on any worker, had to be replaced."""

    loss: float
    is_finite: bool
    must_stop: bool
    has_bad_samples: bool


def learning_rate(step: int, settings: OptimSection) -> float:
    """Learning rate of optimizer step `step` (1, 2, ...): a function of the step alone."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = min(1.0, (step - settings.warmup_steps) / (settings.decay_steps - settings.warmup_steps))
    ratio = settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.lr * ratio


def to_unit_range(images: Tensor, device: torch.device) -> Tensor:
    """(B, C, H, W) uint8 -> float32 in [-1, 1], channels first in memory as the network computes."""
    return images.to(device, non_blocking=True).float().contiguous().div_(127.5).sub_(1.0)


def train_step(
    engine: Engine,
    schedule: Schedule,
    batch: Batch,
    *,
    diffusion: DiffusionSection,
    self_condition: bool,
    seed: int,
    lr: float,
    wants_stop: bool,
) -> StepResult:
    """Run one global batch through the network and update it.

    `batch` holds this rank's rows; filler rows have weight 0. Timesteps and noise are drawn by run position, so they do
    not depend on how rows are spread. The one collective sums loss and flags before the update: a non-finite loss
    leaves the weights as they were, on every worker alike.
    """
    plan, device = engine.plan, engine.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    flags: list[float] = []
    for micro in range(plan.accumulation):
        rows = slice(micro * plan.micro_batch, (micro + 1) * plan.micro_batch)
        x0 = to_unit_range(batch.target[rows], device)
        losses = training_loss(
            engine,
            schedule,
            objective=diffusion.objective,
            x0=x0,
            # Without inputs the images are generated: the degraded image is 0.
            x_in=torch.zeros_like(x0) if batch.input is None else to_unit_range(batch.input[rows], device),
            draws=Draws(seed=seed, ids=batch.positions[rows], device=str(device)),
            weight=batch.weight[rows].to(device),
            mask=None if batch.mask is None else batch.mask[rows].to(device).float().div_(255.0),
            loss=diffusion.loss,
            time_input=diffusion.time_input,
            process=diffusion.process,
            self_condition=self_condition,
            clip_residual=diffusion.residual_clip,
        )
        engine.backward(losses.sum() * plan.loss_scale)
        total += losses.detach().double().sum()
        if micro == plan.accumulation - 1:
            loss_sum = float(total)
            own = [loss_sum, float(not math.isfinite(loss_sum)), float(wants_stop), float(len(batch.replaced))]
            flags = comm.sum_floats(own)
            if flags[1]:
                return StepResult(loss=math.nan, is_finite=False, must_stop=True, has_bad_samples=flags[3] > 0)
        engine.step(lr=lr)
    return StepResult(
        loss=flags[0] / plan.global_batch, is_finite=True, must_stop=flags[2] > 0, has_bad_samples=flags[3] > 0
    )
