"""Objectives: what the network's outputs are trained towards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.prediction import Estimator, Net, name_outputs
from rddm_dist.diffusion.process import Levels, levels_at, network_times, process_input, q_sample
from rddm_dist.diffusion.schedule import Schedule

LOSSES = ("l1", "l2")


@dataclass(frozen=True)
class NoisedBatch:
    """Training states with the truth about them.

    x0, x_in, residual, noise, x_t: (B, C, H, W) float32, x_in that of the process, residual = x_in - x0; t: (B,) int64
    in 1..T; times: 2 x (B,) float32, what the network is told.
    """

    x0: Tensor
    x_in: Tensor
    residual: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor
    times: tuple[Tensor, Tensor]
    levels: Levels


def noise_batch(
    schedule: Schedule, *, x0: Tensor, x_in: Tensor, draws: Draws, time_input: str = "index", process: str = "rddm"
) -> NoisedBatch:
    """Bring images to drawn timesteps.   x0, x_in: (B, C, H, W) float32 in [-1, 1]; draws: of these B samples."""
    t = draws.timesteps(schedule.num_timesteps)
    noise = draws.noise(x0.shape)
    x_in = process_input(process, x_in)
    residual = x_in - x0
    return NoisedBatch(
        x0=x0,
        x_in=x_in,
        residual=residual,
        noise=noise,
        x_t=q_sample(schedule, x0=x0, residual=residual, noise=noise, t=t),
        t=t,
        times=network_times(schedule, t, time_input),
        levels=levels_at(schedule, t),
    )


def output_losses(
    net: Net,
    schedule: Schedule,
    *,
    objective: str,
    x0: Tensor,
    x_in: Tensor,
    draws: Draws,
    mask: Tensor | None = None,
    loss: str = "l1",
    time_input: str = "index",
    process: str = "rddm",
    self_condition: bool = False,
    clip_residual: tuple[float, float] | None = (-2.0, 2.0),
) -> tuple[Tensor, ...]:
    """Per sample and output the distance to the target, mean over pixels: what one optimizer per network minimises.

    x0, x_in: (B, C, H, W) float32 in [-1, 1], for generation x_in = 0; mask: (B, 1 or C, H, W) float32 in [0, 1] or
    None; draws: timesteps, noise and, with self_condition, coins of these B samples  ->  per output (B,) float32 with
    gradients, which reach the network of that output only.
    With process=ddpm the process runs with x_in = 0 and the network still sees x_in. A self-conditioned network is
    asked a second time, before and without gradient; half of the samples, by their coins, then see that estimate of
    x0 (made with residuals clamped to `clip_residual`), the others 0. All batches make both calls.
    """
    check_loss(loss)
    if objective == "pred_v" and process != "ddpm":
        raise ConfigError(f"diffusion.objective=pred_v does not fit diffusion.process={process}; set it to ddpm")
    batch = noise_batch(schedule, x0=x0, x_in=x_in, draws=draws, time_input=time_input, process=process)
    x_self = None
    if self_condition:
        with torch.no_grad():
            estimate = Estimator(net, objective, x_in, mask=mask, process=process, clip_residual=clip_residual)
            first = estimate(batch.x_t, times=batch.times, levels=batch.levels, previous=None)
        x_self = shown_estimate(first.x0, draws)
    parts = name_outputs(net(batch.x_t, batch.times, x_in, mask, x_self), objective)
    return tuple(distance(output, _target(name, batch), loss) for name, output in parts.items())


def training_loss(
    net: Net,
    schedule: Schedule,
    *,
    objective: str,
    x0: Tensor,
    x_in: Tensor,
    draws: Draws,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    loss: str = "l1",
    time_input: str = "index",
    process: str = "rddm",
    self_condition: bool = False,
    clip_residual: tuple[float, float] | None = (-2.0, 2.0),
) -> Tensor:
    """Per-sample losses: `output_losses` summed over outputs.

    weight: (B,) float32 that multiplies the losses; for the others see `output_losses`  ->  (B,) float32 with
    gradients.
    """
    first, *others = output_losses(
        net,
        schedule,
        objective=objective,
        x0=x0,
        x_in=x_in,
        draws=draws,
        mask=mask,
        loss=loss,
        time_input=time_input,
        process=process,
        self_condition=self_condition,
        clip_residual=clip_residual,
    )
    total = first
    for other in others:
        total = total + other
    return total if weight is None else total * weight


def shown_estimate(x0: Tensor, draws: Draws) -> Tensor:
    """What a self-conditioned network is shown in training: the estimate where the sample's coin fell so, else 0.

    x0: (B, C, H, W) float32  ->  the same.
    """
    return torch.where(draws.self_condition().reshape(-1, 1, 1, 1), x0, torch.zeros_like(x0))


def distance(output: Tensor, target: Tensor, loss: str) -> Tensor:
    """Mean over pixels of |error| (l1) or error^2 (l2).   Both: (B, C, H, W) float32  ->  (B,) float32."""
    error = output - target
    return (error.abs() if loss == "l1" else error.square()).mean(dim=(1, 2, 3))


def check_loss(loss: str) -> None:
    """Raise ConfigError for an unknown loss."""
    if loss not in LOSSES:
        raise ConfigError(f"diffusion.loss={loss} is not known; choose one of {', '.join(LOSSES)}")


def _target(name: str, batch: NoisedBatch) -> Tensor:
    """What the output called `name` should be; a name is velocity or a sum of residual, noise and x0."""
    if name == "velocity":
        return (1 - batch.levels.alpha_cumsum) * batch.noise - batch.levels.beta_cumsum * batch.x0
    known = {"residual": batch.residual, "noise": batch.noise, "x0": batch.x0}
    first, *rest = name.split(" + ")
    target = known[first]
    for other in rest:
        target = target + known[other]
    return target
