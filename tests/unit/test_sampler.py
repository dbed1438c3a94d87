"""Samplers: official trajectories, an oracle for every objective, eta and number of steps, and refusals."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.objective import OBJECTIVES, OUTPUTS, Prediction
from rddm_dist.diffusion.sampler import UPDATES, check_sampling, sample, sampling_timesteps
from rddm_dist.diffusion.schedule import Schedule, make_schedule

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(GOLDEN_DIR / "diffusion.npz")
SUBSETS = json.loads((GOLDEN_DIR / "diffusion_scalars.json").read_text())["timestep_subsets"]
OFFICIAL_UPDATES = {
    "use_pred_noise": "pred_noise",
    "use_x_start": "x0",
    "special_eta_0": "eta0",
    "special_eta_1": "eta1",
}

Fake = Callable[[Tensor, tuple[Tensor, Tensor], Tensor, Tensor | None], list[Tensor]]


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


X0, X_IN = golden("inputs/x0"), golden("inputs/x_in")


class PatternDraws:
    """The start noise and the k-th stochastic noise of the reference numbers."""

    def noise(self, shape: torch.Size, step: int = 0) -> Tensor:
        j = np.arange(shape.numel(), dtype=np.float64)
        values = np.cos(0.9 * j + 0.2) if step == 0 else np.sin(0.41 * j + step)
        return torch.from_numpy(values.astype(np.float32).reshape(shape))


def fake_restoration(x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Tensor | None) -> list[Tensor]:
    tau = times[0].reshape(-1, 1, 1, 1) / 1000
    return [0.3 * (x_in - 0.5 * x_t) + 0.05 * tau, 0.2 * x_t - 0.1 * x_in + 0.3 * tau]


def fake_generation(x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Tensor | None) -> list[Tensor]:
    tau = times[0].reshape(-1, 1, 1, 1) / 1000
    return [-0.4 * x_t + 0.05 * tau, 0.6 * x_t + 0.1 * tau]


def trajectory(net: Fake, schedule: Schedule, *, steps: int, **settings: Any) -> Tensor:
    """All states, the start first.   ->  (steps + 1, B, C, H, W)."""
    states: list[Tensor] = []
    settings.setdefault("objective", "pred_res_noise")
    result = sample(
        net,
        schedule,
        x_in=X_IN,
        steps=steps,
        draws=PatternDraws(),  # type: ignore[arg-type]
        clip_residual=(-1.0, 1.0),
        on_step=lambda k, x, prediction: states.append(x),
        **settings,
    )
    assert torch.equal(result, states[-1]) and len(states) == steps + 1
    return torch.stack(states)


def assert_golden(states: Tensor, name: str) -> None:
    expected = golden(name) * 2 - 1
    torch.testing.assert_close(states[-len(expected) :], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in GOLDEN.files if name.startswith("traj_cond/")])
def test_restoration_trajectories_equal_the_published_ones(name: str) -> None:
    _, size, rule = name.split("/")
    total, steps, *scale = size.split("_")
    update, eta = rule.rsplit("_eta", 1)
    schedule = make_schedule(
        num_timesteps=int(total[1:]), sum_scale=float(scale[0][1:]) if scale else 1.0, parity="official"
    )
    states = trajectory(
        fake_restoration, schedule, steps=int(steps[1:]), eta=float(eta), update=OFFICIAL_UPDATES[update]
    )
    assert_golden(states, name)


@pytest.mark.parametrize(("total", "kind"), [(10, "linear"), (1000, "linear"), (1000, "power")])
def test_generation_trajectories_equal_the_published_ones(total: int, kind: str) -> None:
    schedule = make_schedule(kind=kind, num_timesteps=total, parity="official")
    states = trajectory(fake_generation, schedule, steps=5, generate=True)
    assert_golden(states, f"traj_gen/T{total}_S5_{kind}/use_pred_noise_eta0.0")


@pytest.mark.parametrize(("objective", "output"), [("pred_res", 0), ("pred_noise", 1)])
def test_single_output_trajectories_equal_the_published_ones(objective: str, output: int) -> None:
    states = trajectory(
        lambda *args: [fake_restoration(*args)[output]], make_schedule(parity="official"), steps=5, objective=objective
    )
    assert_golden(states, f"traj_cond_single/T1000_S5/{objective}")


def test_translation_trajectory_with_clock_times_equals_the_published_one() -> None:
    schedule = make_schedule(kind="power", parity="official")
    assert_golden(
        trajectory(fake_generation, schedule, steps=5, time_input="clocks"), "traj_translation/exp4_T1000_S5_power"
    )


@pytest.mark.parametrize(("task", "net"), [("cond", fake_restoration), ("gen", fake_generation)])
def test_ancestral_trajectories_equal_the_published_ones(task: str, net: Fake) -> None:
    schedule = make_schedule(num_timesteps=10, parity="official")
    assert_golden(trajectory(net, schedule, steps=10, generate=task == "gen"), f"traj_ddpm/T10_{task}")


@pytest.mark.parametrize("name", SUBSETS)
def test_visited_timesteps_equal_the_published_ones(name: str) -> None:
    total, steps = (int(part[1:]) for part in name.split("_"))
    ours, theirs = [t - 1 for t in [*sampling_timesteps(total, steps), 0]], SUBSETS[name]
    if isinstance(theirs, dict):
        theirs_summary = (theirs["first"], theirs["last"], theirs["len"], theirs["sum"])
        assert (ours[:6], ours[-6:], len(ours), sum(ours)) == theirs_summary
    else:
        assert ours == theirs


def oracle(objective: str, schedule: Schedule, x0: Tensor) -> Fake:
    """A network that knows x0: the noise is what is left of x_t."""

    def net(x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Tensor | None) -> list[Tensor]:
        t = int(times[0][0]) + 1
        rest = x_t - x0 - schedule.alpha_cumsum[t] * (x_in - x0)
        noise = rest / schedule.beta_cumsum[t] if schedule.beta_cumsum[t] > 0 else torch.zeros_like(rest)
        known = {"residual": x_in - x0, "noise": noise, "x0": x0}
        return [torch.stack([known[part] for part in name.split(" + ")]).sum(0) for name in OUTPUTS[objective]]

    return net


SCHEDULES: list[dict[str, Any]] = [
    {"sum_scale": 1.0},
    {"sum_scale": 0.01, "alpha": "average", "beta2": "average"},
    {"kind": "power", "alpha_power": 0.5, "beta2_power": 2.0},
    {"kind": "ddim"},
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("update", "parity"), [*((update, "clean") for update in UPDATES), ("pred_noise", "official")])
def test_an_oracle_restores_x0(objective: str, update: str, parity: str) -> None:
    """For every schedule, number of steps, eta, and with or without a degraded image."""
    draws, num_refused = Draws(seed=9, ids=torch.tensor([4, 1])), 0
    for settings, steps, eta, generate in itertools.product(SCHEDULES, (1, 3, 19, 20), (0.0, 0.7), (False, True)):
        schedule = make_schedule(num_timesteps=20, parity=parity, **settings)
        timesteps = sampling_timesteps(20, steps)
        run = {"objective": objective, "steps": steps, "eta": eta, "update": update}
        if objective == "pred_noise" and any(schedule.one_minus_alpha_cumsum[t] == 0 for t in timesteps):
            num_refused += 1
            with pytest.raises(ConfigError, match="1 - alpha_cumsum is 0"):
                sample(oracle(objective, schedule, X0), schedule, x_in=X_IN, draws=draws, **run)
            continue
        if objective == "pred_noise" and parity == "official":
            continue  # 1e-6 in place of 1 - alpha_cumsum[T] is wrong by design
        x = sample(oracle(objective, schedule, X0), schedule, x_in=X_IN, draws=draws, generate=generate, **run)
        torch.testing.assert_close(x, X0, rtol=0, atol=1e-4)
    assert (num_refused > 0) == (objective == "pred_noise")


@pytest.mark.parametrize(
    ("one", "other", "etas"),
    [("eta0", "pred_noise", (0.0,)), ("eta1", "pred_noise", (1.0,)), ("x0", "pred_noise", (0.0, 0.4, 1.0))],
)
def test_update_rules_that_should_coincide_coincide(one: str, other: str, etas: tuple[float, ...]) -> None:
    """eta0 is pred_noise at eta 0, eta1 at eta 1, and x0 is pred_noise wherever x0 is not clamped."""
    schedule = make_schedule(num_timesteps=50)

    def imperfect(x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Tensor | None) -> list[Tensor]:
        residual, noise = oracle("pred_res_noise", schedule, X0)(x_t, times, x_in, mask)
        return [0.9 * residual, noise]

    def run(update: str, eta: float) -> Tensor:
        return trajectory(imperfect, schedule, steps=7, eta=eta, update=update)

    for eta in etas:
        states = run(one, eta)
        torch.testing.assert_close(states, run(other, eta), rtol=0, atol=1e-5)
        assert (states[3] - X0).abs().max() > 0.1


def test_ancestral_sampling_is_skipping_nothing_with_eta_1() -> None:
    """Posterior sampling and the x0 rule at eta 1 over all timesteps are one and the same Markov chain."""
    schedule = make_schedule(num_timesteps=8)
    net, noise = fake_restoration, PatternDraws().noise
    states = trajectory(net, schedule, steps=8)
    x = states[0]
    for k, t in enumerate(range(8, 1, -1), start=1):
        t_rows = torch.full((2,), t)
        residual, predicted_noise = net(x, (t_rows - 1.0, t_rows - 1.0), X_IN, None)
        residual = residual.clamp(-1, 1)
        alpha_t, alpha_u = schedule.alpha_cumsum[t], schedule.alpha_cumsum[t - 1]
        beta2_t, beta2_u = schedule.beta2_cumsum[t], schedule.beta2_cumsum[t - 1]
        x0 = (x - alpha_t * residual - beta2_t.sqrt() * predicted_noise).clamp(-1, 1)
        c = beta2_u / beta2_t
        sigma = ((beta2_t - beta2_u) * c).sqrt()
        x = c * x + (1 - c) * x0 + (alpha_u - alpha_t * c) * residual + sigma * noise(x.shape, step=k)
        torch.testing.assert_close(states[k], x, rtol=0, atol=1e-5)


def test_steps_are_reported_with_their_predictions_and_no_gradient() -> None:
    seen: list[tuple[int, bool]] = []

    def on_step(k: int, x: Tensor, prediction: Prediction | None) -> None:
        seen.append((k, prediction is not None))
        assert not x.requires_grad and x.dtype == torch.float32

    scale = torch.ones(1, requires_grad=True)
    sample(
        lambda *args: [(y * scale).bfloat16() for y in fake_restoration(*args)],
        make_schedule(),
        objective="pred_res_noise",
        x_in=X_IN,
        steps=3,
        draws=Draws(seed=0, ids=torch.tensor([0, 1])),
        on_step=on_step,
    )
    assert seen == [(0, False), (1, True), (2, True), (3, True)]


@pytest.mark.parametrize("steps", [4, 10])
def test_a_sample_does_not_depend_on_its_batch(steps: int) -> None:
    schedule = make_schedule(num_timesteps=10)

    def run(rows: list[int]) -> Tensor:
        draws = Draws(seed=5, ids=torch.tensor([100, 200])[rows])
        settings: dict[str, Any] = {"objective": "pred_res_noise", "x_in": X_IN[rows], "steps": steps, "eta": 1.0}
        return sample(fake_restoration, schedule, draws=draws, **settings)

    assert torch.equal(run([0, 1]), torch.cat([run([0]), run([1])]))


def test_clean_sampling_starts_from_the_last_noise_level() -> None:
    """Official restoration starts from sqrt(sum_scale) and generation from 1, the clean one from beta_cumsum[T]."""

    def start(parity: str, generate: bool) -> float:
        schedule = make_schedule(kind="ddim", sum_scale=0.25, parity=parity)
        states = trajectory(fake_generation, schedule, steps=1, generate=generate)
        noise = PatternDraws().noise(X_IN.shape)
        return ((states[0] - (0 if generate else X_IN)) / noise).mean().item()

    assert start("official", True) == pytest.approx(1)
    assert start("official", False) == pytest.approx(0.5)
    clean = float(make_schedule(kind="ddim", sum_scale=0.25).beta_cumsum[-1])
    assert clean == pytest.approx(0.49999, abs=1e-5)
    assert start("clean", True) == pytest.approx(clean) and start("clean", False) == pytest.approx(clean)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 11}, ["steps=11", "1..10", "sample.steps"]),
        ({"steps": 0}, ["steps=0"]),
        ({"eta": -0.1}, ["eta=-0.1", "0..1"]),
        ({"eta": 1.5}, ["eta=1.5"]),
        ({"update": "euler"}, ["update=euler", "pred_noise, x0, eta0, eta1"]),
        ({"objective": "pred_all"}, ["diffusion.objective=pred_all"]),
        ({"objective": "pred_noise"}, ["timestep 10", "1 - alpha_cumsum is 0", "parity=official"]),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_sampling(make_schedule(num_timesteps=10), **{"objective": "pred_res", "steps": 5, **settings})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
