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
PART_KINDS = ("same", *KINDS)
SHAPES = {"linear": ("decreased", "increased", "average"), "power": ("decreased", "increased", "average", "normal")}
DDPM_BETAS = ("linear", "scaled_linear", "squaredcos")
PARITIES = ("clean", "official")
# Beyond these the tables, which are float32, end in 0 or infinity.
SUM_SCALES = (1e-30, 1e30)

# What the authors put in place of 1 - alpha_cumsum[T], and their floor of the posterior variance under the logarithm.
OFFICIAL_ONE_MINUS_ALPHA_CUMSUM = 1e-6
VARIANCE_FLOOR = 1e-20


@dataclass(frozen=True, eq=False)
class Schedule:
    """The frozen tables, each (T+1,) float32; row t belongs to x_t, row 0 is the clean image.

    x_t = x0 + alpha_cumsum[t] * residual + beta_cumsum[t] * noise, with residual = x_in - x0.
    The exact posterior q(x_{t-1} | x_t, x0, residual) has mean coef1 * x_t + coef2 * residual + coef3 * x0.
    Row 0 of the posterior tables is not used by anything and holds the identity on x0.
    Noise-only prediction takes x0 = (x_t - estimate_alpha_cumsum x_in - beta_cumsum noise) / one_minus_alpha_cumsum;
    estimate_alpha_cumsum is alpha_cumsum but in a schedule readjusted with keeps_estimate, where both stay the
    network's own.
    """

    alpha: Tensor
    alpha_cumsum: Tensor
    one_minus_alpha_cumsum: Tensor
    estimate_alpha_cumsum: Tensor
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
    alpha_kind: str = "same",
    beta2_kind: str = "same",
    sum_scale: float = 1.0,
    parity: str = "clean",
) -> Schedule:
    """Build a schedule; alpha sums to 1 and beta2 to `sum_scale` (kind ddim: almost).

    linear: weights 1..T (increased), T..1 (decreased) or equal (average).
    power:  the weights i^a, i = 0..T-1, of the paper's P(x, a) (increased, a = beta2_power or alpha_power) and
            P(1-x, a) (decreased); average; normal, a Gaussian bell over [-3, 3].
    ddim:   converted from DDPM betas b: alpha_cumsum = 1 - sqrt(prod(1 - b)), beta2_cumsum = 1 - prod(1 - b).
    `alpha_kind` and `beta2_kind` choose a kind for one of the two alone; same means `kind`.

    parity="official" reproduces the authors' buffers: float32 arithmetic in the power and ddim families, 1e-6 in place
    of 1 - alpha_cumsum[T], cumulative sums clipped to [0, 1], kind ddim ignoring sum_scale in its tables and having
    zero increments at t = 1.
    """
    _check_choice("diffusion.schedule.kind", kind, KINDS)
    _check_choice("diffusion.schedule.alpha_kind", alpha_kind, PART_KINDS)
    _check_choice("diffusion.schedule.beta2_kind", beta2_kind, PART_KINDS)
    _check_choice("diffusion.parity", parity, PARITIES)
    if num_timesteps < 1:
        raise ConfigError(f"diffusion.num_timesteps={num_timesteps} must be at least 1")
    if not SUM_SCALES[0] <= sum_scale <= SUM_SCALES[1]:
        raise ConfigError(
            f"diffusion.sum_scale={sum_scale} must be a number above 0, in {SUM_SCALES[0]:g}..{SUM_SCALES[1]:g}"
        )
    alpha_key, alpha_kind = ("kind", kind) if alpha_kind == "same" else ("alpha_kind", alpha_kind)
    beta2_key, beta2_kind = ("kind", kind) if beta2_kind == "same" else ("beta2_kind", beta2_kind)
    is_official = parity == "official"

    def dtype_of(family: str) -> torch.dtype:
        return torch.float32 if is_official and family != "linear" else torch.float64

    if alpha_kind == "ddim":
        alpha_tables = _ddim_alpha(_alpha_bar(betas, num_timesteps, dtype_of("ddim")), is_official)
    else:
        _check_weights("alpha", alpha_key, kind=alpha_kind, shape=alpha, power=alpha_power, num_timesteps=num_timesteps)
        weights = _weights(alpha_kind, alpha, alpha_power, num_timesteps, dtype_of(alpha_kind))
        alpha_tables = _summed_alpha(weights, is_official)
    if beta2_kind == "ddim":
        beta2_tables = _ddim_beta2(_alpha_bar(betas, num_timesteps, dtype_of("ddim")), sum_scale, is_official)
    else:
        _check_weights("beta2", beta2_key, kind=beta2_kind, shape=beta2, power=beta2_power, num_timesteps=num_timesteps)
        weights = _weights(beta2_kind, beta2, beta2_power, num_timesteps, dtype_of(beta2_kind)) * sum_scale
        sums = torch.cumsum(weights, 0)
        beta2_tables = weights, sums.clamp(0, 1) if is_official else sums
    return _assemble(alpha_tables, beta2_tables, sum_scale=sum_scale, parity=parity)


def schedule_from_alpha_bar(alpha_bar: Tensor) -> Schedule:
    """The schedule of a DDPM: alpha_cumsum = 1 - sqrt(alpha_bar), beta2_cumsum = 1 - alpha_bar, for x_in = 0.

    alpha_bar: (T,) float in (0, 1], the cumulative products of 1 - b, not increasing.
    """
    alpha_bar = alpha_bar.double()
    is_sound = alpha_bar.ndim == 1 and len(alpha_bar) > 0
    if not (is_sound and bool(((alpha_bar > 0) & (alpha_bar <= 1)).all() and (alpha_bar.diff() <= 0).all())):
        raise ConfigError("alpha_bar of a DDPM must be a row of numbers in (0, 1] that never increase")
    return _assemble(_ddim_alpha(alpha_bar, False), _ddim_beta2(alpha_bar, 1.0, False), sum_scale=1.0, parity="clean")


def readjust(
    schedule: Schedule, *, alpha: Schedule | None = None, beta2: Schedule | None = None, keeps_estimate: bool = False
) -> Schedule:
    """A schedule for sampling with coefficients other than those of training: alpha of one, beta2 of another.

    alpha, beta2: schedules of the same T that give their alpha and beta2 tables, None keeps those of `schedule`. The
    posterior follows. With keeps_estimate, noise-only prediction goes on estimating the residual with the alpha_cumsum
    of `schedule`, so that only the speed changes at which the residual is removed.
    """
    alpha, beta2 = alpha or schedule, beta2 or schedule
    for other in (alpha, beta2):
        if other.num_timesteps != schedule.num_timesteps:
            raise ConfigError(
                f"a schedule of {other.num_timesteps} timesteps cannot readjust one of {schedule.num_timesteps}; give "
                "sample.schedule the timesteps of diffusion.num_timesteps"
            )
    estimate = schedule if keeps_estimate else alpha
    adjusted = _with_posterior(
        alpha=alpha.alpha.double(),
        alpha_cumsum=alpha.alpha_cumsum.double(),
        one_minus_alpha_cumsum=alpha.one_minus_alpha_cumsum.double(),
        beta2=beta2.beta2.double(),
        beta2_cumsum=beta2.beta2_cumsum.double(),
        sum_scale=beta2.sum_scale,
        parity=schedule.parity,
    )
    return dataclasses.replace(
        adjusted,
        beta_cumsum=beta2.beta_cumsum,
        one_minus_alpha_cumsum=estimate.one_minus_alpha_cumsum,
        estimate_alpha_cumsum=estimate.estimate_alpha_cumsum,
    )


def ddpm_betas(name: str, num_timesteps: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise variances b of a DDPM.   ->  (T,) of `dtype`.

    linear: from 1e-4 to 2e-2; scaled_linear: the same with even steps of the square root;
    squaredcos: b_i = min(1 - f((i + 1) / T) / f(i / T), 0.999), f(u) = cos^2((u + 0.008) / 1.008 * pi / 2).
    """
    _check_choice("diffusion.schedule.betas", name, DDPM_BETAS)
    if name == "linear":
        return torch.linspace(1e-4, 2e-2, num_timesteps, dtype=dtype)
    if name == "scaled_linear":
        return torch.linspace(1e-4**0.5, 2e-2**0.5, num_timesteps, dtype=dtype) ** 2
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999).to(dtype)


# The parts of a schedule over t = 1..T: alpha as (increments, sums, 1 - sums), beta2 as (increments, sums).
_Alpha = tuple[Tensor, Tensor, Tensor]
_Beta2 = tuple[Tensor, Tensor]


def _summed_alpha(weights: Tensor, is_official: bool) -> _Alpha:
    """Increments that sum to 1.   weights: (T,)."""
    sums = torch.cumsum(weights, 0)
    if is_official:
        sums = sums.clamp(0, 1)
        return weights, sums, 1 - sums
    # Summed from the other end: exact zeros and full precision where alpha_cumsum is close to 1.
    return weights, sums, torch.cat([weights.flip(0).cumsum(0).flip(0)[1:], weights.new_zeros(1)])


def _alpha_bar(betas: str, num_timesteps: int, dtype: torch.dtype) -> Tensor:
    return torch.cumprod(1 - ddpm_betas(betas, num_timesteps, dtype), 0)


def _ddim_alpha(alpha_bar: Tensor, is_official: bool) -> _Alpha:
    """alpha_cumsum = 1 - sqrt(alpha_bar).   alpha_bar: (T,)."""
    rest = alpha_bar.sqrt()
    sums = 1 - rest
    steps = _differences(sums)
    if is_official:
        steps[0] = 0
    return steps, sums, rest


def _ddim_beta2(alpha_bar: Tensor, sum_scale: float, is_official: bool) -> _Beta2:
    """beta2_cumsum = sum_scale * (1 - alpha_bar); the authors ignore sum_scale.   alpha_bar: (T,)."""
    sums = 1 - alpha_bar
    steps = _differences(sums)
    if is_official:
        steps[0] = 0
        return steps, sums
    return steps * sum_scale, sums * sum_scale


def _assemble(alpha: _Alpha, beta2: _Beta2, *, sum_scale: float, parity: str) -> Schedule:
    """Put row 0, the clean image, in front of the parts."""
    alpha_steps, alpha_sums, rest_sums = alpha
    beta2_steps, beta2_sums = beta2
    if parity == "official":
        rest_sums = torch.cat([rest_sums[:-1], rest_sums.new_full((1,), OFFICIAL_ONE_MINUS_ALPHA_CUMSUM)])

    def with_row_0(rows: Tensor, first: float) -> Tensor:
        return torch.cat([rows.new_full((1,), first), rows])

    return _with_posterior(
        alpha=with_row_0(alpha_steps, 0.0),
        alpha_cumsum=with_row_0(alpha_sums, 0.0),
        one_minus_alpha_cumsum=with_row_0(rest_sums, 1.0),
        beta2=with_row_0(beta2_steps, 0.0),
        beta2_cumsum=with_row_0(beta2_sums, 0.0),
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
        estimate_alpha_cumsum=alpha_cumsum.float(),
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


def _check_weights(name: str, kind_key: str, *, kind: str, shape: str, power: float, num_timesteps: int) -> None:
    """Raise ConfigError for weights that do not exist.   kind_key: the key that chose the kind, kind or {name}_kind"""
    with_kind = f" with diffusion.schedule.{kind_key}={kind}"
    _check_choice(f"diffusion.schedule.{name}", shape, SHAPES[kind], with_kind)
    if not (math.isfinite(power) and power >= 0):
        raise ConfigError(f"diffusion.schedule.{name}_power={power} must be a number of at least 0")
    if kind == "linear" and power != 1:
        raise ConfigError(f"diffusion.schedule.{name}_power={power} has no effect{with_kind}; use {kind_key}=power")
    if kind == "power" and num_timesteps < 2:
        raise ConfigError(f"diffusion.schedule.{kind_key}=power needs diffusion.num_timesteps of at least 2")


def _weights(kind: str, shape: str, power: float, num_timesteps: int, dtype: torch.dtype) -> Tensor:
    """Increments over t = 1..T that sum to 1.   ->  (T,) of `dtype`."""
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


def _differences(sums: Tensor) -> Tensor:
    """Increments of a cumulative table that starts from 0.   sums: (T,)  ->  (T,)."""
    return torch.diff(sums, prepend=torch.zeros(1, dtype=sums.dtype))


def _check_choice(key: str, value: str, allowed: tuple[str, ...], context: str = "") -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value} is not known{context}; choose one of {', '.join(allowed)}")
