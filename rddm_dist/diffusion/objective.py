"""Objectives: what the network's outputs are trained towards, and what they say about residual, noise and x0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.process import network_times, q_sample
from rddm_dist.diffusion.schedule import Schedule, gather

# A network as the loss and the samplers see it: net(x_t, times, x_in, mask) -> one tensor per output.
Net = Callable[[Tensor, tuple[Tensor, Tensor], Tensor, Tensor | None], Sequence[Tensor]]

# What each output of the network is.
OUTPUTS: dict[str, tuple[str, ...]] = {
    "pred_res_noise": ("residual", "noise"),
    "pred_res_add_noise": ("residual", "residual + noise"),
    "pred_x0_noise": ("x0", "noise"),
    "pred_x0_add_noise": ("x0", "x0 + noise"),
    "pred_noise": ("noise",),
    "pred_res": ("residual",),
    "pred_x0": ("x0",),
}
OBJECTIVES: dict[str, int] = {objective: len(parts) for objective, parts in OUTPUTS.items()}
LOSSES = ("l1", "l2")


@dataclass(frozen=True)
class Prediction:
    """A complete estimate, each (B, C, H, W) float32."""

    residual: Tensor
    noise: Tensor
    x0: Tensor


def complete_prediction(
    outputs: Sequence[Tensor],
    *,
    schedule: Schedule,
    objective: str,
    x_t: Tensor,
    x_in: Tensor,
    t: Tensor,
    clip_residual: tuple[float, float] | None,
    clip_x0: bool,
) -> Prediction:
    """Residual, noise and x0 from the outputs of a network; the one place that knows what outputs mean.

    outputs: one or two (B, C, H, W) of any float type; x_t, x_in: (B, C, H, W) float32; t: (B,) int64 in 1..T.
    `clip_residual` is the range residuals are clamped to (true ones span [-2, 2], the authors clamp to [-1, 1]), None
    for no clamp; `clip_x0` clamps x0 to [-1, 1].
    Noise alone cannot tell x0 where 1 - alpha_cumsum[t] = 0; `sampler.check_sampling` refuses that beforehand.
    """
    parts = _name_outputs(outputs, objective)
    alpha_cumsum, beta_cumsum = gather(schedule.alpha_cumsum, t), gather(schedule.beta_cumsum, t)

    def clip(residual: Tensor) -> Tensor:
        return residual if clip_residual is None else residual.clamp(*clip_residual)

    def clip_image(x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1) if clip_x0 else x0

    if objective == "pred_noise":
        noise = parts["noise"]
        x0 = (x_t - alpha_cumsum * x_in - beta_cumsum * noise) / gather(schedule.one_minus_alpha_cumsum, t)
        x0 = clip_image(x0)
        return Prediction(clip(x_in - x0), noise, x0)
    residual = clip(parts["residual"] if "residual" in parts else x_in - parts["x0"])
    if OBJECTIVES[objective] == 1:
        # x_t = x_in + (alpha_cumsum - 1) * residual + beta_cumsum * noise, solved for the noise. A state without noise
        # (beta_cumsum = 0) says nothing about it, and nothing is ever multiplied with it: 0.
        scaled_noise = x_t - x_in - (alpha_cumsum - 1) * residual
        noise = torch.where(beta_cumsum > 0, scaled_noise / beta_cumsum.clamp(min=1e-12), 0.0)
        return Prediction(residual, noise, clip_image(x_in - residual))
    if "noise" in parts:
        noise = parts["noise"]
    elif "residual + noise" in parts:
        noise = parts["residual + noise"] - parts["residual"]
    else:
        noise = parts["x0 + noise"] - parts["x0"]
    x0 = parts["x0"] if "x0" in parts else x_t - alpha_cumsum * residual - beta_cumsum * noise
    return Prediction(residual, noise, clip_image(x0))


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
) -> Tensor:
    """Per-sample losses: the distance of each output to its target, mean over pixels, summed over outputs.

    x0, x_in: (B, C, H, W) float32 in [-1, 1], for generation x_in = 0; mask: (B, 1 or C, H, W) float32 in [0, 1] or
    None; weight: (B,) float32 that multiplies the losses; draws: timesteps and noise of these B samples
    ->  (B,) float32 with gradients.
    """
    if loss not in LOSSES:
        raise ConfigError(f"diffusion.loss={loss} is not known; choose one of {', '.join(LOSSES)}")
    t = draws.timesteps(schedule.num_timesteps)
    noise = draws.noise(x0.shape)
    residual = x_in - x0
    x_t = q_sample(schedule, x0=x0, residual=residual, noise=noise, t=t)
    parts = _name_outputs(net(x_t, network_times(schedule, t, time_input), x_in, mask), objective)
    total = torch.zeros(len(x0), dtype=torch.float32, device=x0.device)
    for name, output in parts.items():
        error = output - _target(name, residual=residual, noise=noise, x0=x0)
        total = total + (error.abs() if loss == "l1" else error.square()).mean(dim=(1, 2, 3))
    return total if weight is None else total * weight


def check_objective(objective: str) -> None:
    """Raise ConfigError for an unknown objective."""
    if objective not in OBJECTIVES:
        raise ConfigError(f"diffusion.objective={objective} is not known; choose one of {', '.join(OBJECTIVES)}")


def _name_outputs(outputs: Sequence[Tensor], objective: str) -> dict[str, Tensor]:
    """The outputs as float32 under the names of OUTPUTS; ConfigError where their number does not fit."""
    check_objective(objective)
    names = OUTPUTS[objective]
    if len(outputs) != len(names):
        raise ConfigError(
            f"diffusion.objective={objective} needs {len(names)} network outputs but the network has {len(outputs)}; "
            f"set model.num_nets={len(names)}"
        )
    return {name: output.float() for name, output in zip(names, outputs, strict=True)}


def _target(name: str, *, residual: Tensor, noise: Tensor, x0: Tensor) -> Tensor:
    """What the output called `name` should be; a name is a sum of the three quantities."""
    known = {"residual": residual, "noise": noise, "x0": x0}
    first, *rest = name.split(" + ")
    target = known[first]
    for other in rest:
        target = target + known[other]
    return target
