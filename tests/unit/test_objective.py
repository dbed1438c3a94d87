"""What network outputs mean: official predictions and losses, and an oracle for every objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.objective import output_losses, training_loss
from rddm_dist.diffusion.prediction import (
    OBJECTIVES,
    Prediction,
    check_objective,
    complete_prediction,
    pick_outputs,
    used_objective,
)
from rddm_dist.diffusion.process import levels_at, posterior, process_input, q_sample
from rddm_dist.diffusion.schedule import Schedule, gather, make_schedule
from tests.support.diffusion import NOISE, SCALARS, X0, X_IN, FixedDraws, golden, true_outputs

LOSSES = SCALARS["losses_exp2_T1000_s1_t300_800_unless_named"]
# pred_x0 was published with another schedule (below), pred_v is of the DDPM baseline and has no reference numbers.
WITH_LINEAR_GOLDEN = [objective for objective in OBJECTIVES if objective not in ("pred_x0", "pred_v")]
T_300_800 = torch.tensor([301, 801])


def linear_outputs(x_t: Tensor, x_in: Tensor, objective: str) -> list[Tensor]:
    """The fake network of the reference numbers."""
    return [0.5 * x_t - 0.25 * x_in + 0.1, 0.7 * x_t + 0.2 * x_in - 0.05][: OBJECTIVES[objective]]


def predict(schedule: Schedule, objective: str, t: Tensor, *, clip: bool) -> tuple[Tensor, Prediction]:
    x_t = q_sample(schedule, x0=X0, residual=X_IN - X0, noise=NOISE, t=t)
    prediction = complete_prediction(
        linear_outputs(x_t, X_IN, objective),
        objective=objective,
        levels=levels_at(schedule, t),
        x_t=x_t,
        x_in=X_IN,
        clip_residual=(-1.0, 1.0) if clip else None,
        clip_x0=clip,
    )
    return x_t, prediction


def assert_golden(prediction: Prediction, prefix: str) -> None:
    for ours, name in [("residual", "pred_res"), ("noise", "pred_noise"), ("x0", "pred_x_start")]:
        torch.testing.assert_close(getattr(prediction, ours), golden(f"{prefix}/{name}"), rtol=1e-6, atol=1e-5)


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
        objective="pred_x0",
        levels=levels_at(schedule, T_300_800),
        x_t=x_t,
        x_in=X_IN,
        clip_residual=(-1.0, 1.0),
        clip_x0=True,
    )
    assert_golden(prediction, "predictions_exp4_power/pred_x0")


@pytest.mark.parametrize(("mode", "use"), [("res_noise", "all"), ("res", "residual"), ("noise", "noise")])
def test_predictions_from_both_or_one_of_two_outputs_equal_the_published_ones(mode: str, use: str) -> None:
    schedule, x_in = make_schedule(kind="ddim", parity="official"), torch.zeros_like(X0)
    x_t = q_sample(schedule, x0=X0, residual=-X0, noise=NOISE, t=T_300_800)
    prediction = complete_prediction(
        pick_outputs([0.5 * x_t + 0.1, 0.7 * x_t - 0.05], objective="pred_res_noise", use=use),
        objective=used_objective("pred_res_noise", use),
        levels=levels_at(schedule, T_300_800),
        x_t=x_t,
        x_in=x_in,
        clip_residual=(-1.0, 1.0),
        clip_x0=True,
    )
    assert_golden(prediction, f"predictions_exp0_gen/{mode}")


@pytest.mark.parametrize("objective", WITH_LINEAR_GOLDEN)
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_losses_equal_the_published_ones(objective: str, loss: str) -> None:
    losses = training_loss(
        lambda x_t, times, x_in, mask, x_self: linear_outputs(x_t, x_in, objective),
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
def test_losses_per_network_equal_the_published_ones(
    settings: dict[str, Any], objective: str, x_in: Tensor, name: str
) -> None:
    losses = output_losses(
        lambda x_t, times, x_in, mask, x_self: [0.5 * x_t + 0.1, 0.7 * x_t - 0.05][: OBJECTIVES[objective]],
        make_schedule(**settings, parity="official"),
        objective=objective,
        x0=X0,
        x_in=x_in,
        draws=FixedDraws(T_300_800, NOISE),  # type: ignore[arg-type]
        loss="l2",
    )
    assert [each.shape for each in losses] == [(2,)] * OBJECTIVES[objective]
    assert [each.mean().item() for each in losses] == pytest.approx(LOSSES[name], rel=1e-5)


def allowed_settings(objective: str) -> list[tuple[str, dict[str, Any]]]:
    """Process and schedule of an objective: pred_v is of the baseline, which has converted schedules only."""
    kinds = [{"kind": kind, "sum_scale": 0.5} for kind in ("linear", "power", "ddim")]
    baseline = [("ddpm", {"kind": "ddim", "betas": betas}) for betas in ("linear", "squaredcos")]
    return baseline if objective == "pred_v" else [*(("rddm", kind) for kind in kinds), *baseline]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_true_outputs_give_true_residual_noise_and_x0(objective: str) -> None:
    for process, settings in allowed_settings(objective):
        schedule, x_in = make_schedule(num_timesteps=20, **settings), process_input(process, X_IN)
        for t in range(1, 21):
            assert_oracle_is_read(objective, schedule, x_in, torch.full((2,), t))


def assert_oracle_is_read(objective: str, schedule: Schedule, x_in: Tensor, t: Tensor) -> None:
    levels, residual = levels_at(schedule, t), x_in - X0
    x_t = q_sample(schedule, x0=X0, residual=residual, noise=NOISE, t=t)
    alpha, beta = levels.alpha_cumsum, levels.beta_cumsum
    prediction = complete_prediction(
        true_outputs(objective, x_in=x_in, x0=X0, noise=NOISE, alpha_cumsum=alpha, beta_cumsum=beta),
        objective=objective,
        levels=levels,
        x_t=x_t,
        x_in=x_in,
        clip_residual=(-2.0, 2.0),
        clip_x0=True,
    )
    if objective == "pred_noise" and float(levels.one_minus_alpha_cumsum[0]) == 0:
        # Noise alone says nothing about x0 here: the degraded image is the guess.
        assert torch.equal(prediction.x0, x_in)
        return
    # Noise-only prediction divides by 1 - alpha_cumsum, which squaredcos takes down to 1e-4 within 20 timesteps.
    tolerance = 1e-4 if float(levels.one_minus_alpha_cumsum[0]) > 1e-2 else 2e-3
    torch.testing.assert_close(prediction.residual, residual, rtol=0, atol=tolerance)
    torch.testing.assert_close(prediction.x0, X0, rtol=0, atol=tolerance)
    is_told = bool(beta[0] > 0) or OBJECTIVES[objective] == 2 or objective == "pred_noise"
    expected = NOISE if is_told else torch.zeros_like(NOISE)
    torch.testing.assert_close(prediction.noise, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_oracle_has_no_loss(objective: str, loss: str) -> None:
    draws = Draws(seed=3, ids=torch.tensor([5, 6]))
    noise = draws.noise(X0.shape)
    for process, settings in allowed_settings(objective):
        schedule = make_schedule(**settings)
        t = draws.timesteps(1000)
        levels = levels_at(schedule, t)
        shown: list[Tensor] = []

        def net(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
            shown.append(x_in)  # noqa: B023
            return true_outputs(
                objective,
                x_in=process_input(process, x_in),  # noqa: B023
                x0=X0,
                noise=noise,
                alpha_cumsum=levels.alpha_cumsum,  # noqa: B023
                beta_cumsum=levels.beta_cumsum,  # noqa: B023
            )

        losses = training_loss(
            net, schedule, objective=objective, x0=X0, x_in=X_IN, draws=draws, loss=loss, process=process
        )
        assert losses.dtype == torch.float32 and losses.abs().max() < 1e-6
        # The network sees the degraded image also where the process knows none.
        assert len(shown) == 1 and torch.equal(shown[0], X_IN)


def test_the_training_loss_is_the_sum_of_the_losses_of_the_outputs() -> None:
    """And each loss moves its own output only: one optimizer per network can use them apart."""
    scales = [torch.tensor(0.3, requires_grad=True), torch.tensor(0.2, requires_grad=True)]
    settings: dict[str, Any] = {
        "objective": "pred_res_noise",
        "x0": X0,
        "x_in": X_IN,
        "draws": Draws(seed=1, ids=torch.tensor([70, 71])),
    }

    def net(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
        return [x_t * scales[0], x_t * scales[1]]

    losses = output_losses(net, make_schedule(), **settings)
    assert torch.equal(losses[0] + losses[1], training_loss(net, make_schedule(), **settings))
    gradients = torch.autograd.grad(losses[1].sum(), scales, allow_unused=True)
    assert gradients[0] is None and gradients[1] is not None and gradients[1] != 0


def test_velocity_is_the_rotation_of_x0_and_noise() -> None:
    """v at x0 = 0 is sqrt(alpha_bar) noise, at noise = 0 it is -sqrt(1 - alpha_bar) x0."""
    schedule, t = make_schedule(kind="ddim"), torch.tensor([100, 600])

    def loss(x0: Tensor, noise: Tensor, output: Tensor) -> float:
        return (
            training_loss(
                lambda x_t, times, x_in, mask, x_self: [output],
                schedule,
                objective="pred_v",
                x0=x0,
                x_in=X_IN,
                draws=FixedDraws(t, noise),  # type: ignore[arg-type]
                process="ddpm",
            )
            .max()
            .item()
        )

    zero = torch.zeros_like(X0)
    assert loss(zero, NOISE, gather(schedule.one_minus_alpha_cumsum, t) * NOISE) < 1e-6
    assert loss(X0, zero, -gather(schedule.beta_cumsum, t) * X0) < 1e-6
    assert loss(X0, NOISE, zero) > 0.1


def test_loss_is_per_sample_weighted_and_independent_of_the_batch() -> None:
    def net(
        x_t: Tensor, times: tuple[Tensor, Tensor], x_in: Tensor, mask: Tensor | None, x_self: Tensor | None
    ) -> list[Tensor]:
        assert x_self is None
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
            lambda x_t, times, x_in, mask, x_self: [x_t] * num_outputs,
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
    with pytest.raises(ConfigError, match="diffusion.objective=pred_v does not fit diffusion.process=rddm"):
        loss("pred_v", 1)
    with pytest.raises(ConfigError, match="diffusion.objective=auto has no outcome yet"):
        check_objective("auto")


@pytest.mark.parametrize(
    ("objective", "use", "words"),
    [
        ("pred_res_noise", "x0", ["sample.use=x0", "pred_res_noise", "all, residual, noise"]),
        ("pred_x0_noise", "residual", ["sample.use=residual", "all, x0, noise"]),
        ("pred_res_add_noise", "noise", ["sample.use=noise", "all, residual"]),
        ("pred_res", "first", ["sample.use=first", "all, residual, noise, x0"]),
    ],
)
def test_outputs_a_network_does_not_have_are_refused(objective: str, use: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        used_objective(objective, use)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(("objective", "use"), [("pred_x0_noise", "x0"), ("pred_x0_noise", "noise")])
def test_one_output_of_two_is_read_as_if_the_network_had_only_that(objective: str, use: str) -> None:
    outputs = [0.3 * X0, 0.4 * NOISE]
    picked = pick_outputs(outputs, objective=objective, use=use)
    assert used_objective(objective, use) == f"pred_{use}"
    assert len(picked) == 1 and torch.equal(picked[0], outputs[("x0", "noise").index(use)])
