"""Power-function profiles of weight averages, and averages of other lengths made from stored ones after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError

# Singular values below this share of the largest are taken as 0: what only they could improve is far below the
# rounding of averages stored in fp32, and it would need weights that magnify that rounding.
TOLERANCE = 1e-7
RESOLUTION = 4096  # updates of an average in the time it is as long as, at least


def length_of(gamma: float) -> float:
    """Relative length of the profile of exponent `gamma` >= 0: its standard deviation over the steps averaged.

    sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))), Karras et al. 2024 (arXiv:2312.02696), section 3.1.
    """
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def gamma_of(length: float) -> float:
    """The exponent > 0 whose profile has the relative length `length`, in (0, 12^-0.5); ConfigError for another.

    The largest root of f = (length (gamma + 2))^2 (gamma + 3) - (gamma + 1). f is convex and positive at 1 / length,
    so Newton's steps from there fall towards the root, until rounding ends the fall.
    """
    if not 0.0 < length < length_of(0.0):
        raise ConfigError(
            f"the relative length {length:g} of an average must be above 0 and below {length_of(0.0):.4f}; "
            "change --length or ema.lengths"
        )
    gamma = 1.0 / length
    while True:
        share = length * (gamma + 2.0)
        value = share**2 * (gamma + 3.0) - (gamma + 1.0)
        slope = share * (2.0 * length * (gamma + 3.0) + share) - 1.0
        smaller = gamma - value / slope
        if not smaller < gamma:
            return gamma
        gamma = smaller


def stride(step: int) -> int:
    """Steps between two updates around `step`: 1, and from 2 RESOLUTION on a power of two that grows with the step.

    The update of step t moves an average by about (gamma + 1) / t of its distance to the weights; in fp32 such a move
    is lost where it is below the rounding of the average. With at most 2 RESOLUTION updates to look back on it is not.
    """
    return 1 << max(0, (step // RESOLUTION).bit_length() - 1)


def updated_at(step: int) -> int:
    """The last step up to `step` whose weights the averages have taken in."""
    return step - step % stride(step)


def power_decay(step: int, length: float) -> float | None:
    """Decay of the update after optimizer step `step` (1, 2, ...) of the average of relative length `length`.

    beta(t) = (t' / t)^(gamma + 1) with t' the step of the update before, 0 for the first, which copies; None: no update
    at this step (see `stride`). With updates at every step the average at step t holds step tau with mass
    (tau^(gamma + 1) - (tau - 1)^(gamma + 1)) / t^(gamma + 1), the density (gamma + 1) tau^gamma / t^(gamma + 1)
    integrated over the step.
    """
    if step % stride(step):
        return None
    return ((step - stride(step - 1)) / step) ** (gamma_of(length) + 1.0)


@dataclass(frozen=True)
class Reconstruction:
    """How to make an average from stored ones.

    weights: one per stored average, their sum is 1
    error: L2 distance of the profile so made to the wanted one, relative to the norm of the wanted one
    """

    weights: tuple[float, ...]
    error: float


def reconstruction(stored: Sequence[tuple[int, float]], *, step: int, length: float) -> Reconstruction:
    """The weighted mean of stored averages that is nearest to the average of relative length `length` at `step`.

    stored: (step, relative length) of each stored average, steps from 1. Those after `step` get weight 0.
    Least squares over the masses of the steps (Karras et al. 2024, section 3.2, there over densities), among weights
    whose sum is 1: what training did not change comes back unchanged. ConfigError for a length outside
    (0, 12^-0.5) and where nothing is stored at or before `step`.
    """
    wanted = (step, gamma_of(length))
    usable = [index for index, (at, _) in enumerate(stored) if at <= step]
    if not usable:
        steps = sorted({at for at, _ in stored})
        there = f"the first is of step {steps[0]}; choose a later step" if steps else "set ema.snapshot_every"
        raise ConfigError(f"no power-function average is stored at or before step {step}: {there}")
    coordinates = _coordinates([*((stored[index][0], gamma_of(stored[index][1])) for index in usable), wanted])
    columns, target = coordinates[:, :-1], coordinates[:, -1]
    found = _nearest_mean(columns, target)
    weights = [0.0] * len(stored)
    for index, weight in zip(usable, found.tolist(), strict=True):
        weights[index] = weight
    error = torch.linalg.vector_norm(columns @ found - target) / torch.linalg.vector_norm(target)
    return Reconstruction(tuple(weights), float(error))


def _coordinates(profiles: Sequence[tuple[int, float]]) -> Tensor:
    """Each (step, gamma) as a column whose products with the others are those of the profiles.   -> (rows, n) float64

    Between two of the steps all profiles of one gamma are multiples of one function of tau, so the profiles span no
    more than one dimension per gamma there: the triangle of a QR factorisation carries their products exactly. Unlike
    the matrix of products itself it does not square the condition of the problem.
    """
    gammas = sorted({gamma for _, gamma in profiles})
    kinds = torch.tensor([gammas.index(gamma) for _, gamma in profiles])
    steps = torch.tensor([step for step, _ in profiles], dtype=torch.float64)
    exponents = torch.tensor(gammas, dtype=torch.float64) + 1.0
    blocks = []
    begin = 0
    for end in sorted({step for step, _ in profiles}):
        tau = torch.arange(begin + 1, end + 1, dtype=torch.float64)[:, None]
        masses = (tau / end) ** exponents * -torch.expm1(exponents * torch.log1p(-1.0 / tau))  # (end - begin, gammas)
        triangle = torch.linalg.qr(masses, mode="r").R
        shares = torch.where(steps >= end, (end / steps) ** exponents[kinds], 0.0)  # (n,)
        blocks.append(triangle[:, kinds] * shares)
        begin = end
    return torch.cat(blocks)


def _nearest_mean(columns: Tensor, target: Tensor) -> Tensor:
    """The x of sum 1 with the least |columns x - target|.   columns: (rows, n), target: (rows,) -> (n,), all float64"""
    count = columns.shape[1]
    even = torch.full((count,), 1.0 / count, dtype=torch.float64)
    if count == 1:
        return even
    ones = torch.ones(count, 1, dtype=torch.float64)
    changes = torch.linalg.qr(ones, mode="complete").Q[:, 1:]  # all directions that keep the sum
    rest = (target - columns @ even)[:, None]
    solved = torch.linalg.lstsq(columns @ changes, rest, rcond=TOLERANCE, driver="gelsd")
    return even + changes @ solved.solution[:, 0]
