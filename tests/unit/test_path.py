"""Paths through (alpha_cumsum, beta_cumsum): the authors' two passes, independence of the path, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.diffusion.path import PathChoice, check_path, make_path
from rddm_dist.diffusion.prediction import OBJECTIVES
from rddm_dist.diffusion.sampler import check_sampling, sample
from rddm_dist.diffusion.schedule import Schedule, make_schedule, readjust
from rddm_dist.diffusion.start import sampling_timesteps
from tests.support.diffusion import (
    KEPT_DRAWS,
    SCALARS,
    X0,
    X_IN,
    fake_generation,
    fake_restoration,
    golden,
    oracle,
    trajectory,
)

ORDERS = ("simultaneous", "residual_first", "noise_first")
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"sum_scale": 0.01, "alpha": "average"},
    {"kind": "power", "alpha_power": 2.0, "sum_scale": 4.0},
    {"kind": "ddim"},
]


@pytest.mark.parametrize(("rule", "update"), [("use_pred_noise", "pred_noise"), ("use_x_start", "x0")])
def test_two_pass_trajectories_and_times_equal_the_published_ones(rule: str, update: str) -> None:
    told: list[tuple[float, float]] = []

    def net(x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
        told.append((float(times[0][0]), float(times[1][0])))
        return fake_generation(x_t, times, x_in, mask, x_self)

    schedule = make_schedule(kind="ddim", parity="official")
    settings: dict[str, Any] = {"update": update, "generate": True, "time_input": "clocks"}
    states = trajectory(net, schedule, steps=5, path="two_pass", **settings)
    expected = golden(f"traj_path_indep/exp0_two_pass_T1000_S5/{rule}") * 2 - 1
    assert len(states) == len(expected) + 1
    torch.testing.assert_close(states[1:], expected, rtol=0, atol=1e-5)
    published = SCALARS["times_fed"][f"exp0_two_pass_times_fed_to_nets/{rule}"]
    torch.testing.assert_close(torch.tensor(told), torch.tensor(published), rtol=2e-6, atol=1e-3)


def test_named_paths_visit_the_levels_of_the_schedule_in_their_order() -> None:
    schedule = make_schedule(num_timesteps=10, sum_scale=0.25)
    rows = [10, 6, 3, 0]
    a, b = schedule.alpha_cumsum[rows].tolist(), schedule.beta_cumsum[rows].tolist()
    assert make_path(schedule, "simultaneous", steps=3) == tuple(zip(a, b, strict=True))
    assert make_path(schedule, "residual_first", steps=3) == (
        (a[0], b[0]), (a[1], b[0]), (a[2], b[0]), (0, b[0]), (0, b[1]), (0, b[2]), (0, 0),
    )  # fmt: skip
    assert make_path(schedule, "noise_first", steps=3) == (
        (a[0], b[0]), (a[0], b[1]), (a[0], b[2]), (a[0], 0), (a[1], 0), (a[2], 0), (0, 0),
    )  # fmt: skip


@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize("choice", ORDERS)
def test_every_named_path_is_a_path(settings: dict[str, Any], choice: str) -> None:
    for parity, steps in itertools.product(("clean", "official"), (1, 2, 7, 20)):
        schedule = make_schedule(num_timesteps=20, parity=parity, **settings)
        path = make_path(schedule, choice, steps=steps)
        check_path(schedule, path)
        assert len(path) == (steps if choice == "simultaneous" else 2 * steps) + 1
        assert make_path(schedule, [list(vertex) for vertex in path], steps=1) == path


def random_path(schedule: Schedule, seed: int, count: int = 7) -> list[list[float]]:
    """A monotone path with random vertices, in steps that are horizontal, vertical or both."""
    shares = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)).sort(dim=1, descending=True).values
    shares = (shares * 4).round() / 4  # many equal levels: horizontal and vertical steps
    ends = torch.stack([schedule.alpha_cumsum[-1], schedule.beta_cumsum[-1]])
    inner = (shares * ends[:, None]).T.tolist()
    return [ends.tolist(), *inner, [0.0, 0.0]]


@pytest.mark.parametrize("settings", SCHEDULES)
def test_the_result_is_independent_of_the_path_for_constant_predictions(settings: dict[str, Any]) -> None:
    """x0 = start - alpha_cumsum[T] residual - beta_cumsum[T] noise, by every way down."""
    schedule = make_schedule(num_timesteps=20, **settings)
    residual, noise = 0.4 * X0, 0.3 * X_IN

    def constant(*args: Any) -> list[Tensor]:
        return [residual, noise]

    choices: list[PathChoice] = [*ORDERS, *(random_path(schedule, seed) for seed in range(5))]
    results = []
    for choice, steps in itertools.product(choices, (1, 4)):
        if choice != "simultaneous":
            states = trajectory(constant, schedule, steps=steps, path=choice)
            results.append(states[-1])
    expected = states[0] - schedule.alpha_cumsum[-1] * residual - schedule.beta_cumsum[-1] * noise
    for result in results:
        torch.testing.assert_close(result, expected.clamp(-1, 1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_oracle_restores_x0_along_every_path(objective: str) -> None:
    """For every schedule; noise alone is refused where the path passes through 1 - alpha_cumsum = 0."""
    process, draws = "ddpm" if objective == "pred_v" else "rddm", KEPT_DRAWS
    num_refused = 0
    for settings in SCHEDULES if process == "rddm" else [{"kind": "ddim"}]:
        schedule = make_schedule(num_timesteps=20, **settings)
        net = oracle(objective, schedule, X0, process=process, time_input="clocks")
        choices: list[PathChoice] = [*ORDERS, "two_pass", random_path(schedule, 1), random_path(schedule, 2)]
        for choice, generate in itertools.product(choices, (False, True)):
            run: dict[str, Any] = {"objective": objective, "steps": 4, "path": choice, "process": process}
            if objective == "pred_noise" and settings.get("kind") != "ddim":
                num_refused += 1
                with pytest.raises(ConfigError, match="1 - alpha_cumsum is 0"):
                    check_sampling(schedule, **run)
                continue
            if objective == "pred_v" and choice != "simultaneous":
                # Velocity is a rotation of x0 and noise only on the curve of the schedule.
                with pytest.raises(ConfigError, match="pred_v does not fit sample.path=.*simultaneous"):
                    check_sampling(schedule, **run)
                continue
            x = sample(net, schedule, x_in=X_IN, draws=draws, generate=generate, time_input="clocks", **run)
            torch.testing.assert_close(x, X0, rtol=0, atol=1e-4)
    assert (num_refused > 0) == (objective == "pred_noise")


@pytest.mark.parametrize("time_input", ["index", "clocks"])
def test_the_simultaneous_path_is_skipping_without_new_noise(time_input: str) -> None:
    """Followed as vertices it visits the same states and ends in the x0 that the last step would take."""
    schedule = make_schedule(kind="ddim", num_timesteps=50)
    vertices = make_path(schedule, "simultaneous", steps=6)
    along = trajectory(fake_restoration, schedule, steps=1, path=vertices, time_input=time_input)
    skipping = trajectory(fake_restoration, schedule, steps=6, time_input=time_input)
    assert (along[3] - along[0]).abs().max() > 0.05
    torch.testing.assert_close(along, skipping, rtol=0, atol=2e-6)


@pytest.mark.parametrize("time_input", ["index", "clocks"])
def test_each_network_is_told_its_own_level(time_input: str) -> None:
    told: list[tuple[float, float]] = []

    def net(x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
        assert all(time.shape == (2,) and time.dtype == torch.float32 for time in times)
        told.append((float(times[0][0]), float(times[1][0])))
        return [x_t * 0, x_t * 0]

    schedule = make_schedule(kind="ddim", num_timesteps=100)
    trajectory(net, schedule, steps=2, path="residual_first", time_input=time_input)
    a, b = ((schedule.alpha_cumsum * 100).tolist(), (schedule.beta_cumsum * 100).tolist())
    if time_input == "index":
        # After the residual is gone its network stays at the least degraded index there is.
        expected = [(99.0, 99.0), (49.0, 99.0), (0.0, 99.0), (0.0, 49.0)]
    else:
        expected = [(a[100], b[100]), (a[50], b[100]), (0.0, b[100]), (0.0, b[50])]
    assert [value for pair in told for value in pair] == pytest.approx(
        [value for pair in expected for value in pair], abs=1e-4
    )


def test_separate_reverse_schedules_are_the_levels_of_a_readjusted_one() -> None:
    own, alpha, beta2 = (
        make_schedule(num_timesteps=20, **settings)
        for settings in ({}, {"kind": "power", "alpha_power": 2.0}, {"beta2": "average"})
    )
    path = make_path(readjust(own, alpha=alpha, beta2=beta2), "simultaneous", steps=5)
    rows = [*sampling_timesteps(20, 5), 0]
    assert [a for a, _ in path] == alpha.alpha_cumsum[rows].tolist()
    assert [b for _, b in path] == beta2.beta_cumsum[rows].tolist()
    check_path(own, path)  # both end where training ended, so the path is one for it as well


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ([[1, 1]], ["at least 2 vertices", "got 1"]),
        ([[0.5, 1], [0, 0]], ["starts at (0.5, 1)", "ends at (1, 1)"]),
        ([[1, 1], [0.5, 0.5]], ["ends at (0.5, 0.5)", "(0, 0)"]),
        ([[1, 1], [0.5, 0.5], [0.6, 0.2], [0, 0]], ["rises from (0.5, 0.5) to (0.6, 0.2)", "may only fall"]),
        ([[1, 1], [0.5, 0.5], [0.4, 0.7], [0, 0]], ["rises from (0.5, 0.5) to (0.4, 0.7)"]),
        ([[1, 1], [0.5], [0, 0]], ["[0.5]", "pairs"]),
        ([[1, 1], [0.5, float("nan")], [0, 0]], ["nan", "pairs"]),
        ([[1, 1], [0.5, -0.1], [0, 0]], ["rises from (0.5, -0.1)"]),
        (["down"], ["down", "pairs"]),
        ("upwards", ["sample.path=upwards", "residual_first"]),
    ],
)
def test_what_is_no_path_is_refused(path: PathChoice, words: list[str]) -> None:
    schedule = make_schedule(num_timesteps=20)
    for refuse in (
        lambda: make_path(schedule, path, steps=4),
        lambda: check_sampling(schedule, objective="pred_res_noise", steps=4, path=path),
    ):
        with pytest.raises(ConfigError) as error:
            refuse()
        message = str(error.value)
        assert all(word in message for word in [*words, "sample.path"]) and "\n" not in message


def test_the_two_passes_have_no_vertices() -> None:
    with pytest.raises(ConfigError, match="sample.path=two_pass has no vertices"):
        make_path(make_schedule(), "two_pass", steps=4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "residual_first", "eta": 0.5}, ["sample.eta=0.5", "sample.path=residual_first", "sample.eta=0"]),
        ({"path": "noise_first", "update": "x0"}, ["sample.update=x0", "pred_noise, eta0"]),
        ({"path": "two_pass", "update": "eta1"}, ["sample.update=eta1", "pred_noise, x0"]),
        ({"path": "noise_first", "steps": 21}, ["steps=21", "sample.steps"]),
        ({"path": "noise_first", "objective": "pred_noise"}, ["pred_noise", "alpha_cumsum 1", "1 - alpha_cumsum is 0"]),
        ({"path": "two_pass", "objective": "pred_noise"}, ["pred_noise", "timestep 20"]),
    ],
)
def test_settings_that_do_not_fit_a_path_are_refused(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_sampling(make_schedule(num_timesteps=20), **{"objective": "pred_res_noise", "steps": 4, **settings})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
