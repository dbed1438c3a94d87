"""Automatic objective selection: the loss by which one network finds out whether to predict residual or noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.objective import NoisedBatch, check_loss, distance, noise_batch, shown_estimate
from rddm_dist.diffusion.prediction import Net, Prediction, complete_prediction
from rddm_dist.diffusion.schedule import Schedule

INITIAL_WEIGHT = 0.5
THRESHOLD = 0.01
SELECTABLE = ("pred_res", "pred_noise")


@dataclass(frozen=True)
class SelectionLoss:
    """Per-sample losses of the search, each (B,) float32 with gradients.   total = w residual + (1 - w) noise."""

    residual: Tensor
    noise: Tensor
    total: Tensor


def selected_objective(weight: float, threshold: float = THRESHOLD) -> str | None:
    """The outcome of a search at this weight: pred_res or pred_noise, None while |weight - 0.5| < threshold."""
    if abs(weight - INITIAL_WEIGHT) < threshold:
        return None
    return leading_objective(weight)


def leading_objective(weight: float) -> str:
    """The objective a network in search is sampled by: pred_res above a weight of 0.5, else pred_noise."""
    return "pred_res" if weight > INITIAL_WEIGHT else "pred_noise"


def check_selection(schedule: Schedule) -> None:
    """Raise ConfigError for a schedule in which the search asks for the impossible: noise alone where
    1 - alpha_cumsum = 0."""
    blind = (schedule.one_minus_alpha_cumsum == 0).nonzero().flatten().tolist()
    if blind:
        raise ConfigError(
            f"diffusion.objective=auto cannot read the output as noise at timestep {blind[0]}, where 1 - alpha_cumsum "
            "is 0; set diffusion.schedule.kind=ddim or diffusion.parity=official"
        )


def selection_loss(
    net: Net,
    schedule: Schedule,
    *,
    weight: Tensor,
    x0: Tensor,
    x_in: Tensor,
    draws: Draws,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    loss: str = "l1",
    time_input: str = "index",
    process: str = "rddm",
    self_condition: bool = False,
    clip_residual: tuple[float, float] | None = (-2.0, 2.0),
) -> SelectionLoss:
    """The loss of the search, during which the one output o is read both as residual and as noise.

    With x0_n, clamped to [-1, 1], the x0 of o read as noise, noise_o the noise of o read as residual, and w = weight:
        residual loss = distance(w o + (1 - w) (x_in - x0_n), residual)
        noise loss    = distance(w noise_o + (1 - w) o, noise)
        total         = w * residual loss + (1 - w) * noise loss
    weight: () or (1,) float32 with gradient, which the loss moves both inside the mixtures and as their weight;
    sample_weight: (B,) float32 that multiplies all three; the rest as for `objective.output_losses`. The schedule must
    pass `check_selection`. Once `selected_objective` names an outcome, the objective is that one.
    """
    check_loss(loss)
    batch = noise_batch(schedule, x0=x0, x_in=x_in, draws=draws, time_input=time_input, process=process)
    x_self = None
    if self_condition:
        with torch.no_grad():
            output = _only_output(net(batch.x_t, batch.times, x_in, mask, None))
            x0_of_residual = _read(output, "pred_res", batch, clip_residual).x0
            x0_of_noise = _read(output, "pred_noise", batch, clip_residual).x0
        x_self = shown_estimate(torch.where(weight > INITIAL_WEIGHT, x0_of_residual, x0_of_noise), draws)
    output = _only_output(net(batch.x_t, batch.times, x_in, mask, x_self))
    residual = _read(output, "pred_noise", batch, None).residual
    noise = _read(output, "pred_res", batch, None).noise
    residual_loss = distance(weight * output + (1 - weight) * residual, batch.residual, loss)
    noise_loss = distance(weight * noise + (1 - weight) * output, batch.noise, loss)
    if sample_weight is not None:
        residual_loss, noise_loss = residual_loss * sample_weight, noise_loss * sample_weight
    return SelectionLoss(residual_loss, noise_loss, weight * residual_loss + (1 - weight) * noise_loss)


def _only_output(outputs: Sequence[Tensor]) -> Tensor:
    if len(outputs) != 1:
        raise ConfigError(
            f"diffusion.objective=auto needs 1 network output but the network has {len(outputs)}; set model.num_nets=1"
        )
    return outputs[0].float()


def _read(output: Tensor, objective: str, batch: NoisedBatch, clip_residual: tuple[float, float] | None) -> Prediction:
    return complete_prediction(
        [output],
        objective=objective,
        levels=batch.levels,
        x_t=batch.x_t,
        x_in=batch.x_in,
        clip_residual=clip_residual,
        clip_x0=True,
    )
