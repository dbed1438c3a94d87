"""Which schedule lies behind coefficient tables that somebody else computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rddm_dist.diffusion.schedule import (
    DDPM_BETAS,
    OFFICIAL_ONE_MINUS_ALPHA_CUMSUM,
    SHAPES,
    Schedule,
    make_schedule,
)

# Of the largest cumulative sum: float32 sums of 1000 steps differ by about 1e-6 from implementation to implementation.
TOLERANCE = 3e-6
MOST_TIMESTEPS = 100_000

Settings = dict[str, Any]


def recognise_schedule(
    *, alpha: Tensor, alpha_cumsum: Tensor, beta2: Tensor, beta2_cumsum: Tensor, one_minus_alpha_cumsum: Tensor
) -> Settings | None:
    """Arguments of `make_schedule` that give these tables, or None.   Tables: (T,) float for t = 1..T

    alpha and beta2 are recognised one by one, as linear, power (with any exponent) or ddim; one kind for both is
    preferred. A sum_scale is told to 5 digits; the authors' tables of kind ddim do not contain it, then it is 1.
    parity is official where 1 - alpha_cumsum[T] was replaced as the authors do.
    """
    num_timesteps = alpha.numel()
    tables = (alpha, alpha_cumsum, beta2, beta2_cumsum, one_minus_alpha_cumsum)
    is_usable = all(table.shape == (num_timesteps,) and bool(torch.isfinite(table).all()) for table in tables)
    if not is_usable or not 1 <= num_timesteps <= MOST_TIMESTEPS:
        return None
    replaced = math.isclose(float(one_minus_alpha_cumsum[-1]), OFFICIAL_ONE_MINUS_ALPHA_CUMSUM, rel_tol=1e-4)
    common = {"num_timesteps": num_timesteps, "parity": "official" if replaced else "clean"}
    alphas = [part for part in _candidates("alpha", alpha) if _fits_alpha(part, common, alpha_cumsum)]
    betas = [fit for part in _candidates("beta2", beta2) if (fit := _fit_beta2(part, common, beta2, beta2_cumsum))]
    # A schedule has one set of DDPM betas.
    pairs = [(one, other) for one in alphas for other in betas if len({one.get("betas"), other.get("betas"), None}) < 3]
    if not pairs:
        return None
    one, other = min(pairs, key=lambda pair: pair[0]["kind"] != pair[1]["kind"])
    mixed = {} if one["kind"] == other["kind"] else {"alpha_kind": one["kind"], "beta2_kind": other["kind"]}
    return {**common, **other, **one, **mixed}


def _candidates(name: str, steps: Tensor) -> Iterator[Settings]:
    """Settings of one part, the likeliest first.   steps: (T,), its increments"""
    for shape in SHAPES["linear"]:
        yield {"kind": "linear", name: shape}
    if len(steps) > 1:
        yield {"kind": "power", name: "average"}
        yield {"kind": "power", name: "normal"}
    for shape, rising in (("increased", steps), ("decreased", steps.flip(0))):
        power = _exponent(rising.double())
        if power is not None:
            yield {"kind": "power", name: shape, f"{name}_power": power}
    for betas in DDPM_BETAS:
        yield {"kind": "ddim", "betas": betas}


def _exponent(rising: Tensor) -> float | None:
    """a of increments proportional to i^a, i = 0..T-1, from two of them, to 3 digits behind the point."""
    middle, last = len(rising) // 2, len(rising) - 1
    if not 0 < middle < last or rising[middle] <= 0 or rising[last] <= 0:
        return None
    power = math.log(rising[middle] / rising[last]) / math.log(middle / last)
    return round(power, 3) if power > 5e-4 else None


def _make(part: Settings, common: Settings, **more: Any) -> Schedule:
    return make_schedule(**{"beta2": "average", "alpha": "average", **part, **common, **more})


def _fits_alpha(part: Settings, common: Settings, sums: Tensor) -> bool:
    return _is_close(_make(part, common).alpha_cumsum[1:], sums)


def _fit_beta2(part: Settings, common: Settings, steps: Tensor, sums: Tensor) -> Settings | None:
    """The part with the sum_scale that fits best, None where it does not fit."""
    total = float(_make(part, common).beta2.double().sum())
    scale = float(f"{float(steps.double().sum()) / total:.5g}") if total > 0 else 0.0
    if part["kind"] == "ddim" and common["parity"] == "official":
        scale = 1.0
    if not (math.isfinite(scale) and scale > 0):
        return None
    is_close = _is_close(_make(part, common, sum_scale=scale).beta2_cumsum[1:], sums)
    return {**part, "sum_scale": scale} if is_close else None


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours.double() - theirs.double().cpu()).abs().max()) <= TOLERANCE * float(theirs.abs().max())
