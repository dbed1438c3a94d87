"""One step of a sampler: from a state and an estimate to the state with less residual and less noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.diffusion.prediction import Prediction

UPDATES = ("pred_noise", "x0", "eta0", "eta1")


@dataclass(frozen=True)
class Jump:
    """From timestep t to an earlier u: alpha_cumsum and beta2_cumsum at (t, u)."""

    alphas: tuple[float, float]
    beta2s: tuple[float, float]

    @property
    def noise_ratio(self) -> float:
        """beta2_u / beta2_t; where x_t holds no noise, x_u holds none, and every ratio to beta_t is 0."""
        return self.beta2s[1] / self.beta2s[0] if self.beta2s[0] > 0 else 0.0


def check_update(update: str, eta: float) -> None:
    """Raise ConfigError for an unknown update rule and for eta outside 0..1."""
    if update not in UPDATES:
        raise ConfigError(f"sample.update={update} is not known; choose one of {', '.join(UPDATES)}")
    if not 0 <= eta <= 1:
        raise ConfigError(f"sampling eta={eta} must lie in 0..1; change sample.eta")


def fixed_eta(update: str, eta: float) -> float:
    """The eta an update rule runs with: eta0 and eta1 fix it."""
    return {"eta0": 0.0, "eta1": 1.0}.get(update, eta)


def constrained_variance(jump: Jump, eta: float) -> float:
    """Variance of the new noise that keeps the sum of beta2: sigma^2 = eta (beta2_t - beta2_u) beta2_u / beta2_t."""
    beta2_t, beta2_u = jump.beta2s
    return eta * (beta2_t - beta2_u) * jump.noise_ratio


def ddim_variance(jump: Jump, eta: float, alpha_bars: tuple[float, float]) -> float:
    """Variance of the new noise in DDIM: sigma^2 = eta^2 (beta2_u / beta2_t) (1 - alpha_bar_t / alpha_bar_u).

    beta2 = 1 - alpha_bar; `alpha_bars` at (t, u). It is `constrained_variance` times eta / alpha_bar_u.
    """
    alpha_bar_t, alpha_bar_u = alpha_bars
    return eta**2 * jump.noise_ratio * (1 - alpha_bar_t / alpha_bar_u)


def residual_step(
    x: Tensor, prediction: Prediction, jump: Jump, *, update: str, variance: float, noise: Tensor | None
) -> Tensor:
    """Take residual and noise away from x_t.   x: (B, C, H, W) float32  ->  (B, C, H, W) float32.

    pred_noise: x - (alpha_t - alpha_u) residual - (beta_t - sqrt(beta2_u - variance)) noise + sqrt(variance) z.
    x0:         the same with noise = (x - x0 - alpha_t residual) / beta_t, so it differs only where x0 was clamped.
    eta0, eta1: pred_noise at eta = 0, and with the variance of eta = 1 in its simplified form.
    noise: z, the same shape, or None where the step is deterministic.
    """
    (alpha_t, alpha_u), (beta2_t, beta2_u), ratio = jump.alphas, jump.beta2s, jump.noise_ratio
    beta_t, beta_u = math.sqrt(beta2_t), math.sqrt(beta2_u)
    moved = x - (alpha_t - alpha_u) * prediction.residual
    if update == "eta0":
        return moved - (beta_t - beta_u) * prediction.noise
    if update == "eta1":
        stepped = moved - (beta_t - ratio * beta_t) * prediction.noise
        return stepped if noise is None else stepped + math.sqrt((beta2_t - beta2_u) * ratio) * noise
    kept = math.sqrt(max(beta2_u - variance, 0.0))
    if update == "x0":
        c = kept / beta_t if beta_t > 0 else 0.0
        stepped = c * x + (1 - c) * prediction.x0 + (alpha_u - alpha_t * c) * prediction.residual
    else:
        stepped = moved - (beta_t - kept) * prediction.noise
    return stepped if noise is None else stepped + math.sqrt(variance) * noise


def ddim_step(
    x: Tensor, prediction: Prediction, jump: Jump, *, rederives_noise: bool, variance: float, noise: Tensor | None
) -> Tensor:
    """Build x_u anew, as DDIM does: (1 - alpha_u) x0 + sqrt(beta2_u - variance) noise + sqrt(variance) z.

    x: (B, C, H, W) float32; 1 - alpha_cumsum = sqrt(alpha_bar), x_in = 0. With rederives_noise the noise is the one
    that leads from the clamped x0 to x, else the estimated one; noise: z, the same shape, or None
    ->  (B, C, H, W) float32.
    """
    (alpha_t, alpha_u), (beta2_t, beta2_u) = jump.alphas, jump.beta2s
    estimated = prediction.noise
    if rederives_noise and beta2_t > 0:
        estimated = (x - (1 - alpha_t) * prediction.x0) / math.sqrt(beta2_t)
    stepped = (1 - alpha_u) * prediction.x0 + math.sqrt(max(beta2_u - variance, 0.0)) * estimated
    return stepped if noise is None else stepped + math.sqrt(variance) * noise
