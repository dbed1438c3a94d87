"""Automatic objective selection: published loss terms and gradients, and what the search means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.rng import Draws
from rddm_dist.diffusion.objective import training_loss
from rddm_dist.diffusion.sampler import check_sampling
from rddm_dist.diffusion.schedule import make_schedule
from rddm_dist.diffusion.selection import (
    check_selection,
    leading_objective,
    selected_objective,
    selection_loss,
)
from tests.support.diffusion import NOISE, SCALARS, X0, X_IN, FixedDraws

PUBLISHED = SCALARS["aosa_exp3"]
GRADIENT = "d(total)/d(alpha_res) with accum=2"
SEARCHING = ("0.5", "0.505", "0.495")
OFFICIAL = make_schedule(kind="ddim", parity="official")
DRAWS: Any = FixedDraws(torch.tensor([301, 801]), NOISE)


def fake(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
    """The one-output network of the reference numbers."""
    return [0.5 * x_t - 0.25 * x_in + 0.1]


@pytest.mark.parametrize("weight", SEARCHING)
def test_terms_and_gradient_of_the_search_equal_the_published_ones(weight: str) -> None:
    expected = PUBLISHED[weight]
    learnable = torch.tensor([float(weight)], requires_grad=True)
    losses = selection_loss(fake, OFFICIAL, weight=learnable, x0=X0, x_in=X_IN, draws=DRAWS)
    assert losses.residual.mean().item() == pytest.approx(expected["L_res"], rel=1e-5)
    assert losses.noise.mean().item() == pytest.approx(expected["L_noise"], rel=1e-5)
    (gradient,) = torch.autograd.grad(losses.total.mean() / 2, learnable)
    assert gradient.item() == pytest.approx(expected[GRADIENT], rel=1e-4)
    assert expected["printed"][1] == "res+noise" and expected["latched"] is None
    assert selected_objective(learnable.item()) is None


@pytest.mark.parametrize("weight", [name for name in PUBLISHED if name not in SEARCHING])
def test_decided_losses_equal_the_published_ones(weight: str) -> None:
    """The term of the objective that lost is 0 because it is not computed; the learnable weight gets no gradient."""
    expected = PUBLISHED[weight]
    objective = selected_objective(float(weight))
    assert objective == {1: "pred_res", 0: "pred_noise"}[expected["latched"]]
    assert objective.removeprefix("pred_") == expected["printed"][1] and expected[GRADIENT] is None
    loss = training_loss(fake, OFFICIAL, objective=objective, x0=X0, x_in=X_IN, draws=DRAWS).mean().item()
    kept, dropped = ("L_res", "L_noise") if objective == "pred_res" else ("L_noise", "L_res")
    assert loss == pytest.approx(expected[kept], rel=1e-5) and expected[dropped] == 0


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize(("weight", "objective"), [(1.0, "pred_res"), (0.0, "pred_noise")])
def test_at_the_ends_the_search_is_the_objective_it_leads_to(weight: float, objective: str, loss: str) -> None:
    settings: dict[str, Any] = {"x0": X0, "x_in": X_IN, "draws": Draws(3, torch.tensor([5, 6])), "loss": loss}
    schedule = make_schedule(kind="ddim")
    losses = selection_loss(fake, schedule, weight=torch.tensor(weight), **settings)
    torch.testing.assert_close(losses.total, training_loss(fake, schedule, objective=objective, **settings))


def test_an_oracle_of_one_quantity_has_no_loss_where_the_other_is_read_from_it() -> None:
    """The residual read out of the true noise is the true residual, the noise out of the true residual likewise."""
    schedule = make_schedule(kind="ddim")
    for weight, truth in ((0.0, NOISE), (1.0, X_IN - X0)):
        losses = selection_loss(
            lambda *_, truth=truth: [truth],
            schedule,
            weight=torch.tensor(weight),
            x0=X0,
            x_in=X_IN,
            draws=DRAWS,
        )
        assert max(losses.residual.max().item(), losses.noise.max().item()) < 1e-4


def test_the_search_is_weighted_per_sample_and_trains_the_network() -> None:
    scale = torch.tensor(0.5, requires_grad=True)

    def losses(sample_weight: Tensor | None) -> Any:
        return selection_loss(
            lambda x_t, times, x_in, mask, x_self: [x_t * scale],
            OFFICIAL,
            weight=torch.tensor(0.5),
            x0=X0,
            x_in=X_IN,
            draws=DRAWS,
            sample_weight=sample_weight,
        )

    whole, weighted = losses(None), losses(torch.tensor([0.0, 2.0]))
    assert whole.total.shape == (2,)
    for name in ("residual", "noise", "total"):
        torch.testing.assert_close(getattr(weighted, name), getattr(whole, name) * torch.tensor([0.0, 2.0]))
    assert torch.autograd.grad(whole.total.sum(), scale)[0] != 0


@pytest.mark.parametrize(("weight", "leading"), [(0.4, "pred_noise"), (0.5, "pred_noise"), (0.6, "pred_res")])
def test_a_self_conditioned_search_shows_the_estimate_of_the_leading_objective(weight: float, leading: str) -> None:
    """Half of the samples see x0 as it is read from the output, clamped; the others see nothing."""
    shown: list[Tensor | None] = []

    def net(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Tensor | None) -> list[Tensor]:
        shown.append(x_self)
        return [NOISE if leading == "pred_noise" else x_in - X0]

    selection_loss(
        net,
        make_schedule(kind="ddim"),
        weight=torch.tensor(weight),
        x0=X0,
        x_in=X_IN,
        draws=DRAWS,
        self_condition=True,
    )
    assert len(shown) == 2 and shown[0] is None and shown[1] is not None
    torch.testing.assert_close(shown[1][0], X0[0], rtol=0, atol=1e-5)
    assert torch.equal(shown[1][1], torch.zeros_like(X0[1]))


def test_the_outcome_follows_the_weight_on_either_side_of_the_threshold() -> None:
    assert [selected_objective(w) for w in (0.48, 0.4901, 0.5, 0.5099, 0.52)] == [
        "pred_noise",
        None,
        None,
        None,
        "pred_res",
    ]
    assert selected_objective(0.52, threshold=0.05) is None and selected_objective(0.0) == "pred_noise"
    assert [leading_objective(w) for w in (0.499, 0.5, 0.501)] == ["pred_noise", "pred_noise", "pred_res"]


@pytest.mark.parametrize("settings", [{}, {"kind": "power"}])
def test_the_search_is_refused_where_noise_says_nothing_about_the_image(settings: dict[str, Any]) -> None:
    for check in (check_selection, lambda schedule: check_sampling(schedule, objective="auto", steps=5)):
        with pytest.raises(ConfigError, match="diffusion.objective=auto cannot.*1 - alpha_cumsum is 0.*kind=ddim"):
            check(make_schedule(**settings))
    check_sampling(make_schedule(kind="ddim"), objective="auto", steps=5)
    check_selection(make_schedule(parity="official"))


def test_the_search_needs_one_network_output_and_a_known_loss() -> None:
    settings: dict[str, Any] = {"weight": torch.tensor(0.5), "x0": X0, "x_in": X_IN, "draws": DRAWS}
    with pytest.raises(ConfigError, match="diffusion.objective=auto needs 1 network output.*set model.num_nets=1"):
        selection_loss(lambda *args: [X0, X0], OFFICIAL, **settings)
    with pytest.raises(ConfigError, match="diffusion.loss=huber"):
        selection_loss(fake, OFFICIAL, loss="huber", **settings)
