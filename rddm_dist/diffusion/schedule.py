"""Coefficient tables of the forward process: how much residual and how much noise a state holds at each timestep."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError

KINDS = ("linear", "power", "ddim")
SHAPES = {"linear": ("decreased", "increased", "average"), "power": ("decreased", "increased", "average", "normal")}
DDPM_BETAS = ("linear", "scaled_linear", "squaredcos")
PARITIES = ("clean", "official")

# What the authors put in place of 1 - alpha_cumsum[T], and their floor of the posterior variance under the logarithm.
OFFICIAL_ONE_MINUS_ALPHA_CUMSUM = 1e-6
VARIANCE_FLOOR = 1e-20


@dataclass(frozen=True, eq=False)
class Schedule:
    """The frozen tables, each (T+1,) float32; row t belongs to x_t, row 0 is the clean image.

    x_t = x0 + alpha_cumsum[t] * residual + beta_cumsum[t] * noise, with residual = x_in - x0.
    The exact posterior q(x_{t-1} | x_t, x0, residual) has mean coef1 * x_t + coef2 * residual + coef3 * x0.
    Row 0 of the posterior tables is not used by anything and holds the identity on x0.
    """

    alpha: Tensor
    alpha_cumsum: Tensor
    one_minus_alpha_cumsum: Tensor
    beta2: Tensor
    beta2_cumsum: Tensor
    beta_cumsum: Tensor
    posterior_coef1: Tensor
    posterior_coef2: Tensor
    posterior_coef3: Tensor
    posterior_variance: Tensor
    posterior_log_variance: Tensor
    sum_scale: float
    parity: str

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_cumsum) - 1

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its tables on `device`."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device)
        return Schedule(**values)


def gather(table: Tensor, t: Tensor) -> Tensor:
    """Rows of a table, ready to multiply images.   table: (T+1,) float32, t: (B,) int64 in 0..T  ->  (B, 1, 1, 1)."""
    return table[t].reshape(-1, 1, 1, 1)


def make_schedule(
    *,
    kind: str = "linear",
    num_timesteps: int = 1000,
    alpha: str = "decreased",
    beta2: str = "increased",
    alpha_power: float = 1.0,
    beta2_power: float = 1.0,
    betas: str = "linear",
    sum_scale: float = 1.0,
    parity: str = "clean",
) -> Schedule:
    """Build a schedule; alpha sums to 1 and beta2 to `sum_scale` (kind ddim: almost).

    linear: weights 1..T (increased), T..1 (decreased) or equal (average).
    power:  the weights i^a, i = 0..T-1, of the paper's P(x, a) (increased, a = beta2_power or alpha_power) and
            P(1-x, a) (decreased); average; normal, a Gaussian bell over [-3, 3].
    ddim:   converted from DDPM betas b: alpha_cumsum = 1 - sqrt(prod(1 - b)), beta2_cumsum = 1 - prod(1 - b).

    parity="official" reproduces the authors' buffers: float32 arithmetic in the power and ddim families, 1e-6 in place
    of 1 - alpha_cumsum[T], cumulative sums clipped to [0, 1], kind ddim ignoring sum_scale in its tables and having
    zero increments at t = 1.
    """
    _check_choice("diffusion.schedule.kind", kind, KINDS)
    _check_choice("diffusion.parity", parity, PARITIES)
    if num_timesteps < 1:
        raise ConfigError(f"diffusion.num_timesteps={num_timesteps} must be at least 1")
    if not (math.isfinite(sum_scale) and sum_scale > 0):
        raise ConfigError(f"diffusion.sum_scale={sum_scale} must be a number above 0")
    is_official = parity == "official"
    dtype = torch.float32 if is_official and kind != "linear" else torch.float64
    if kind == "ddim":
        _check_choice("diffusion.schedule.betas", betas, DDPM_BETAS)
        kept = torch.cumprod(1 - _ddpm_betas(betas, num_timesteps, dtype), 0)
        alpha_sums, rest_sums, beta2_sums = 1 - kept.sqrt(), kept.sqrt(), 1 - kept
        alpha_steps = _differences(alpha_sums)
        beta2_steps = _differences(beta2_sums)
        if is_official:
            alpha_steps[0] = beta2_steps[0] = 0
        else:
            beta2_steps, beta2_sums = beta2_steps * sum_scale, beta2_sums * sum_scale
    else:
        alpha_steps = _weights("alpha", kind, alpha, alpha_power, num_timesteps, dtype)
        beta2_steps = _weights("beta2", kind, beta2, beta2_power, num_timesteps, dtype) * sum_scale
        alpha_sums, beta2_sums = torch.cumsum(alpha_steps, 0), torch.cumsum(beta2_steps, 0)
        # Summed from the other end: exact zeros and full precision where alpha_cumsum is close to 1.
        rest_sums = torch.cat([alpha_steps.flip(0).cumsum(0).flip(0)[1:], torch.zeros(1, dtype=dtype)])
        if is_official:
            alpha_sums, beta2_sums = alpha_sums.clamp(0, 1), beta2_sums.clamp(0, 1)
            rest_sums = 1 - alpha_sums
    if is_official:
        rest_sums[-1] = OFFICIAL_ONE_MINUS_ALPHA_CUMSUM
    zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    return _with_posterior(
        alpha=torch.cat([zero, alpha_steps]),
        alpha_cumsum=torch.cat([zero, alpha_sums]),
        one_minus_alpha_cumsum=torch.cat([one, rest_sums]),
        beta2=torch.cat([zero, beta2_steps]),
        beta2_cumsum=torch.cat([zero, beta2_sums]),
        sum_scale=sum_scale,
        parity=parity,
    )


def _with_posterior(
    *,
    alpha: Tensor,
    alpha_cumsum: Tensor,
    one_minus_alpha_cumsum: Tensor,
    beta2: Tensor,
    beta2_cumsum: Tensor,
    sum_scale: float,
    parity: str,
) -> Schedule:
    """Add the posterior tables and store all as float32.   Tables: (T+1,) float64 (float32 for some official ones).

    coef1 = beta2_cumsum[t-1] / beta2_cumsum[t]
    coef2 = (beta2[t] * alpha_cumsum[t-1] - beta2_cumsum[t-1] * alpha[t]) / beta2_cumsum[t]
    coef3 = beta2[t] / beta2_cumsum[t]
    variance = beta2[t] * beta2_cumsum[t-1] / beta2_cumsum[t]
    A state without noise (beta2_cumsum[t] = 0) has the limit x_{t-1} = x0 + alpha_cumsum[t-1] * residual.
    """
    previous_alpha = torch.cat([alpha_cumsum[:1], alpha_cumsum[:-1]])
    previous_beta2 = torch.cat([beta2_cumsum[:1], beta2_cumsum[:-1]])
    # At t = 1 all the noise was added in that very step, whatever the stored increment says (see kind ddim, official).
    is_first = previous_beta2 == 0
    safe = torch.where(beta2_cumsum > 0, beta2_cumsum, 1.0)
    coef1 = previous_beta2 / safe
    coef2 = torch.where(is_first, previous_alpha, (beta2 * previous_alpha - previous_beta2 * alpha) / safe)
    coef3 = torch.where(is_first, 1.0, beta2 / safe)
    variance = beta2 * previous_beta2 / safe
    return Schedule(
        alpha=alpha.float(),
        alpha_cumsum=alpha_cumsum.float(),
        one_minus_alpha_cumsum=one_minus_alpha_cumsum.float(),
        beta2=beta2.float(),
        beta2_cumsum=beta2_cumsum.float(),
        beta_cumsum=beta2_cumsum.sqrt().float(),
        posterior_coef1=coef1.float(),
        posterior_coef2=coef2.float(),
        posterior_coef3=coef3.float(),
        posterior_variance=variance.float(),
        posterior_log_variance=variance.clamp(min=VARIANCE_FLOOR).log().float(),
        sum_scale=sum_scale,
        parity=parity,
    )


def _weights(name: str, kind: str, shape: str, power: float, num_timesteps: int, dtype: torch.dtype) -> Tensor:
    """Increments over t = 1..T that sum to 1.   ->  (T,) of `dtype`."""
    _check_choice(f"diffusion.schedule.{name}", shape, SHAPES[kind], f" with diffusion.schedule.kind={kind}")
    if not (math.isfinite(power) and power >= 0):
        raise ConfigError(f"diffusion.schedule.{name}_power={power} must be a number of at least 0")
    if kind == "linear" and power != 1:
        raise ConfigError(
            f"diffusion.schedule.{name}_power={power} has no effect with diffusion.schedule.kind=linear; use kind=power"
        )
    if kind == "power" and num_timesteps < 2:
        raise ConfigError("diffusion.schedule.kind=power needs diffusion.num_timesteps of at least 2")
    if shape == "average":
        weights = torch.ones(num_timesteps, dtype=dtype)
    elif shape == "normal":
        weights = torch.exp(-0.5 * torch.linspace(-3, 3, num_timesteps, dtype=dtype) ** 2)
    elif kind == "linear":
        weights = torch.arange(1, num_timesteps + 1, dtype=dtype)
    else:
        weights = torch.linspace(0, 1, num_timesteps, dtype=dtype) ** power
    weights = weights / weights.sum()
    return weights.flip(0) if shape == "decreased" else weights


def _ddpm_betas(name: str, num_timesteps: int, dtype: torch.dtype) -> Tensor:
    """Noise variances of a DDPM.   ->  (T,) of `dtype`."""
    if name == "linear":
        return torch.linspace(1e-4, 2e-2, num_timesteps, dtype=dtype)
    if name == "scaled_linear":
        return torch.linspace(1e-4**0.5, 2e-2**0.5, num_timesteps, dtype=dtype) ** 2
    # squaredcos: b_i = min(1 - f((i + 1) / T) / f(i / T), 0.999), f(u) = cos^2((u + 0.008) / 1.008 * pi / 2)
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999).to(dtype)


def _differences(sums: Tensor) -> Tensor:
    """Increments of a cumulative table that starts from 0.   sums: (T,)  ->  (T,)."""
    return torch.diff(sums, prepend=torch.zeros(1, dtype=sums.dtype))


def _check_choice(key: str, value: str, allowed: tuple[str, ...], context: str = "") -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value} is not known{context}; choose one of {', '.join(allowed)}")
