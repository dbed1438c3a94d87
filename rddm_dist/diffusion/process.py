"""The forward process: from a clean image, its residual and noise to a state, and the times a network is told."""

from __future__ import annotations

from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.diffusion.schedule import Schedule, gather

TIME_INPUTS = ("index", "clocks")


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
    raise ConfigError(f"diffusion.time_input={time_input} is not known; choose one of {', '.join(TIME_INPUTS)}")
