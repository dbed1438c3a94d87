"""Reference numbers of the diffusion core, the fake networks they were made with, and networks that know the answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.rng import Draws
from rddm_dist.diffusion.prediction import OUTPUTS
from rddm_dist.diffusion.sampler import sample
from rddm_dist.diffusion.schedule import Schedule

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(GOLDEN_DIR / "diffusion.npz")
SCALARS = json.loads((GOLDEN_DIR / "diffusion_scalars.json").read_text())

Fake = Callable[[Tensor, tuple[Tensor, Tensor], Tensor, Tensor | None, Tensor | None], Sequence[Tensor]]


def golden(name: str) -> Tensor:
    """An array of diffusion.npz."""
    return torch.from_numpy(GOLDEN[name])


X0, X_IN, NOISE = golden("inputs/x0"), golden("inputs/x_in"), golden("inputs/eps")


def pattern(shape: Sequence[int], a: float, b: float, wave: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """wave(a j + b) over the flat index j, in float64, as float32 of the given shape."""
    j = np.arange(int(np.prod(shape)), dtype=np.float64)
    return torch.from_numpy(wave(a * j + b).astype(np.float32).reshape(shape))


@dataclass(frozen=True)
class PatternDraws:
    """The start noise and the k-th stochastic noise of the reference numbers; `phase` fixes k."""

    phase: float | None = None

    def noise(self, shape: torch.Size | tuple[int, ...], step: int = 0) -> Tensor:
        if step == 0:
            return pattern(shape, 0.9, 0.2, np.cos)
        return pattern(shape, 0.41, step if self.phase is None else self.phase, np.sin)


class _KeptDraws:
    """Counted draws of two samples, each computed once: where thousands of short runs take the same ones."""

    def noise(self, shape: torch.Size | tuple[int, ...], step: int = 0) -> Tensor:
        return _drawn(tuple(shape), step)


@cache
def _drawn(shape: tuple[int, ...], step: int) -> Tensor:
    return Draws(seed=9, ids=torch.tensor([4, 1])).noise(shape, step)


KEPT_DRAWS: Any = _KeptDraws()


@dataclass(frozen=True)
class FixedDraws:
    """Given timesteps and noise in place of drawn ones; only the first of the samples, if any, wins its coin."""

    t: Tensor
    fixed_noise: Tensor

    def timesteps(self, num_timesteps: int) -> Tensor:
        assert int(self.t.max()) <= num_timesteps
        return self.t

    def noise(self, shape: torch.Size, step: int = 0) -> Tensor:
        assert shape == self.fixed_noise.shape
        return self.fixed_noise

    def self_condition(self) -> Tensor:
        return torch.arange(len(self.t)) == 0


def fake_restoration(
    x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Tensor | None, x_self: Tensor | None
) -> list[Tensor]:
    """The two-output network of the restoration trajectories."""
    tau = times[0].reshape(-1, 1, 1, 1) / 1000
    return [0.3 * (x_in - 0.5 * x_t) + 0.05 * tau, 0.2 * x_t - 0.1 * x_in + 0.3 * tau]


def fake_generation(
    x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Tensor | None, x_self: Tensor | None
) -> list[Tensor]:
    """The two-output network of the generation trajectories."""
    tau = times[0].reshape(-1, 1, 1, 1) / 1000
    return [-0.4 * x_t + 0.05 * tau, 0.6 * x_t + 0.1 * tau]


def true_outputs(
    objective: str,
    *,
    x_in: Tensor,
    x0: Tensor,
    noise: Tensor,
    alpha_cumsum: Tensor | float,
    beta_cumsum: Tensor | float,
) -> list[Tensor]:
    """What a perfect network gives at these levels; x_in is that of the process."""
    known = {"residual": x_in - x0, "noise": noise, "x0": x0}
    known["velocity"] = (1 - alpha_cumsum) * noise - beta_cumsum * x0
    return [torch.stack([known[part] for part in name.split(" + ")]).sum(0) for name in OUTPUTS[objective]]


def oracle(objective: str, schedule: Schedule, x0: Tensor, *, process: str = "rddm", time_input: str = "index") -> Fake:
    """A network that knows x0: the noise is what is left of x_t at the levels it is told."""

    def net(
        x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Tensor | None, x_self: Tensor | None
    ) -> list[Tensor]:
        if time_input == "clocks":
            alpha = float(times[0][0]) / schedule.num_timesteps
            beta = float(times[1][0]) / schedule.num_timesteps
        else:
            alpha = float(schedule.alpha_cumsum[int(times[0][0]) + 1])
            beta = float(schedule.beta_cumsum[int(times[1][0]) + 1])
        end = torch.zeros_like(x_in) if process == "ddpm" else x_in
        rest = x_t - x0 - alpha * (end - x0)
        noise = rest / beta if beta > 0 else torch.zeros_like(rest)
        return true_outputs(objective, x_in=end, x0=x0, noise=noise, alpha_cumsum=alpha, beta_cumsum=beta)

    return net


def trajectory(net: Fake, schedule: Schedule, *, steps: int, **settings: Any) -> Tensor:
    """All states of `sample` with the reference draws.   ->  (1 + steps, B, C, H, W), the start first."""
    states: list[Tensor] = []
    run: dict[str, Any] = {"objective": "pred_res_noise", "clip_residual": (-1.0, 1.0), "draws": PatternDraws()}
    result = sample(
        net,
        schedule,
        x_in=X_IN,
        steps=steps,
        on_step=lambda k, x, prediction: states.append(x),
        **{**run, **settings},
    )
    assert torch.equal(result, states[-1]) and ("path" in settings or len(states) == steps + 1)
    return torch.stack(states)
