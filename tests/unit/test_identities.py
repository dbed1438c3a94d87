"""What holds for every configuration: drawn schedules, objectives, samplers, paths and shapes against mathematics."""

from __future__ import annotations

import dataclasses
import itertools
import random
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws, normal_image
from rddm_dist.config import Config
from rddm_dist.diffusion.ddim import ddpm_coefficients, rddm_coefficients, sample_converted
from rddm_dist.diffusion.path import check_path, follow_path, make_path
from rddm_dist.diffusion.prediction import OBJECTIVES, OUTPUTS, USES, Estimator, used_objective
from rddm_dist.diffusion.process import posterior, q_sample
from rddm_dist.diffusion.sampler import sample
from rddm_dist.diffusion.schedule import (
    DDPM_BETAS,
    KINDS,
    SHAPES,
    Schedule,
    make_schedule,
    readjust,
    schedule_from_alpha_bar,
)
from rddm_dist.diffusion.start import sampling_timesteps, start_state
from rddm_dist.diffusion.update import UPDATES
from rddm_dist.factory import make_sampling_schedule
from rddm_dist.factory import make_schedule as training_schedule
from tests.support.diffusion import Fake, oracle
from tests.unit.test_path import ORDERS, random_path

TABLES = [field.name for field in dataclasses.fields(Schedule) if field.name not in ("sum_scale", "parity")]
NUM_CASES, NUM_GROUPS = 480, 8


@dataclass(frozen=True)
class Case:
    """A drawn configuration with images to match.   x0, x_in: (B, C, H, W) float32 in [-1, 1]"""

    config: Config
    x0: Tensor
    x_in: Tensor
    draws: Draws

    @property
    def schedule(self) -> Schedule:
        return make_sampling_schedule(self.config)

    @property
    def is_blind(self) -> bool:
        """Noise alone is used, and sampling starts where it says nothing: all families but ddim end in alpha 1."""
        diffusion, sampling = self.config.diffusion, self.config.sample
        kinds = (sampling.schedule.alpha_kind, diffusion.schedule.alpha_kind, diffusion.schedule.kind)
        kind = next(kind for kind in kinds if kind != "same")
        return used_objective(diffusion.objective, sampling.use) == "pred_noise" and kind != "ddim"

    def sample(self, net: Fake, **changes: Any) -> Tensor:
        diffusion, sampling = self.config.diffusion, self.config.sample
        settings: dict[str, Any] = {
            "objective": diffusion.objective,
            "steps": sampling.steps,
            "eta": sampling.eta,
            "update": sampling.update,
            "path": sampling.path,
            "use": sampling.use,
            "clip_residual": diffusion.residual_clip,
            "time_input": diffusion.time_input,
            "generate": diffusion.generate,
            "process": diffusion.process,
            "self_condition": self.config.model.self_condition,
        }
        return sample(net, self.schedule, x_in=self.x_in, draws=self.draws, **{**settings, **changes})


def drawn_part(rng: random.Random, name: str, kind: str) -> dict[str, Any]:
    """Shape and exponent of alpha or beta2 that are allowed in a family."""
    if kind not in SHAPES:
        return {}
    power = rng.choice([0.0, 0.3, 1.0, 2.5]) if kind == "power" else 1.0
    return {name: rng.choice(SHAPES[kind]), f"{name}_power": power}


def drawn_schedule(rng: random.Random) -> dict[str, Any]:
    """Of diffusion.schedule."""
    kind, alpha_kind, beta2_kind = (rng.choice(KINDS) for _ in range(3))
    mixed = rng.random() < 0.5
    parts = {"alpha": alpha_kind, "beta2": beta2_kind} if mixed else {"alpha": kind, "beta2": kind}
    values = {"kind": kind, "betas": rng.choice(DDPM_BETAS)}
    for name, family in parts.items():
        values |= drawn_part(rng, name, family)
    return values | ({"alpha_kind": alpha_kind, "beta2_kind": beta2_kind} if mixed else {})


def drawn_readjustment(rng: random.Random) -> dict[str, Any]:
    """Of sample.schedule."""
    if rng.random() < 0.4:
        return {}
    values: dict[str, Any] = {}
    for name in ("alpha", "beta2"):
        values[f"{name}_kind"] = rng.choice(["same", *KINDS])
        values |= drawn_part(rng, name, values[f"{name}_kind"])
    if "ddim" in values.values():
        values["betas"] = rng.choice(DDPM_BETAS)
    return values


def draw_case(seed: int) -> Case:
    """A configuration, each choice by itself; what cannot go together is put right, but for noise alone."""
    rng = random.Random(seed)
    objective = rng.choice([*OBJECTIVES])
    process = "ddpm" if objective == "pred_v" or rng.random() < 0.15 else "rddm"
    uses = ["all", *(name for name in OUTPUTS[objective] if name in USES)] if OBJECTIVES[objective] == 2 else ["all"]
    use, num_timesteps = rng.choice(uses), rng.choice([2, 3, 12, 30])
    path = "simultaneous" if objective == "pred_v" else rng.choice(["simultaneous", *ORDERS, "two_pass", "vertices"])
    is_plain = path == "simultaneous"
    # The authors' 1e-6 in place of 1 - alpha_cumsum[T] is wrong for noise alone by design.
    tells_by_noise = "pred_noise" in (objective, USES[use])
    parity = "clean" if process == "ddpm" or tells_by_noise else rng.choice(["clean", "official"])
    updates = UPDATES if is_plain else ("pred_noise", "x0") if path == "two_pass" else ("pred_noise", "eta0")
    generate = rng.random() < 0.3
    values: dict[str, Any] = {
        "diffusion": {
            "objective": objective,
            "process": process,
            "generate": generate,
            "num_timesteps": num_timesteps,
            "schedule": {"kind": "ddim", "betas": rng.choice(DDPM_BETAS)} if process == "ddpm" else drawn_schedule(rng),
            "sum_scale": 1.0 if process == "ddpm" else rng.choice([0.01, 0.3, 1.0, 4.0]),
            "parity": parity,
            # Along a path the two networks stand at different places, which only the clocks tell exactly.
            "time_input": rng.choice(["index", "clocks"]) if is_plain or path == "two_pass" else "clocks",
        },
        "model": {
            "num_nets": OBJECTIVES[objective],
            "condition": "none" if generate else "input",
            "self_condition": rng.random() < 0.3,
        },
        "sample": {
            "steps": rng.choice([1, 2, rng.randint(1, num_timesteps), num_timesteps]),
            "update": rng.choice(updates),
            "eta": rng.choice([0.0, 0.35, 1.0]) if is_plain else 0.0,
            "use": use,
            "path": "simultaneous" if path == "vertices" else path,
            "schedule": {} if process == "ddpm" else drawn_readjustment(rng),
        },
    }
    config = Config.model_validate(values)
    if path == "vertices":
        values["sample"]["path"] = random_path(make_sampling_schedule(config), seed, count=rng.randint(1, 6))
        config = Config.model_validate(values)
    shape = (rng.randint(1, 3), rng.choice([1, 3, 4]), rng.randint(1, 9), rng.randint(1, 9))
    generator = torch.Generator().manual_seed(seed)
    x0, x_in = (torch.rand(shape, generator=generator) * 2 - 1 for _ in range(2))
    ids = torch.tensor([rng.randrange(2**40) for _ in range(shape[0])])
    return Case(config, x0, x_in, Draws(seed=seed, ids=ids))


@cache
def all_cases() -> list[Case]:
    return [draw_case(seed) for seed in range(NUM_CASES)]


def tolerance_of(case: Case) -> float:
    """Noise alone divides by 1 - alpha_cumsum, the least of which is that of the start."""
    if used_objective(case.config.diffusion.objective, case.config.sample.use) != "pred_noise":
        return 1e-4
    return 1e-4 + 2e-5 / float(case.schedule.one_minus_alpha_cumsum[-1])


def expected_states(case: Case, states: list[Tensor]) -> list[Tensor]:
    """Where each state but the last belongs, from the one before it and the noise drawn for it.

    x_u = x0 + alpha_u residual + sqrt(beta2_u - variance) noise_t + sqrt(variance) z, with the noise of x_t.
    """
    diffusion, sampling, schedule = case.config.diffusion, case.config.sample, case.schedule
    is_blank = diffusion.generate or diffusion.process == "ddpm"
    residual = -case.x0 if is_blank else case.x_in - case.x0
    if sampling.path == "simultaneous":
        rows = [*sampling_timesteps(schedule.num_timesteps, sampling.steps, diffusion.parity), 0]
        levels = [(float(schedule.alpha_cumsum[t]), float(schedule.beta2_cumsum[t])) for t in rows]
    else:
        levels = [(alpha, beta**2) for alpha, beta in make_path(schedule, sampling.path, steps=sampling.steps)]
    is_ancestral = sampling.steps == schedule.num_timesteps and sampling.path == "simultaneous"
    eta = 1.0 if is_ancestral else {"eta0": 0.0, "eta1": 1.0}.get(sampling.update, sampling.eta)
    expected = []
    for k, ((alpha_t, beta2_t), (alpha_u, beta2_u)) in enumerate(itertools.pairwise(levels[:-1])):
        ratio = beta2_u / beta2_t if beta2_t > 0 else 0.0
        variance = eta * (beta2_t - beta2_u) * ratio
        if diffusion.process == "ddpm":
            variance = eta**2 * ratio * (1 - ((1 - alpha_t) / (1 - alpha_u)) ** 2)
        rest = states[k] - case.x0 - alpha_t * residual
        noise = rest / beta2_t**0.5 if beta2_t > 0 else torch.zeros_like(rest)
        fresh = case.draws.noise(rest.shape, step=k + 1) if variance > 0 else torch.zeros_like(rest)
        kept = max(beta2_u - variance, 0.0) ** 0.5
        expected.append(case.x0 + alpha_u * residual + kept * noise + variance**0.5 * fresh)
    return expected


@pytest.mark.parametrize("group", range(NUM_GROUPS))
def test_an_oracle_restores_x0_whatever_is_configured(group: int) -> None:
    """Every schedule, also readjusted ones, objective, process, sampler, path, shape; noise alone is refused at 0.

    An oracle makes up for wrong steps, so where the states lie is compared as well.
    """
    for case in all_cases()[group::NUM_GROUPS]:
        diffusion, states = case.config.diffusion, list[Tensor]()
        settings: dict[str, Any] = {"process": diffusion.process, "time_input": diffusion.time_input}
        net = oracle(diffusion.objective, case.schedule, case.x0, **settings)
        if case.is_blind:
            with pytest.raises(ConfigError, match="1 - alpha_cumsum is 0"):
                case.sample(net)
            continue
        x = case.sample(net, on_step=lambda k, x, prediction, to=states: to.append(x))
        pairs = [(x, case.x0)]
        if case.config.sample.path != "two_pass":  # whose first pass takes x0 with the noise of another state
            pairs += zip(states[1:-1], expected_states(case, states), strict=True)
        settings = {"rtol": 2e-5, "atol": tolerance_of(case), "msg": partial("{}\n{}".format, case.config)}
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, **settings)


def test_the_drawn_configurations_hold_every_choice() -> None:
    """Among those that are sampled, not refused."""
    sampled = [case.config for case in all_cases() if not case.is_blind]
    assert 20 < NUM_CASES - len(sampled) < NUM_CASES / 2

    def values(pick: Any) -> set[Any]:
        return {pick(config) for config in sampled}

    assert values(lambda c: (c.diffusion.objective, c.diffusion.process)) >= {
        *((objective, "rddm") for objective in OBJECTIVES if objective != "pred_v"),
        *((objective, "ddpm") for objective in OBJECTIVES),
    }
    assert values(lambda c: c.sample.use) == set(USES)
    paths = {(order, update) for order in ("residual_first", "noise_first") for update in ("pred_noise", "eta0")}
    paths |= {("two_pass", "pred_noise"), ("two_pass", "x0"), *(("simultaneous", update) for update in UPDATES)}
    assert values(lambda c: (c.sample.path if isinstance(c.sample.path, str) else "given", c.sample.update)) == {
        *paths, ("given", "pred_noise"), ("given", "eta0"),
    }  # fmt: skip
    assert values(lambda c: (c.sample.steps == c.diffusion.num_timesteps, c.sample.eta > 0)) == {
        *itertools.product((False, True), repeat=2)
    }
    parts = values(lambda c: (c.sample.schedule.alpha_kind, c.sample.schedule.beta2_kind))
    assert parts == {*itertools.product(("same", *KINDS), repeat=2)}
    assert values(lambda c: (c.diffusion.parity, c.diffusion.generate, c.model.self_condition)) == {
        *itertools.product(("clean", "official"), (False, True), (False, True))
    }


def test_sampling_by_a_config_has_the_schedule_that_readjust_makes_of_its_parts() -> None:
    """Bit for bit, and the schedule of training where sample.schedule says nothing."""
    num_readjusted = 0
    for case in all_cases():
        diffusion, wanted = case.config.diffusion, case.config.sample.schedule
        common: dict[str, Any] = {
            "num_timesteps": diffusion.num_timesteps,
            "sum_scale": diffusion.sum_scale,
            "parity": diffusion.parity,
            "betas": wanted.betas,
        }
        own = training_schedule(diffusion)
        alpha = beta2 = None
        if wanted.alpha_kind != "same":
            of_alpha: dict[str, Any] = {
                "kind": wanted.alpha_kind,
                "alpha": wanted.alpha,
                "alpha_power": wanted.alpha_power,
            }
            alpha = make_schedule(**common, **of_alpha)
        if wanted.beta2_kind != "same":
            of_beta2: dict[str, Any] = {
                "kind": wanted.beta2_kind,
                "beta2": wanted.beta2,
                "beta2_power": wanted.beta2_power,
            }
            beta2 = make_schedule(**common, **of_beta2)
        expected = readjust(own, alpha=alpha, beta2=beta2) if alpha or beta2 else own
        num_readjusted += expected is not own
        ours = case.schedule
        assert [name for name in TABLES if not torch.equal(getattr(ours, name), getattr(expected, name))] == []
        assert (ours.sum_scale, ours.parity) == (expected.sum_scale, expected.parity)
    assert num_readjusted > 100


def test_three_term_and_two_term_posterior_agree() -> None:
    """coef1 x_t + coef2 residual + coef3 x0 = x_t - alpha residual - beta2 / beta_cumsum noise, where x_t has noise."""
    for case in all_cases()[::2]:
        schedule, is_official = case.schedule, case.config.diffusion.parity == "official"
        if is_official and schedule.sum_scale > 1:
            continue  # the authors clip the sums to 1, not the increments
        residual, noise = case.x_in - case.x0, case.draws.noise(case.x0.shape)
        # Official increments at t = 1 are 0 in kind ddim, see `make_schedule`.
        for t in range(2 if is_official else 1, schedule.num_timesteps + 1, 3):
            if schedule.beta_cumsum[t] == 0:
                continue
            rows = torch.full((len(case.x0),), t)
            x_t = q_sample(schedule, x0=case.x0, residual=residual, noise=noise, t=rows)
            three = posterior(schedule, x_t=x_t, residual=residual, x0=case.x0, t=rows)[0]
            two = x_t - schedule.alpha[t] * residual - schedule.beta2[t] / schedule.beta_cumsum[t] * noise
            torch.testing.assert_close(three, two, rtol=2e-6, atol=1e-5)


def imperfect(case: Case) -> Fake:
    """A network that is wrong, but not so much that x0 leaves [-1, 1] if the true one lies in [-0.6, 0.6]."""
    diffusion = case.config.diffusion
    true = oracle("pred_res_noise", case.schedule, 0.6 * case.x0, time_input=diffusion.time_input)

    def net(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
        residual, noise = true(x_t, times, x_in, mask, x_self)
        return [0.85 * residual, noise]

    return net


def skipping_cases() -> list[Case]:
    """Half of those that leave timesteps out."""
    return [
        case
        for case in all_cases()[::2]
        if case.config.diffusion.process == "rddm"
        and 1 < case.config.sample.steps < case.config.diffusion.num_timesteps
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"update": "eta0"}, {"update": "pred_noise", "eta": 0.0}),
        ({"update": "eta1"}, {"update": "pred_noise", "eta": 1.0}),
        ({"update": "x0", "eta": 0.0}, {"update": "pred_noise", "eta": 0.0}),
        ({"update": "x0", "eta": 0.6}, {"update": "pred_noise", "eta": 0.6}),
        ({"update": "eta0", "path": "vertices"}, {"update": "eta0"}),
    ],
)
def test_update_rules_that_should_coincide_coincide(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The first two fix eta; the x0 rule is the other wherever x0 is not clamped; a path is skipping at eta 0."""
    cases, num_moved = skipping_cases(), 0
    for case in cases:
        vertices = make_path(case.schedule, "simultaneous", steps=case.config.sample.steps)
        runs: list[list[Tensor]] = []
        for settings in (one, other):
            path = vertices if settings.get("path") == "vertices" else "simultaneous"
            changes: dict[str, Any] = {"objective": "pred_res_noise", "use": "all", "eta": 0.0, **settings}
            states: list[Tensor] = []
            case.sample(
                imperfect(case), **{**changes, "path": path}, on_step=lambda k, x, prediction, to=states: to.append(x)
            )
            runs.append(states)
        for ours, theirs in zip(*runs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=5e-5)
        num_moved += bool((runs[0][1] - runs[0][0]).abs().max() > 0.05)
    assert len(cases) > 50 and num_moved > len(cases) / 2


def constant(residual: Tensor, noise: Tensor) -> Fake:
    return lambda x_t, times, x_in, mask, x_self: [residual, noise]


def test_the_result_is_the_same_by_every_path_for_constant_predictions() -> None:
    """x0 = start - alpha_cumsum[T] residual - beta_cumsum[T] noise."""
    settings: dict[str, Any] = {"objective": "pred_res_noise", "process": "rddm", "use": "all", "eta": 0.0}
    for case in all_cases()[::8]:
        schedule, residual, noise = case.schedule, 0.4 * case.x0, 0.3 * case.x_in
        start = start_state(schedule, x_in=case.x_in, noise=case.draws.noise(case.x_in.shape))
        expected = start - schedule.alpha_cumsum[-1] * residual - schedule.beta_cumsum[-1] * noise
        vertices = make_path(schedule, "simultaneous", steps=case.config.sample.steps)
        for path in (vertices, "residual_first", "noise_first", random_path(schedule, seed=3)):
            changes = {**settings, "path": path, "update": "eta0", "generate": False}
            x = case.sample(constant(residual, noise), **changes)
            torch.testing.assert_close(x, expected.clamp(-1, 1), rtol=0, atol=5e-6)


@pytest.mark.parametrize("seed", range(12))
def test_independence_of_the_path_is_exact_where_the_arithmetic_is(seed: int) -> None:
    """Levels and predictions in few binary digits: not even the last bit depends on the way."""
    generator = torch.Generator().manual_seed(seed)

    def digits(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator) / 32

    shape = (2, 3, 1 + seed % 5, 1 + seed % 4)
    residual, noise, start = digits(*shape), digits(*shape), digits(*shape)
    schedule = make_schedule(num_timesteps=16, alpha="average", beta2="average")
    expected = start - residual - noise
    assert expected.abs().max() <= 1
    estimate = Estimator(constant(residual, noise), "pred_res_noise", start, clip_residual=(-1.0, 1.0))
    for count in (1, 4, 30):
        inner = (torch.rand(2, count, generator=generator).sort(descending=True).values * 64).round() / 64
        path = ((1.0, 1.0), *((a, b) for a, b in inner.T.tolist()), (0.0, 0.0))
        check_path(schedule, path)
        assert torch.equal(follow_path(estimate, schedule, path, start=start), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parity", ["clean", "official"])
def test_a_kept_estimate_is_that_of_training_and_all_else_of_the_other_schedule(kind: str, parity: str) -> None:
    for betas, alpha in itertools.product(DDPM_BETAS, SHAPES.get(kind, ("decreased",))):
        wanted = {"alpha_kind": kind, "alpha": alpha, "betas": betas if kind == "ddim" else "linear"}
        config = Config.model_validate(
            {
                "diffusion": {"schedule": {"kind": "ddim", "betas": betas}, "num_timesteps": 20, "parity": parity},
                "sample": {"schedule": {**wanted, "keeps_estimate": True}},
            }
        )
        own = training_schedule(config.diffusion)
        other = make_schedule(kind=kind, alpha=alpha, betas=wanted["betas"], num_timesteps=20, parity=parity)
        ours, expected = make_sampling_schedule(config), readjust(own, alpha=other, keeps_estimate=True)
        assert [name for name in TABLES if not torch.equal(getattr(ours, name), getattr(expected, name))] == []
        assert torch.equal(ours.estimate_alpha_cumsum, own.alpha_cumsum)
        assert torch.equal(ours.alpha_cumsum, other.alpha_cumsum)


@pytest.mark.parametrize("seed", range(20))
def test_any_ddpm_is_an_rddm_and_back(seed: int) -> None:
    """alpha_bar survives the way there and back, and both samplers go the same way where nothing is clamped."""
    rng = random.Random(seed)
    num_timesteps = rng.randint(1, 60)
    betas = torch.rand(num_timesteps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    alpha_bar = torch.cumprod(1 - 0.15 * betas, 0)
    coefficients = rddm_coefficients(alpha_bar)
    torch.testing.assert_close(ddpm_coefficients(*coefficients), alpha_bar, rtol=1e-10, atol=0)
    again = rddm_coefficients(ddpm_coefficients(*coefficients))
    torch.testing.assert_close(again, coefficients, rtol=0, atol=1e-14)
    schedule = schedule_from_alpha_bar(alpha_bar)
    back = ddpm_coefficients(schedule.alpha_cumsum, schedule.beta_cumsum)
    torch.testing.assert_close(back[1:], alpha_bar, rtol=0, atol=2e-7)
    shape = (rng.randint(1, 3), rng.choice([1, 3]), rng.randint(1, 7), rng.randint(1, 7))
    runs = [
        sample_converted(
            lambda x_t, times, *rest: [0.9 * x_t + 0.02 * times[0].reshape(-1, 1, 1, 1) / num_timesteps],
            schedule,
            shape=shape,
            steps=1 + seed % num_timesteps,
            draws=Draws(seed=seed, ids=torch.arange(shape[0])),
            eta=(0.0, 0.5, 1.0)[seed % 3],
            clip_range=None,
            method=method,
        )
        for method in ("ddim", "rddm")
    ]
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_states_of_a_window_are_the_window_of_those_of_the_image(seed: int) -> None:
    rng = random.Random(seed)
    channels, height, width, step = rng.choice([1, 3, 4, 6]), rng.randint(1, 40), rng.randint(1, 40), rng.randint(0, 9)
    top, left = rng.randrange(height), rng.randrange(width)
    rows, columns = slice(top, top + rng.randint(1, height - top)), slice(left, left + rng.randint(1, width - left))
    ids = torch.tensor([rng.randrange(2**62) for _ in range(rng.randint(1, 4))])
    draws = Draws(seed=seed, ids=ids)
    whole = draws.noise((len(ids), channels, height, width), step=step)
    size: dict[str, Any] = {"channels": channels, "height": rows.stop - top, "width": columns.stop - left}
    window = normal_image(seed, "noise", ids, **size, step=step, top=top, left=left)
    assert torch.equal(window, whole[..., rows, columns])
    schedule, x_in = make_schedule(sum_scale=0.3), torch.rand(whole.shape) * 2 - 1
    part = start_state(schedule, x_in=x_in[..., rows, columns], noise=window)
    assert torch.equal(part, start_state(schedule, x_in=x_in, noise=whole)[..., rows, columns])
