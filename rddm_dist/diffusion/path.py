"""Paths: in which order, and how fast, residual and noise are removed; partially path-independent generation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.diffusion.prediction import Estimator, OnStep, Prediction
from rddm_dist.diffusion.process import Levels, levels_at, network_times, times_of_levels
from rddm_dist.diffusion.schedule import Schedule
from rddm_dist.diffusion.start import sampling_timesteps
from rddm_dist.diffusion.update import Jump, residual_step

# A path is its vertices (alpha_cumsum, beta_cumsum), from those of the last timestep down to (0, 0).
Path = tuple[tuple[float, float], ...]
# A path by name or by its vertices. two_pass is the authors' committed sampler, which follows no path.
PathChoice = str | Sequence[Sequence[float]]
SIMULTANEOUS, TWO_PASS = "simultaneous", "two_pass"
PATHS = (SIMULTANEOUS, "residual_first", "noise_first", TWO_PASS)
# How far the first vertex may be from the state that sampling starts from.
START_TOLERANCE = 1e-4


def make_path(schedule: Schedule, choice: PathChoice, *, steps: int) -> Path:
    """The vertices of a path by name, or given vertices once they are checked.

    simultaneous:   residual and noise together, over the levels of `steps` timesteps of the schedule;
    residual_first: alpha_cumsum down to 0 over these levels while beta_cumsum stays, then beta_cumsum: 2 * steps;
    noise_first:    the other way round.
    Separate reverse schedules for the two are a schedule with other tables: `schedule.readjust`.
    """
    if not isinstance(choice, str):
        path = tuple(_vertex(vertex) for vertex in choice)
        check_path(schedule, path)
        return path
    if choice not in PATHS:
        raise ConfigError(f"sample.path={choice} is not known; choose one of {', '.join(PATHS)} or give its vertices")
    if choice == TWO_PASS:
        raise ConfigError(f"sample.path={TWO_PASS} has no vertices; choose one of {', '.join(PATHS[:-1])}")
    rows = [*sampling_timesteps(schedule.num_timesteps, steps, schedule.parity), 0]
    alphas, betas = schedule.alpha_cumsum[rows].tolist(), schedule.beta_cumsum[rows].tolist()
    if choice == SIMULTANEOUS:
        return tuple(zip(alphas, betas, strict=True))
    if choice == "residual_first":
        return (*((alpha, betas[0]) for alpha in alphas), *((0.0, beta) for beta in betas[1:]))
    return (*((alphas[0], beta) for beta in betas), *((alpha, 0.0) for alpha in alphas[1:]))


def check_path(schedule: Schedule, path: Path) -> None:
    """Raise ConfigError unless the path leads from the last timestep of the schedule to (0, 0) without ever rising."""
    if len(path) < 2:
        raise ConfigError(f"sample.path needs at least 2 vertices, got {len(path)}")
    end = (float(schedule.alpha_cumsum[-1]), float(schedule.beta_cumsum[-1]))
    if max(abs(path[0][0] - end[0]), abs(path[0][1] - end[1])) > START_TOLERANCE:
        raise ConfigError(
            f"sample.path starts at {_text(path[0])} but the schedule ends at {_text(end)}; start the path there"
        )
    if path[-1] != (0.0, 0.0):
        raise ConfigError(f"sample.path ends at {_text(path[-1])}; its last vertex must be (0, 0), the clean image")
    for before, after in zip(path, path[1:], strict=False):
        if after[0] > before[0] or after[1] > before[1]:
            raise ConfigError(
                f"sample.path rises from {_text(before)} to {_text(after)}; alpha_cumsum and beta_cumsum may only fall"
            )


def follow_path(
    estimate: Estimator,
    schedule: Schedule,
    path: Path,
    *,
    start: Tensor,
    time_input: str = "index",
    on_step: OnStep | None = None,
) -> Tensor:
    """x <- x - (a_k - a_{k+1}) residual - (b_k - b_{k+1}) noise along the vertices (a_k, b_k), then clamp to [-1, 1].

    start: (B, C, H, W) float32, the state at the first vertex; one estimate for each vertex but the last
    ->  (B, C, H, W) float32. Both networks are told where they are by `times_of_levels`; noise-only prediction uses the
    alpha_cumsum of the vertex. The result depends on the path only as far as the estimates do.
    """
    x, previous = start, None
    if on_step is not None:
        on_step(0, x, None)
    for k, ((alpha, beta), (next_alpha, next_beta)) in enumerate(zip(path, path[1:], strict=False), start=1):
        times = times_of_levels(schedule, alpha_cumsum=alpha, beta_cumsum=beta, time_input=time_input)
        previous = estimate(
            x,
            times=(_rows(x, times[0]).flatten(), _rows(x, times[1]).flatten()),
            levels=Levels(_rows(x, alpha), _rows(x, beta), _rows(x, alpha), _rows(x, 1.0 - alpha)),
            previous=previous,
        )
        x = x - (alpha - next_alpha) * previous.residual - (beta - next_beta) * previous.noise
        if k == len(path) - 1:
            x = x.clamp(-1, 1)
        if on_step is not None:
            on_step(k, x, previous)
    return x


def follow_two_pass(
    estimate: Estimator,
    schedule: Schedule,
    *,
    start: Tensor,
    steps: int,
    update: str = "pred_noise",
    time_input: str = "clocks",
    on_step: OnStep | None = None,
) -> Tensor:
    """The authors' sampler for path-independent generation: all timesteps for the residual, then again for the noise.

    start: (B, C, H, W) float32; 2 * steps estimates  ->  (B, C, H, W) float32 in [-1, 1]. Each pass ends by taking the
    estimated x0, and times follow the timesteps in both, so the second pass starts from an image that it is told is
    noisy: kept to reproduce published numbers, `residual_first` does what is meant. update=x0 takes the whole step in
    both passes.
    """
    timesteps = sampling_timesteps(schedule.num_timesteps, steps, schedule.parity)
    alpha_cumsum, beta2_cumsum = schedule.alpha_cumsum.tolist(), schedule.beta2_cumsum.tolist()
    x: Tensor = start
    previous: Prediction | None = None
    if on_step is not None:
        on_step(0, x, None)
    for k in range(2 * steps):
        t, is_last = timesteps[k % steps], k % steps == steps - 1
        t_rows = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        times = network_times(schedule, t_rows, time_input)
        previous = estimate(x, times=times, levels=levels_at(schedule, t_rows), previous=previous)
        if is_last:
            x = previous.x0
        else:
            u = timesteps[k % steps + 1]
            alphas, beta2s = (alpha_cumsum[t], alpha_cumsum[u]), (beta2_cumsum[t], beta2_cumsum[u])
            if update == "x0":
                x = residual_step(x, previous, Jump(alphas, beta2s), update=update, variance=0.0, noise=None)
            elif k < steps:
                x = x - (alphas[0] - alphas[1]) * previous.residual
            else:
                x = x - (math.sqrt(beta2s[0]) - math.sqrt(beta2s[1])) * previous.noise
        if on_step is not None:
            on_step(k + 1, x, previous)
    return x


def _vertex(values: Sequence[float]) -> tuple[float, float]:
    if isinstance(values, str) or len(values) != 2 or not all(math.isfinite(value) for value in values):
        raise ConfigError(f"sample.path has the vertex {values}; give pairs [alpha_cumsum, beta_cumsum] of numbers")
    return float(values[0]), float(values[1])


def _text(vertex: tuple[float, float]) -> str:
    return f"({vertex[0]:.6g}, {vertex[1]:.6g})"


def _rows(x: Tensor, value: float) -> Tensor:
    """The same number for every row of x.   ->  (B, 1, 1, 1) float32."""
    return torch.full((len(x), 1, 1, 1), value, dtype=torch.float32, device=x.device)
