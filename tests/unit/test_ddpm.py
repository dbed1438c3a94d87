"""The DDPM and DDIM baseline: the ddpm process against the textbook, an oracle, and RDDM."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rddm_dist.diffusion.prediction import OBJECTIVES
from rddm_dist.diffusion.process import ddpm_alpha_bar
from rddm_dist.diffusion.sampler import sample
from rddm_dist.diffusion.schedule import make_schedule
from rddm_dist.diffusion.start import sampling_timesteps
from rddm_dist.diffusion.update import UPDATES
from tests.support.diffusion import KEPT_DRAWS, X0, X_IN, Fake, PatternDraws, oracle, trajectory


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_oracle_restores_x0_in_the_ddpm_process(objective: str, update: str) -> None:
    """With the network seeing x_in or not, for DDIM at any eta and for DDPM."""
    draws = KEPT_DRAWS
    etas = (0.0,) if update in ("eta0", "eta1") else (0.0, 0.7)
    for betas, steps, eta in itertools.product(("linear", "squaredcos"), (1, 4, 20), etas):
        generate = steps == 4
        schedule = make_schedule(kind="ddim", betas=betas, num_timesteps=20)
        net = oracle(objective, schedule, X0, process="ddpm")
        settings: dict[str, Any] = {"steps": steps, "eta": eta, "update": update, "generate": generate}
        x = sample(net, schedule, objective=objective, x_in=X_IN, draws=draws, process="ddpm", **settings)
        torch.testing.assert_close(x, X0, rtol=0, atol=1e-4)


def ddim_by_hand(net: Fake, alpha_bar: list[float], visited: list[int], *, eta: float, rederive: bool) -> list[Tensor]:
    """DDIM (and, at eta 1 over all timesteps, DDPM) from its paper, in float64, counting t from 1."""
    draws = PatternDraws()
    x = draws.noise(X_IN.shape).double()
    states = [x]
    for k, (t, u) in enumerate(itertools.pairwise([*visited, 0]), start=1):
        time = torch.full((len(x),), t - 1.0)
        noise = net(x.float(), (time, time), X_IN, None, None)[0].double()
        kept, kept_next = alpha_bar[t], alpha_bar[u]
        x0 = ((x - math.sqrt(1 - kept) * noise) / math.sqrt(kept)).clamp(-1, 1)
        if rederive:
            noise = (x - math.sqrt(kept) * x0) / math.sqrt(1 - kept)
        sigma = eta * math.sqrt((1 - kept_next) / (1 - kept) * (1 - kept / kept_next))
        x = math.sqrt(kept_next) * x0 + math.sqrt(1 - kept_next - sigma**2) * noise
        x = x + sigma * draws.noise(X_IN.shape, step=k).double()
        states.append(x)
    return states


def fake_noise(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
    return [0.8 * x_t - 0.1 * x_in + 0.002 * times[0].reshape(-1, 1, 1, 1)]


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos"])
@pytest.mark.parametrize(
    ("steps", "eta", "update"),
    [(7, 0.0, "pred_noise"), (7, 0.6, "pred_noise"), (7, 0.6, "x0"), (7, 0.6, "eta0"), (7, 0.6, "eta1"), (50, 0, "x0")],
)
def test_the_ddpm_process_samples_as_ddim_and_ddpm_do(betas: str, steps: int, eta: float, update: str) -> None:
    schedule = make_schedule(kind="ddim", betas=betas, num_timesteps=50)
    states = trajectory(
        fake_noise, schedule, steps=steps, eta=eta, update=update, objective="pred_noise", process="ddpm"
    )
    expected = ddim_by_hand(
        fake_noise,
        ddpm_alpha_bar(schedule).tolist(),
        sampling_timesteps(50, steps),
        eta=1.0 if steps == 50 else {"eta0": 0.0, "eta1": 1.0}.get(update, eta),
        rederive=steps == 50 or update == "x0",
    )
    torch.testing.assert_close(states.double(), torch.stack(expected), rtol=0, atol=2e-4)


def test_a_ddpm_step_over_all_timesteps_has_the_textbook_posterior() -> None:
    """sqrt(alpha_bar_u) b / (1 - alpha_bar) x0 + sqrt(1 - b) (1 - alpha_bar_u) / (1 - alpha_bar) x."""
    schedule = make_schedule(kind="ddim", num_timesteps=10)
    alpha_bar = ddpm_alpha_bar(schedule)
    states = trajectory(fake_noise, schedule, steps=10, objective="pred_noise", process="ddpm")
    for k, t in enumerate(range(10, 1, -1), start=1):
        kept, kept_next, x, z = alpha_bar[t], alpha_bar[t - 1], states[k - 1], PatternDraws().noise(X_IN.shape, step=k)
        beta, time = 1 - kept / kept_next, torch.full((2,), t - 1.0)
        noise = fake_noise(x, (time, time), X_IN, None, None)[0]
        x0 = ((x - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1, 1)
        mean = kept_next.sqrt() * beta / (1 - kept) * x0 + (1 - beta).sqrt() * (1 - kept_next) / (1 - kept) * x
        expected = mean + (beta * (1 - kept_next) / (1 - kept)).sqrt() * z
        torch.testing.assert_close(states[k], expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
def test_ddim_without_new_noise_is_rddm_with_nothing_as_its_input(objective: str) -> None:
    """At x_in = 0, eta 0 and without anything clamped the two processes differ only in the noise they start from."""
    schedule = make_schedule(kind="ddim", num_timesteps=50)

    def linear(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
        return [(0.9 if objective == "pred_noise" else 0.1) * x_t]

    rddm, ddpm = (
        trajectory(linear, schedule, steps=6, objective=objective, generate=True, process=process)
        for process in ("rddm", "ddpm")
    )
    assert rddm[-1].abs().max() < 1
    torch.testing.assert_close(rddm, float(schedule.beta_cumsum[-1]) * ddpm, rtol=0, atol=2e-5)
