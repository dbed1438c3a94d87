"""Samplers: from the degraded image (or noise) to x0, over all timesteps or skipping most of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.objective import Net, Prediction, check_objective, complete_prediction
from rddm_dist.diffusion.process import network_times, posterior
from rddm_dist.diffusion.schedule import Schedule

UPDATES = ("pred_noise", "x0", "eta0", "eta1")

# on_step(k, state, prediction): k = 0 is the start (no prediction yet), k = 1..steps the state after the k-th step.
OnStep = Callable[[int, Tensor, Prediction | None], None]


def sampling_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """Visited timesteps, descending, evenly spread: floor(T * k / S), k = S..1.   T=1000, S=5: 1000, 800, ... 200."""
    if not 1 <= steps <= num_timesteps:
        raise ConfigError(
            f"sampling steps={steps} must lie in 1..{num_timesteps} (diffusion.num_timesteps); change sample.steps"
        )
    return [num_timesteps * k // steps for k in range(steps, 0, -1)]


def check_sampling(
    schedule: Schedule, *, objective: str, steps: int, eta: float = 0.0, update: str = "pred_noise"
) -> None:
    """Raise ConfigError for settings that cannot be sampled, before any network runs."""
    check_objective(objective)
    timesteps = sampling_timesteps(schedule.num_timesteps, steps)
    if update not in UPDATES:
        raise ConfigError(f"sampler update={update} is not known; choose one of {', '.join(UPDATES)}")
    if not 0 <= eta <= 1:
        raise ConfigError(f"sampling eta={eta} must lie in 0..1; change sample.eta")
    if objective == "pred_noise":
        rest = schedule.one_minus_alpha_cumsum.tolist()
        blind = [t for t in timesteps if rest[t] == 0]
        if blind:
            raise ConfigError(
                f"diffusion.objective=pred_noise cannot recover the image at timestep {blind[0]}, where "
                "1 - alpha_cumsum is 0; take another objective, diffusion.schedule.kind=ddim or parity=official"
            )


@torch.no_grad()
def sample(
    net: Net,
    schedule: Schedule,
    *,
    objective: str,
    x_in: Tensor,
    steps: int,
    draws: Draws,
    eta: float = 0.0,
    mask: Tensor | None = None,
    update: str = "pred_noise",
    clip_residual: tuple[float, float] | None = (-2.0, 2.0),
    time_input: str = "index",
    generate: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample x0 given x_in, with `steps` evaluations of the network.

    x_in: (B, C, H, W) float32 in [-1, 1]; with generate=True only its shape, type and device count, the degraded image
    being 0; mask: (B, 1 or C, H, W) float32 in [0, 1] or None; draws: the noise of these B samples, step 0 for the
    start, step k for the k-th stochastic step  ->  (B, C, H, W) float32, x0 clamped to [-1, 1].
    steps = T runs the ancestral sampler, which is stochastic and takes neither eta nor update; fewer steps skip.
    """
    check_sampling(schedule, objective=objective, steps=steps, eta=eta, update=update)
    timesteps = sampling_timesteps(schedule.num_timesteps, steps)
    alpha_cumsum, beta2_cumsum = schedule.alpha_cumsum.tolist(), schedule.beta2_cumsum.tolist()
    if generate:
        x_in = torch.zeros_like(x_in)
    x = x_in + _start_scale(schedule, generate) * draws.noise(x_in.shape, step=0)

    if on_step is not None:
        on_step(0, x, None)
    for k, t in enumerate(timesteps, start=1):
        t_rows = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        prediction = complete_prediction(
            net(x, network_times(schedule, t_rows, time_input), x_in, mask),
            schedule=schedule,
            objective=objective,
            x_t=x,
            x_in=x_in,
            t=t_rows,
            clip_residual=clip_residual,
            clip_x0=True,
        )
        if k == steps:
            x = prediction.x0
        elif steps == schedule.num_timesteps:
            mean, _, log_variance = posterior(schedule, x_t=x, residual=prediction.residual, x0=prediction.x0, t=t_rows)
            x = mean + (0.5 * log_variance).exp() * draws.noise(x.shape, step=k)
        else:
            u = timesteps[k]
            is_stochastic = update == "eta1" or (update in ("pred_noise", "x0") and eta > 0)
            x = _skip(
                x,
                prediction,
                alphas=(alpha_cumsum[t], alpha_cumsum[u]),
                beta2s=(beta2_cumsum[t], beta2_cumsum[u]),
                eta=eta,
                update=update,
                noise=draws.noise(x.shape, step=k) if is_stochastic else None,
            )
        if on_step is not None:
            on_step(k, x, prediction)
    return x


def _start_scale(schedule: Schedule, generate: bool) -> float:
    """Standard deviation of the noise in the first state.

    It is beta_cumsum[T]; the authors take 1 for generation and sqrt(sum_scale) for restoration, which differs where the
    schedule ends short of it (kind ddim) or, for generation, where sum_scale is not 1.
    """
    if schedule.parity == "official":
        return 1.0 if generate else math.sqrt(schedule.sum_scale)
    return float(schedule.beta_cumsum[-1])


def _skip(
    x: Tensor,
    prediction: Prediction,
    *,
    alphas: tuple[float, float],
    beta2s: tuple[float, float],
    eta: float,
    update: str,
    noise: Tensor | None,
) -> Tensor:
    """One step from timestep t to u < t; `alphas` and `beta2s` are alpha_cumsum and beta2_cumsum at (t, u).

    sigma^2 = eta * (beta2_t - beta2_u) * beta2_u / beta2_t, the variance of the new noise.
    pred_noise: x - (alpha_t - alpha_u) residual - (beta_t - sqrt(beta2_u - sigma^2)) noise + sigma z.
    x0:         the same with noise = (x - x0 - alpha_t residual) / beta_t, so it differs only where x0 was clamped.
    eta0, eta1: pred_noise at eta = 0, and at eta = 1 in its simplified form.
    x: (B, C, H, W) float32; noise: the same or None where the step is deterministic  ->  (B, C, H, W) float32.
    """
    (alpha_t, alpha_u), (beta2_t, beta2_u) = alphas, beta2s
    beta_t, beta_u = math.sqrt(beta2_t), math.sqrt(beta2_u)
    # Where x_t holds no noise, x_u holds none: every ratio to beta_t is then 0.
    ratio = beta2_u / beta2_t if beta2_t > 0 else 0.0
    moved = x - (alpha_t - alpha_u) * prediction.residual
    if update == "eta0":
        return moved - (beta_t - beta_u) * prediction.noise
    if update == "eta1":
        stepped = moved - (beta_t - ratio * beta_t) * prediction.noise
        return stepped if noise is None else stepped + math.sqrt((beta2_t - beta2_u) * ratio) * noise
    variance = eta * (beta2_t - beta2_u) * ratio
    kept = math.sqrt(max(beta2_u - variance, 0.0))
    if update == "x0":
        c = kept / beta_t if beta_t > 0 else 0.0
        stepped = c * x + (1 - c) * prediction.x0 + (alpha_u - alpha_t * c) * prediction.residual
    else:
        stepped = moved - (beta_t - kept) * prediction.noise
    return stepped if noise is None else stepped + math.sqrt(variance) * noise
