"""One optimizer step: micro-batches of the global batch through loss and backward, then the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.rng import Draws
from rddm_dist import comm
from rddm_dist.config import DiffusionSection, OptimSection
from rddm_dist.diffusion.objective import output_losses
from rddm_dist.diffusion.prediction import OUTPUTS
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.training.engine import Engine
from rddm_dist.training.plan import BatchPlan


@dataclass(frozen=True)
class Word:
    """What a worker tells the others in a step: that it wants to stop, that its part of the save in flight failed; and
    rank 0, that this save is committed, and that the run folder has another owner now."""

    wants_stop: bool = False
    has_failed_save: bool = False
    has_committed: bool = False
    has_lost_folder: bool = False


@dataclass(frozen=True)
class StepResult:
    """What all workers know after a step.

    `losses`: means over the global batch, "loss" and its parts; with `is_finite` False nothing was updated.
    `has_bad_samples`: whether a row of the global batch, on any worker, had to be replaced. `is_decided`: the search
    for the objective is over, and nothing was updated. The last three: see `Word`.
    """

    losses: Mapping[str, float]
    is_finite: bool
    must_stop: bool
    has_bad_samples: bool
    is_decided: bool = False
    has_failed_save: bool = False
    has_committed: bool = False
    has_lost_folder: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """Rows as the loss takes them.

    x0, x_in: (B, 3, H, W) float32 in [-1, 1], x_in = 0 where images are generated; mask: (B, 1, H, W) float32 in [0, 1]
    or None; weight: (B,) float32; positions: (B,) int64, from which the random numbers come.
    """

    x0: Tensor
    x_in: Tensor
    mask: Tensor | None
    weight: Tensor
    positions: Tensor


# Losses of a micro-batch by name, each (B,) float32 times the rows' weight; "loss" is the one that is minimised.
LossesOf = Callable[[MicroBatch], Mapping[str, Tensor]]


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
    word: Word,
) -> StepResult:
    """Run one global batch through the network and update it.

    `batch` holds this rank's rows; filler rows have weight 0. Timesteps and noise are drawn by run position, so they do
    not depend on how rows are spread. The one collective sums losses and flags before the update: a non-finite loss
    leaves the weights as they were, on every worker alike.
    """
    names = part_names(diffusion.objective)

    def losses_of(rows: MicroBatch) -> dict[str, Tensor]:
        parts = output_losses(
            engine,
            schedule,
            objective=diffusion.objective,
            x0=rows.x0,
            x_in=rows.x_in,
            draws=Draws(seed=seed, ids=rows.positions, device=str(engine.device)),
            mask=rows.mask,
            loss=diffusion.loss,
            time_input=diffusion.time_input,
            process=diffusion.process,
            self_condition=self_condition,
            clip_residual=diffusion.residual_clip,
        )
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        logged = {name: part * rows.weight for name, part in zip(names, parts, strict=False)}
        return {"loss": total * rows.weight, **logged}

    sums = run_micro_batches(engine, batch, losses_of)
    result, _ = agree(engine.plan, batch, sums, word=word)
    if result.is_finite:
        engine.step(lr=lr)
    return result


def measures(engine: Engine) -> dict[str, float]:
    """What the last step tells besides its losses. Read it on log steps only."""
    found = {"grad_norm": engine.grad_norm()}
    return {**found, "loss_scale": engine.loss_scale()} if engine.dtype == torch.float16 else found


def part_names(objective: str) -> tuple[str, ...]:
    """Names of the losses of both outputs, fit for a metric; none for one output, whose loss is the whole."""
    outputs = OUTPUTS[objective]
    return () if len(outputs) == 1 else tuple(f"loss_{output.replace(' + ', '_plus_')}" for output in outputs)


def run_micro_batches(engine: Engine, batch: Batch, losses_of: LossesOf) -> dict[str, float]:
    """Bring the gradient of the whole batch together; the update itself is left to the caller.

    ->  by name, this rank's sum of each loss, in float64
    """
    plan, device = engine.plan, engine.device
    sums: dict[str, Tensor] = {}
    for micro in range(plan.accumulation):
        if micro:
            engine.next_micro_batch()
        rows = slice(micro * plan.micro_batch, (micro + 1) * plan.micro_batch)
        x0 = to_unit_range(batch.target[rows], device)
        losses = losses_of(
            MicroBatch(
                x0=x0,
                x_in=torch.zeros_like(x0) if batch.input is None else to_unit_range(batch.input[rows], device),
                mask=None if batch.mask is None else batch.mask[rows].to(device).float().div_(255.0),
                weight=batch.weight[rows].to(device),
                positions=batch.positions[rows],
            )
        )
        engine.backward(losses["loss"].sum() * plan.loss_scale)
        for name, values in losses.items():
            sums[name] = sums.get(name, 0.0) + values.detach().double().sum()
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


def agree(
    plan: BatchPlan, batch: Batch, sums: Mapping[str, float], *, word: Word, further: Sequence[float] = ()
) -> tuple[StepResult, list[float]]:
    """The step's one collective: every worker learns the losses and the flags of all.

    sums: this rank's, by name; further: numbers to add up besides   ->  the step, and those sums
    """
    is_finite = all(map(math.isfinite, sums.values()))
    flags = [not is_finite, bool(batch.replaced), *astuple(word)]
    totals = comm.sum_floats([*map(float, flags), *further, *sums.values()])
    is_bad, has_bad_samples, wants_stop, *saving = (total > 0 for total in totals[: len(flags)])
    rest = totals[len(flags) :]
    result = StepResult(
        losses={name: total / plan.global_batch for name, total in zip(sums, rest[len(further) :], strict=True)},
        is_finite=not is_bad,
        must_stop=wants_stop or is_bad,
        has_bad_samples=has_bad_samples,
        has_failed_save=saving[0],
        has_committed=saving[1],
        has_lost_folder=saving[2],
    )
    return result, rest[: len(further)]
