"""The forward process: from a clean image, its residual and noise to a state, and the times a network is told."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.diffusion.schedule import Schedule, gather

TIME_INPUTS = ("index", "clocks")
PROCESSES = ("rddm", "ddpm")
# How far (1 - alpha_cumsum)^2 + beta2_cumsum may be from 1 where a schedule counts as a DDPM's.
CIRCLE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Levels:
    """How much residual and noise states hold, each (B, 1, 1, 1) float32.

    `estimate_alpha_cumsum` and `one_minus_alpha_cumsum` belong to noise-only prediction; see `Schedule`.
    """

    alpha_cumsum: Tensor
    beta_cumsum: Tensor
    estimate_alpha_cumsum: Tensor
    one_minus_alpha_cumsum: Tensor


def levels_at(schedule: Schedule, t: Tensor) -> Levels:
    """The levels of the states at timesteps t: (B,) int64 in 0..T."""
    return Levels(
        alpha_cumsum=gather(schedule.alpha_cumsum, t),
        beta_cumsum=gather(schedule.beta_cumsum, t),
        estimate_alpha_cumsum=gather(schedule.estimate_alpha_cumsum, t),
        one_minus_alpha_cumsum=gather(schedule.one_minus_alpha_cumsum, t),
    )


def q_sample(schedule: Schedule, *, x0: Tensor, residual: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = x0 + alpha_cumsum[t] * residual + beta_cumsum[t] * noise, in float32.

    x0: (B, C, H, W) float in [-1, 1]; residual: the same shape, x_in - x0 in [-2, 2]; noise: the same shape, standard
    normal; t: (B,) int64 in 0..T  ->  (B, C, H, W) float32.
    """
    return x0 + gather(schedule.alpha_cumsum, t) * residual + gather(schedule.beta_cumsum, t) * noise


def posterior(
    schedule: Schedule, *, x_t: Tensor, residual: Tensor, x0: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log variance of q(x_{t-1} | x_t, x0, residual).

    x_t, residual, x0: (B, C, H, W) float32; t: (B,) int64 in 1..T  ->  (B, C, H, W), (B, 1, 1, 1), (B, 1, 1, 1).
    The log variance is floored at log(1e-20).
    """
    mean = (
        gather(schedule.posterior_coef1, t) * x_t
        + gather(schedule.posterior_coef2, t) * residual
        + gather(schedule.posterior_coef3, t) * x0
    )
    return mean, gather(schedule.posterior_variance, t), gather(schedule.posterior_log_variance, t)


def process_input(process: str, x_in: Tensor) -> Tensor:
    """The image the process ends in: x_in, or 0 for the ddpm baseline, whose residual is -x0 whatever the network sees.

    x_in: (B, C, H, W) float  ->  the same shape and type.
    """
    if process not in PROCESSES:
        raise ConfigError(f"diffusion.process={process} is not known; choose one of {', '.join(PROCESSES)}")
    return torch.zeros_like(x_in) if process == "ddpm" else x_in


def check_process(schedule: Schedule, process: str) -> None:
    """Raise ConfigError for an unknown process, and for the ddpm baseline with a schedule that is not a DDPM's.

    A DDPM has (1 - alpha_cumsum)^2 + beta2_cumsum = 1 in every row.
    """
    if process not in PROCESSES:
        raise ConfigError(f"diffusion.process={process} is not known; choose one of {', '.join(PROCESSES)}")
    if process == "ddpm" and schedule.parity == "official":
        raise ConfigError("diffusion.process=ddpm has no official corner cases; set diffusion.parity=clean")
    if process == "ddpm" and circle_error(schedule.alpha_cumsum, schedule.beta2_cumsum) > CIRCLE_TOLERANCE:
        raise ConfigError(
            "diffusion.process=ddpm needs (1 - alpha_cumsum)^2 + beta2_cumsum = 1; set diffusion.schedule.kind=ddim "
            "and diffusion.sum_scale=1"
        )


def ddpm_alpha_bar(schedule: Schedule) -> Tensor:
    """alpha_bar of the DDPM that a clean schedule was converted from, (1 - alpha_cumsum)^2.   ->  (T+1,) float64."""
    return schedule.one_minus_alpha_cumsum.double() ** 2


def circle_error(alpha_cumsum: Tensor, beta2_cumsum: Tensor) -> float:
    """Largest |(1 - alpha_cumsum)^2 + beta2_cumsum - 1|, 0 for tables of a DDPM.   Both: (N,) float."""
    return float(((1 - alpha_cumsum.double()) ** 2 + beta2_cumsum.double() - 1).abs().max())


def network_times(schedule: Schedule, t: Tensor, time_input: str = "index") -> tuple[Tensor, Tensor]:
    """What residual network and noise network are told about time.   t: (B,) int64 in 1..T  ->  2 x (B,) float32.

    index:  t - 1 for both, the numbering published weights were trained with.
    clocks: alpha_cumsum[t] * T and beta_cumsum[t] * T, how much residual and how much noise is left.
    """
    if time_input == "index":
        index = (t - 1).float()
        return index, index
    if time_input == "clocks":
        return schedule.alpha_cumsum[t] * schedule.num_timesteps, schedule.beta_cumsum[t] * schedule.num_timesteps
    raise _unknown_time_input(time_input)


def times_of_levels(
    schedule: Schedule, *, alpha_cumsum: float, beta_cumsum: float, time_input: str = "index"
) -> tuple[float, float]:
    """`network_times` of a state that is in no table: how much residual and noise it holds decides.

    index:  the timestep, between two rows a real number, at which the schedule reaches that much residual (first) and
            that much noise (second), less 1 and at least 0.
    clocks: alpha_cumsum * T and beta_cumsum * T.
    """
    if time_input == "index":
        return _index_of(schedule.alpha_cumsum, alpha_cumsum), _index_of(schedule.beta_cumsum, beta_cumsum)
    if time_input == "clocks":
        return alpha_cumsum * schedule.num_timesteps, beta_cumsum * schedule.num_timesteps
    raise _unknown_time_input(time_input)


def _index_of(table: Tensor, level: float) -> float:
    """Where a table that never falls reaches `level`, by linear interpolation, less 1."""
    rows = table.tolist()
    above = bisect_right(rows, level)
    if above == len(rows):
        return float(len(rows) - 2)
    between = above - 1 + (level - rows[above - 1]) / (rows[above] - rows[above - 1])
    return max(between - 1.0, 0.0)


def _unknown_time_input(time_input: str) -> ConfigError:
    return ConfigError(f"diffusion.time_input={time_input} is not known; choose one of {', '.join(TIME_INPUTS)}")
