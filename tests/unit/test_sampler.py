"""Samplers: official trajectories, an oracle for every objective, eta and number of steps, and refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.prediction import OBJECTIVES, Prediction
from rddm_dist.diffusion.sampler import check_sampling, sample
from rddm_dist.diffusion.schedule import make_schedule, readjust
from rddm_dist.diffusion.start import sampling_timesteps
from rddm_dist.diffusion.update import UPDATES
from tests.support.diffusion import (
    GOLDEN,
    KEPT_DRAWS,
    SCALARS,
    X0,
    X_IN,
    Fake,
    PatternDraws,
    fake_generation,
    fake_restoration,
    golden,
    oracle,
    trajectory,
)

SUBSETS = SCALARS["ddim_timestep_subsets"]
OFFICIAL_UPDATES = {
    "use_pred_noise": "pred_noise",
    "use_x_start": "x0",
    "special_eta_0": "eta0",
    "special_eta_1": "eta1",
}


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


@pytest.mark.parametrize(("objective", "use", "output"), [("pred_res", "residual", 0), ("pred_noise", "noise", 1)])
def test_one_output_of_two_samples_as_the_network_that_has_only_that(objective: str, use: str, output: int) -> None:
    schedule = make_schedule(parity="official")
    states = trajectory(fake_restoration, schedule, steps=5, use=use)
    assert_golden(states, f"traj_cond_single/T1000_S5/{objective}")
    alone = trajectory(lambda *args: [fake_restoration(*args)[output]], schedule, steps=5, objective=objective)
    assert torch.equal(states, alone)


@pytest.mark.parametrize("parity", ["clean", "official"])
@pytest.mark.parametrize("name", SUBSETS)
def test_visited_timesteps_equal_the_published_ones(name: str, parity: str) -> None:
    total, steps = (int(part[1:]) for part in name.split("_"))
    ours, theirs = [t - 1 for t in [*sampling_timesteps(total, steps, parity), 0]], SUBSETS[name]
    if isinstance(theirs, dict):
        theirs_summary = (theirs["first"], theirs["last"], theirs["len"], theirs["sum"])
        assert (ours[:6], ours[-6:], len(ours), sum(ours)) == theirs_summary
    else:
        assert ours == theirs


@pytest.mark.parametrize("total", [1, 2, 10, 997, 1000])
def test_timesteps_start_at_the_end_are_even_and_never_repeat(total: int) -> None:
    for parity, steps in itertools.product(("clean", "official"), range(1, total + 1, max(1, total // 50))):
        visited = sampling_timesteps(total, steps, parity)
        assert len(visited) == steps and visited[0] == total and visited[-1] >= 1
        gaps = {before - after for before, after in itertools.pairwise([*visited, 0])}
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= (1 if parity == "clean" else 2)


def test_official_timesteps_are_cut_from_float32() -> None:
    """Where float32 falls short of a whole number the authors' timestep is 1 less; most numbers of steps agree."""
    differing = [s for s in range(1, 1000) if sampling_timesteps(1000, s) != sampling_timesteps(1000, s, "official")]
    assert 0 < len(differing) < 150
    for steps in differing[:10]:
        pairs = zip(sampling_timesteps(1000, steps), sampling_timesteps(1000, steps, "official"), strict=True)
        assert {clean - official for clean, official in pairs} == {0, 1}


SCHEDULES: list[dict[str, Any]] = [
    {"sum_scale": 1.0},
    {"sum_scale": 0.01, "alpha": "average", "beta2": "average"},
    {"kind": "power", "alpha_power": 0.5, "beta2_power": 2.0},
    {"kind": "ddim"},
]


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "pred_v"])
@pytest.mark.parametrize(("update", "parity"), [*((update, "clean") for update in UPDATES), ("pred_noise", "official")])
def test_an_oracle_restores_x0(objective: str, update: str, parity: str) -> None:
    """For every schedule, number of steps, eta, and with or without a degraded image."""
    draws, num_refused = KEPT_DRAWS, 0
    etas = (0.0,) if update in ("eta0", "eta1") else (0.0, 0.7)  # those two fix eta themselves
    for settings, steps, eta, generate in itertools.product(SCHEDULES, (1, 3, 19, 20), etas, (False, True)):
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


@pytest.mark.parametrize("use", ["residual", "noise", "x0"])
def test_an_oracle_restores_x0_from_one_of_its_two_outputs(use: str) -> None:
    objective = "pred_x0_noise" if use == "x0" else "pred_res_noise"
    schedule, draws = make_schedule(kind="ddim", num_timesteps=20), KEPT_DRAWS
    for steps in (1, 4, 20):
        settings: dict[str, Any] = {"objective": objective, "x_in": X_IN, "steps": steps, "use": use}
        x = sample(oracle(objective, schedule, X0), schedule, draws=draws, **settings)
        torch.testing.assert_close(x, X0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in ("pred_v", "pred_noise")])
def test_an_oracle_restores_x0_under_readjusted_schedules(objective: str) -> None:
    """alpha of one schedule, beta2 of another, neither those of training."""
    own = make_schedule(num_timesteps=20)
    others = [make_schedule(num_timesteps=20, **settings) for settings in SCHEDULES]
    draws = KEPT_DRAWS
    for alpha, beta2, steps in itertools.product(others, others, (3, 20)):
        schedule = readjust(own, alpha=alpha, beta2=beta2)
        x = sample(oracle(objective, schedule, X0), schedule, objective=objective, x_in=X_IN, steps=steps, draws=draws)
        torch.testing.assert_close(x, X0, rtol=0, atol=1e-4)


def test_a_kept_estimate_changes_only_what_noise_alone_says() -> None:
    """Noise-only prediction at a readjusted level finds the residual as at the network's own level."""
    own = make_schedule(kind="ddim", num_timesteps=20)
    kept = readjust(own, alpha=make_schedule(kind="power", num_timesteps=20), keeps_estimate=True)
    estimates: list[Prediction] = []

    def net(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
        return [0.3 * x_t]

    def keep(k: int, x: Tensor, prediction: Prediction | None) -> None:
        if prediction is not None:
            estimates.append(prediction)

    settings: dict[str, Any] = {"objective": "pred_noise", "x_in": X_IN, "steps": 2, "on_step": keep}
    results = [
        sample(net, schedule, draws=PatternDraws(), clip_residual=None, **settings)  # type: ignore[arg-type]
        for schedule in (own, kept)
    ]
    # Both start in the same state and estimate the same; then the residual is removed at another speed.
    assert torch.equal(estimates[0].x0, estimates[2].x0) and torch.equal(estimates[0].residual, estimates[2].residual)
    assert (estimates[1].x0 - estimates[3].x0).abs().max() > 1e-3
    assert (results[0] - results[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("one", "other", "etas"),
    [("eta0", "pred_noise", (0.0,)), ("eta1", "pred_noise", (1.0,)), ("x0", "pred_noise", (0.0, 0.4, 1.0))],
)
def test_update_rules_that_should_coincide_coincide(one: str, other: str, etas: tuple[float, ...]) -> None:
    """eta0 is pred_noise at eta 0, eta1 at eta 1, and x0 is pred_noise wherever x0 is not clamped."""
    schedule = make_schedule(num_timesteps=50)

    def imperfect(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
        residual, noise = oracle("pred_res_noise", schedule, X0)(x_t, times, x_in, mask, x_self)
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
        residual, predicted_noise = net(x, (t_rows - 1.0, t_rows - 1.0), X_IN, None, None)
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
        ({"objective": "pred_res_noise", "use": "noise"}, ["sample.use=noise", "timestep 10", "1 - alpha_cumsum is 0"]),
        ({"objective": "pred_res_noise", "use": "x0"}, ["sample.use=x0", "pred_res_noise"]),
        ({"process": "ddpm"}, ["diffusion.process=ddpm", "kind=ddim"]),
        ({"process": "heat"}, ["diffusion.process=heat", "rddm, ddpm"]),
        ({"objective": "pred_v"}, ["diffusion.objective=pred_v", "diffusion.process=rddm"]),
        ({"objective": "auto"}, ["diffusion.objective=auto", "kind=ddim"]),
        ({"path": "upwards"}, ["sample.path=upwards", "simultaneous, residual_first, noise_first, two_pass"]),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_sampling(make_schedule(num_timesteps=10), **{"objective": "pred_res", "steps": 5, **settings})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
