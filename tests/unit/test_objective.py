"""What network outputs mean: official predictions and losses, and an oracle for every objective."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.objective import OBJECTIVES, OUTPUTS, Prediction, complete_prediction, training_loss
from rddm_dist.diffusion.process import posterior, q_sample
from rddm_dist.diffusion.schedule import Schedule, make_schedule

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(GOLDEN_DIR / "diffusion.npz")
LOSSES = json.loads((GOLDEN_DIR / "diffusion_scalars.json").read_text())["losses"]
WITH_LINEAR_GOLDEN = [objective for objective in OBJECTIVES if objective != "pred_x0"]


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


X0, X_IN, NOISE = golden("inputs/x0"), golden("inputs/x_in"), golden("inputs/eps")
T_300_800 = torch.tensor([301, 801])


def linear_outputs(x_t: Tensor, x_in: Tensor, objective: str) -> list[Tensor]:
    """The fake network of the reference numbers."""
    return [0.5 * x_t - 0.25 * x_in + 0.1, 0.7 * x_t + 0.2 * x_in - 0.05][: OBJECTIVES[objective]]


def predict(schedule: Schedule, objective: str, t: Tensor, *, clip: bool) -> tuple[Tensor, Prediction]:
    x_t = q_sample(schedule, x0=X0, residual=X_IN - X0, noise=NOISE, t=t)
    prediction = complete_prediction(
        linear_outputs(x_t, X_IN, objective),
        schedule=schedule,
        objective=objective,
        x_t=x_t,
        x_in=X_IN,
        t=t,
        clip_residual=(-1.0, 1.0) if clip else None,
        clip_x0=clip,
    )
    return x_t, prediction


def assert_golden(prediction: Prediction, prefix: str) -> None:
    for ours, name in [("residual", "pred_res"), ("noise", "pred_noise"), ("x0", "pred_x_start")]:
        torch.testing.assert_close(getattr(prediction, ours), golden(f"{prefix}/{name}"), rtol=1e-6, atol=1e-5)


@dataclass(frozen=True)
class FixedDraws:
    """Given timesteps and noise in place of drawn ones."""

    t: Tensor
    fixed_noise: Tensor

    def timesteps(self, num_timesteps: int) -> Tensor:
        assert int(self.t.max()) <= num_timesteps
        return self.t

    def noise(self, shape: torch.Size, step: int = 0) -> Tensor:
        assert shape == self.fixed_noise.shape
        return self.fixed_noise


@pytest.mark.parametrize("objective", WITH_LINEAR_GOLDEN)
@pytest.mark.parametrize("clip", [False, True])
def test_predictions_equal_the_published_ones(objective: str, clip: bool) -> None:
    _, prediction = predict(make_schedule(parity="official"), objective, T_300_800, clip=clip)
    assert_golden(prediction, f"predictions/{objective}/clip{int(clip)}")


@pytest.mark.parametrize("objective", WITH_LINEAR_GOLDEN)
def test_ancestral_moments_equal_the_published_ones(objective: str) -> None:
    schedule = make_schedule(parity="official")
    x_t, prediction = predict(schedule, objective, T_300_800, clip=True)
    moments = posterior(schedule, x_t=x_t, residual=prediction.residual, x0=prediction.x0, t=T_300_800)
    for ours, name in zip(moments, ("mean", "var", "logvar"), strict=True):
        torch.testing.assert_close(ours, golden(f"p_mean_variance/{objective}/{name}"), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_res"])
def test_predictions_at_both_ends_equal_the_published_ones(objective: str) -> None:
    _, prediction = predict(make_schedule(parity="official"), objective, torch.tensor([1, 1000]), clip=True)
    assert_golden(prediction, f"predictions_edge_t0_999/{objective}")


def test_x0_prediction_with_the_power_schedule_equals_the_published_one() -> None:
    schedule = make_schedule(kind="power", parity="official")
    x_t = q_sample(schedule, x0=X0, residual=X_IN - X0, noise=NOISE, t=T_300_800)
    prediction = complete_prediction(
        [0.5 * x_t + 0.1],
        schedule=schedule,
        objective="pred_x0",
        x_t=x_t,
        x_in=X_IN,
        t=T_300_800,
        clip_residual=(-1.0, 1.0),
        clip_x0=True,
    )
    assert_golden(prediction, "predictions_exp4_power/pred_x0")


@pytest.mark.parametrize(
    ("mode", "objective", "outputs"),
    [("res_noise", "pred_res_noise", (0, 1)), ("res", "pred_res", (0,)), ("noise", "pred_noise", (1,))],
)
def test_generation_predictions_equal_the_published_ones(mode: str, objective: str, outputs: tuple[int, ...]) -> None:
    schedule, x_in = make_schedule(kind="ddim", parity="official"), torch.zeros_like(X0)
    x_t = q_sample(schedule, x0=X0, residual=-X0, noise=NOISE, t=T_300_800)
    both = [0.5 * x_t + 0.1, 0.7 * x_t - 0.05]
    prediction = complete_prediction(
        [both[i] for i in outputs],
        schedule=schedule,
        objective=objective,
        x_t=x_t,
        x_in=x_in,
        t=T_300_800,
        clip_residual=(-1.0, 1.0),
        clip_x0=True,
    )
    assert_golden(prediction, f"predictions_exp0_gen/{mode}")


@pytest.mark.parametrize("objective", WITH_LINEAR_GOLDEN)
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_losses_equal_the_published_ones(objective: str, loss: str) -> None:
    losses = training_loss(
        lambda x_t, times, x_in, mask: linear_outputs(x_t, x_in, objective),
        make_schedule(parity="official"),
        objective=objective,
        x0=X0,
        x_in=X_IN,
        draws=FixedDraws(T_300_800, NOISE),  # type: ignore[arg-type]
        loss=loss,
    )
    assert losses.shape == (2,)
    assert losses.mean().item() == pytest.approx(LOSSES[f"{objective}/{loss}"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "objective", "x_in", "name"),
    [
        ({"kind": "power"}, "pred_x0", X_IN, "exp4_pred_x0/l2"),
        ({"kind": "ddim"}, "pred_res_noise", torch.zeros_like(X0), "exp0_gen_pred_res_noise/l2"),
    ],
)
def test_losses_per_network_add_up_to_the_published_ones(
    settings: dict[str, Any], objective: str, x_in: Tensor, name: str
) -> None:
    losses = training_loss(
        lambda x_t, times, x_in, mask: [0.5 * x_t + 0.1, 0.7 * x_t - 0.05][: OBJECTIVES[objective]],
        make_schedule(**settings, parity="official"),
        objective=objective,
        x0=X0,
        x_in=x_in,
        draws=FixedDraws(T_300_800, NOISE),  # type: ignore[arg-type]
        loss="l2",
    )
    assert losses.mean().item() == pytest.approx(sum(LOSSES[name]), rel=1e-5)


def oracle_outputs(objective: str, *, x_in: Tensor, x0: Tensor, noise: Tensor) -> list[Tensor]:
    known = {"residual": x_in - x0, "noise": noise, "x0": x0}
    return [torch.stack([known[part] for part in name.split(" + ")]).sum(0) for name in OUTPUTS[objective]]


@pytest.mark.parametrize("kind", ["linear", "power", "ddim"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_true_outputs_give_true_residual_noise_and_x0(objective: str, kind: str) -> None:
    schedule = make_schedule(kind=kind, num_timesteps=20, sum_scale=0.5)
    for t in range(1, 21):
        blind = float(schedule.one_minus_alpha_cumsum[t]) == 0
        if objective == "pred_noise" and blind:
            continue
        t_rows = torch.full((2,), t)
        x_t = q_sample(schedule, x0=X0, residual=X_IN - X0, noise=NOISE, t=t_rows)
        prediction = complete_prediction(
            oracle_outputs(objective, x_in=X_IN, x0=X0, noise=NOISE),
            schedule=schedule,
            objective=objective,
            x_t=x_t,
            x_in=X_IN,
            t=t_rows,
            clip_residual=(-2.0, 2.0),
            clip_x0=True,
        )
        torch.testing.assert_close(prediction.residual, X_IN - X0, rtol=0, atol=1e-4)
        torch.testing.assert_close(prediction.x0, X0, rtol=0, atol=1e-4)
        known = schedule.beta_cumsum[t] > 0 or OBJECTIVES[objective] == 2
        expected = NOISE if known or objective == "pred_noise" else torch.zeros_like(NOISE)
        torch.testing.assert_close(prediction.noise, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_oracle_has_no_loss(objective: str, loss: str) -> None:
    draws = Draws(seed=3, ids=torch.tensor([5, 6]))
    noise = draws.noise(X0.shape)
    losses = training_loss(
        lambda x_t, times, x_in, mask: oracle_outputs(objective, x_in=x_in, x0=X0, noise=noise),
        make_schedule(),
        objective=objective,
        x0=X0,
        x_in=X_IN,
        draws=draws,
        loss=loss,
    )
    assert losses.dtype == torch.float32 and losses.abs().max() < 1e-6


def test_loss_is_per_sample_weighted_and_independent_of_the_batch() -> None:
    def net(x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Tensor | None) -> list[Tensor]:
        assert mask is not None and mask.shape[0] == len(x_t)
        return [x_t * 0.3 + times[0].reshape(-1, 1, 1, 1) / 1000, (x_t - x_in).bfloat16()]

    def loss(rows: list[int], weight: Tensor | None = None) -> Tensor:
        return training_loss(
            net,
            make_schedule(),
            objective="pred_res_noise",
            x0=X0[rows],
            x_in=X_IN[rows],
            draws=Draws(seed=1, ids=torch.tensor([70, 71])[rows]),
            weight=weight,
            mask=torch.ones(len(rows), 1, 4, 4),
        )

    whole = loss([0, 1])
    assert torch.equal(whole, torch.cat([loss([0]), loss([1])])) and whole[0] != whole[1]
    assert torch.equal(loss([0, 1], torch.tensor([0.0, 2.0])), whole * torch.tensor([0.0, 2.0]))


def test_wrong_names_and_numbers_of_outputs_are_refused() -> None:
    def loss(objective: str, num_outputs: int, kind: str = "l1") -> Tensor:
        return training_loss(
            lambda x_t, times, x_in, mask: [x_t] * num_outputs,
            make_schedule(),
            objective=objective,
            x0=X0,
            x_in=X_IN,
            draws=Draws(seed=1, ids=torch.tensor([0, 1])),
            loss=kind,
        )

    with pytest.raises(ConfigError, match="diffusion.objective=pred_all.*pred_res_noise"):
        loss("pred_all", 2)
    with pytest.raises(ConfigError, match="needs 2 network outputs but the network has 1; set model.num_nets=2"):
        loss("pred_res_noise", 1)
    with pytest.raises(ConfigError, match="diffusion.loss=huber.*l1, l2"):
        loss("pred_res", 1, "huber")
