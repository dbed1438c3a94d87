"""DDIM and RDDM are one for x_in = 0: coefficients both ways, and noise-predicting networks sampled as RDDM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.prediction import Net, OnStep, Prediction, name_outputs
from rddm_dist.diffusion.process import CIRCLE_TOLERANCE, circle_error, ddpm_alpha_bar
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.diffusion.update import Jump, check_update, ddim_step, ddim_variance, residual_step

METHODS = ("rddm", "ddim")


def rddm_coefficients(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_cumsum = 1 - sqrt(alpha_bar) and beta_cumsum = sqrt(1 - alpha_bar).

    alpha_bar: (N,) float in [0, 1], cumulative products of 1 - b of a DDPM  ->  2 x (N,) float64.
    """
    alpha_bar = alpha_bar.double()
    if not bool(((alpha_bar >= 0) & (alpha_bar <= 1)).all()):
        raise ConfigError("alpha_bar of a DDPM must lie in 0..1")
    return 1 - alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def ddpm_coefficients(alpha_cumsum: Tensor, beta_cumsum: Tensor) -> Tensor:
    """alpha_bar = (1 - alpha_cumsum)^2, the inverse of `rddm_coefficients`.   2 x (N,) float  ->  (N,) float64.

    ConfigError unless (1 - alpha_cumsum)^2 + beta_cumsum^2 = 1: only then a DDPM with these states exists.
    """
    error = circle_error(alpha_cumsum, beta_cumsum.double() ** 2)
    if error > CIRCLE_TOLERANCE:
        raise ConfigError(
            f"no DDPM has these coefficients: (1 - alpha_cumsum)^2 + beta_cumsum^2 differs from 1 by {error:.3g}; "
            "set diffusion.schedule.kind=ddim and diffusion.sum_scale=1"
        )
    return (1 - alpha_cumsum.double()) ** 2


def converted_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """Visited timesteps, descending, as DDIM schedulers space them: k * (T // S) + 1, k = S-1..0.

    T=1000, S=5: 801, 601, ... 1 (counted from 0: 800, 600, ... 0); each leads to the one T // S below, or to 0.
    """
    if not 1 <= steps <= num_timesteps:
        raise ConfigError(
            f"sampling steps={steps} must lie in 1..{num_timesteps} (diffusion.num_timesteps); change sample.steps"
        )
    stride = num_timesteps // steps
    return [k * stride + 1 for k in range(steps - 1, -1, -1)]


def converted_prediction(
    noise: Tensor, *, schedule: Schedule, x_t: Tensor, t: int, clip_range: float | None, rederives_noise: bool
) -> Prediction:
    """Residual and x0 from predicted noise, for x_in = 0.   noise, x_t: (B, C, H, W) float32; t in 1..T.

    residual = (x_t - beta_cumsum noise) / (alpha_cumsum - 1), with the alpha_cumsum the network was trained with;
    x0 = x_t - alpha_cumsum residual - beta_cumsum noise, with that of the schedule. Both are clamped to +-clip_range
    (None: not); with rederives_noise the noise is then (x_t - x0 - alpha_cumsum residual) / beta_cumsum.
    """
    alpha_cumsum, beta_cumsum = float(schedule.alpha_cumsum[t]), math.sqrt(float(schedule.beta2_cumsum[t]))
    residual = (x_t - beta_cumsum * noise) / -float(schedule.one_minus_alpha_cumsum[t])
    x0 = x_t - alpha_cumsum * residual - beta_cumsum * noise
    if clip_range is not None:
        residual, x0 = residual.clamp(-clip_range, clip_range), x0.clamp(-clip_range, clip_range)
    if rederives_noise:
        noise = (x_t - x0 - alpha_cumsum * residual) / beta_cumsum
    return Prediction(residual, noise, x0)


@torch.no_grad()
def sample_converted(
    net: Net,
    schedule: Schedule,
    *,
    shape: tuple[int, int, int, int],
    steps: int,
    draws: Draws,
    eta: float = 0.0,
    clip_range: float | None = 1.0,
    rederives_noise: bool = False,
    method: str = "rddm",
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample images from a network that predicts the noise of a DDPM, over `converted_timesteps`.

    shape: (B, C, H, W); draws: the noise of these B samples, step 0 for the start, step k for the k-th step at eta > 0;
    schedule: kind ddim, or `schedule_from_alpha_bar`; the network is told t - 1  ->  (B, C, H, W) float32, not clamped.
    method=rddm: x <- x - (alpha_t - alpha_u) residual - (beta_t - sqrt(beta2_u - sigma^2)) noise + sigma z.
    method=ddim: x <- sqrt(alpha_bar_u) x0 + sqrt(1 - alpha_bar_u - sigma^2) noise + sigma z.
    Both with DDIM's sigma. They are the same without clamping (clip_range=None), and with it where the noise is
    rederived; otherwise rddm keeps the part of x0 that was cut off, (1 - alpha_t) (unclamped x0 - x0), in the state.
    A schedule readjusted with keeps_estimate only changes how fast rddm removes the residual.
    """
    _check_converted(schedule, eta=eta, clip_range=clip_range, method=method)
    timesteps = converted_timesteps(schedule.num_timesteps, steps)
    alphas, beta2s = schedule.alpha_cumsum.tolist(), schedule.beta2_cumsum.tolist()
    kept = ddpm_alpha_bar(schedule).tolist()
    x = draws.noise(shape, step=0)
    x_in = torch.zeros_like(x)
    if on_step is not None:
        on_step(0, x, None)
    for k, t in enumerate(timesteps, start=1):
        u = max(t - schedule.num_timesteps // steps, 0)
        time = torch.full((len(x),), t - 1, dtype=torch.float32, device=x.device)
        prediction = converted_prediction(
            name_outputs(net(x, (time, time), x_in, None, None), "pred_noise")["noise"],
            schedule=schedule,
            x_t=x,
            t=t,
            clip_range=clip_range,
            rederives_noise=rederives_noise,
        )
        jump = Jump((alphas[t], alphas[u]), (beta2s[t], beta2s[u]))
        variance = ddim_variance(jump, eta, (kept[t], kept[u]))
        noise = draws.noise(shape, step=k) if variance > 0 else None
        if method == "ddim":
            x = ddim_step(x, prediction, jump, rederives_noise=False, variance=variance, noise=noise)
        else:
            x = residual_step(x, prediction, jump, update="pred_noise", variance=variance, noise=noise)
        if on_step is not None:
            on_step(k, x, prediction)
    return x


def _check_converted(schedule: Schedule, *, eta: float, clip_range: float | None, method: str) -> None:
    check_update("pred_noise", eta)
    if method not in METHODS:
        raise ConfigError(f"conversion method={method} is not known; choose one of {', '.join(METHODS)}")
    if clip_range is not None and not clip_range > 0:
        raise ConfigError(f"clip_range={clip_range} must be above 0, or none for no clamping")
    if schedule.parity == "official":
        raise ConfigError("a converted network has no official corner cases; set diffusion.parity=clean")
    ddpm_coefficients(schedule.estimate_alpha_cumsum, schedule.beta_cumsum)
    if method == "ddim" and not torch.equal(schedule.alpha_cumsum, schedule.estimate_alpha_cumsum):
        raise ConfigError("method=ddim knows no readjusted schedule; take method=rddm or the network's own schedule")
