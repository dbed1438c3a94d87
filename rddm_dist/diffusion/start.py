"""Where sampling starts and which timesteps it visits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.diffusion.process import process_input
from rddm_dist.diffusion.schedule import Schedule


def sampling_timesteps(num_timesteps: int, steps: int, parity: str = "clean") -> list[int]:
    """Visited timesteps, descending, evenly spread: floor(T * k / S), k = S..1.   T=1000, S=5: 1000, 800, ... 200.

    The authors count from 0 and cut linspace(-1, T - 1, S + 1) in float32, whose rounding makes some timesteps 1 less
    than the floor; parity="official" does that too (but for S = T, which visits all).
    """
    if not 1 <= steps <= num_timesteps:
        raise ConfigError(
            f"sampling steps={steps} must lie in 1..{num_timesteps} (diffusion.num_timesteps); change sample.steps"
        )
    if parity == "official" and steps < num_timesteps:
        return [t + 1 for t in torch.linspace(-1, num_timesteps - 1, steps + 1).int().tolist()[:0:-1]]
    return [num_timesteps * k // steps for k in range(steps, 0, -1)]


def start_state(
    schedule: Schedule, *, x_in: Tensor, noise: Tensor, generate: bool = False, process: str = "rddm"
) -> Tensor:
    """The state sampling starts from: the image the process ends in, plus noise.   Both: (B, C, H, W) float32.

    The noise is scaled with beta_cumsum[T]; the authors take 1 for generation and sqrt(sum_scale) for restoration,
    which differs where the schedule ends short of it (kind ddim) or, for generation, where sum_scale is not 1. A DDPM
    starts from unit noise.
    """
    if process == "ddpm":
        scale = 1.0
    elif schedule.parity == "official":
        scale = 1.0 if generate else math.sqrt(schedule.sum_scale)
    else:
        scale = float(schedule.beta_cumsum[-1])
    return process_input(process, x_in) + scale * noise
