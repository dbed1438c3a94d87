"""Self-conditioning: who is shown which estimate, in training and in sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.rng import Draws
from rddm_dist.diffusion.objective import training_loss
from rddm_dist.diffusion.prediction import OBJECTIVES, Prediction
from rddm_dist.diffusion.process import levels_at, process_input, q_sample
from rddm_dist.diffusion.sampler import sample
from rddm_dist.diffusion.schedule import make_schedule
from tests.support.diffusion import X0, X_IN, fake_restoration, true_outputs

IDS = torch.arange(40)
IMAGES = X0[:1].expand(40, -1, -1, -1)
ENDS = X_IN[:1].expand(40, -1, -1, -1)


class Recorder:
    """A network that keeps what it was shown and whether gradients were on."""

    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs
        self.shown: list[Tensor | None] = []
        self.with_gradient: list[bool] = []

    def __call__(self, x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Tensor | None) -> list[Tensor]:
        self.shown.append(x_self)
        self.with_gradient.append(torch.is_grad_enabled())
        return list(self.outputs(x_t, times, x_in, mask, x_self))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_shows_half_of_the_samples_the_estimate_and_the_others_nothing(objective: str) -> None:
    """With an oracle the estimate is x0. Which samples see it is their coin, whatever the batch."""
    process = "ddpm" if objective == "pred_v" else "rddm"
    schedule = make_schedule(kind="ddim")
    draws = Draws(seed=2, ids=IDS)
    levels, noise = levels_at(schedule, draws.timesteps(1000)), draws.noise(IMAGES.shape)
    truth = true_outputs(
        objective,
        x_in=process_input(process, ENDS),
        x0=IMAGES,
        noise=noise,
        alpha_cumsum=levels.alpha_cumsum,
        beta_cumsum=levels.beta_cumsum,
    )
    net = Recorder(lambda *args: truth)
    losses = training_loss(
        net,
        schedule,
        objective=objective,
        x0=IMAGES,
        x_in=ENDS,
        draws=draws,
        process=process,
        self_condition=True,
    )
    assert losses.shape == (40,) and net.with_gradient == [False, True] and net.shown[0] is None
    coins, shown = draws.self_condition(), net.shown[1]
    assert shown is not None and 8 < int(coins.sum()) < 32
    torch.testing.assert_close(shown[coins], IMAGES[coins], rtol=0, atol=1e-4)
    assert torch.equal(shown[~coins], torch.zeros_like(shown[~coins]))


def test_without_self_conditioning_the_network_runs_once_and_is_shown_nothing() -> None:
    net = Recorder(fake_restoration)
    settings: dict[str, Any] = {"objective": "pred_res_noise", "x0": IMAGES, "x_in": ENDS}
    training_loss(net, make_schedule(), draws=Draws(0, IDS), **settings)
    assert net.shown == [None] and net.with_gradient == [True]
    sample(net, make_schedule(), objective="pred_res_noise", x_in=X_IN, steps=3, draws=Draws(0, IDS[:2]))
    assert net.shown == [None] * 4


def test_the_first_estimate_carries_no_gradient() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    net = Recorder(lambda x_t, times, x_in, mask, x_self: [x_t * scale])
    losses = training_loss(
        net,
        make_schedule(),
        objective="pred_x0",
        x0=IMAGES,
        x_in=ENDS,
        draws=Draws(0, IDS),
        self_condition=True,
    )
    assert net.shown[1] is not None and not net.shown[1].requires_grad
    assert torch.autograd.grad(losses.sum(), scale)[0] != 0


def test_training_clamps_the_shown_estimate_as_sampling_does() -> None:
    """A residual of 3 is clamped to the given range before x0 is read from it."""
    for clip_residual, expected in (((-0.25, 0.25), 0.25), ((-2.0, 2.0), 1.0)):
        net = Recorder(lambda x_t, times, x_in, mask, x_self: [torch.full_like(x_t, -3.0)])
        training_loss(
            net,
            make_schedule(),
            objective="pred_res",
            x0=torch.zeros_like(IMAGES),
            x_in=torch.zeros_like(IMAGES),
            draws=Draws(0, IDS),
            self_condition=True,
            clip_residual=clip_residual,
        )
        assert net.shown[1] is not None and net.shown[1].max().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 4},
        {"steps": 4, "eta": 1.0},
        {"steps": 12},
        {"steps": 3, "path": "residual_first"},
        {"steps": 3, "path": "two_pass"},
        {"steps": 4, "process": "ddpm"},
    ],
)
def test_sampling_shows_the_estimate_of_the_step_before(settings: dict[str, Any]) -> None:
    """Every sampler; what a network makes of it comes out."""
    net = Recorder(
        lambda x_t, times, x_in, mask, x_self: [
            0.5 * x_in - 0.2 * x_t + (0 if x_self is None else 0.3 * x_self),
            0.3 * x_t,
        ]
    )
    estimates: list[Tensor] = []

    def keep(k: int, x: Tensor, prediction: Prediction | None) -> None:
        if prediction is not None:
            estimates.append(prediction.x0)

    def run(self_condition: bool) -> Tensor:
        net.shown.clear()
        estimates.clear()
        return sample(
            net,
            make_schedule(kind="ddim", num_timesteps=12),
            objective="pred_res_noise",
            x_in=X_IN,
            draws=Draws(0, IDS[:2]),
            self_condition=self_condition,
            on_step=keep,
            **settings,
        )

    without = run(False)
    assert all(x_self is None for x_self in net.shown)
    with_it = run(True)
    assert net.shown[0] is None and len(net.shown) == len(estimates) > 2
    for x_self, estimate in zip(net.shown[1:], estimates, strict=False):
        assert x_self is not None and torch.equal(x_self, estimate)
    assert (with_it - without).abs().max() > 1e-3


def test_a_sample_sees_the_same_estimate_whatever_its_batch() -> None:
    schedule = make_schedule()

    def loss(rows: slice) -> Tensor:
        return training_loss(
            lambda x_t, times, x_in, mask, x_self: [0.3 * x_t + (0 if x_self is None else 0.5 * x_self)],
            schedule,
            objective="pred_res",
            x0=IMAGES[rows],
            x_in=ENDS[rows],
            draws=Draws(seed=4, ids=IDS[rows]),
            self_condition=True,
        )

    whole = loss(slice(0, 40))
    assert torch.equal(whole, torch.cat([loss(slice(0, 13)), loss(slice(13, 40))]))


def test_states_do_not_depend_on_self_conditioning() -> None:
    """The coins have a purpose of their own: timesteps and noise are drawn as without them."""
    schedule, states = make_schedule(), []

    def net(x_t: Tensor, times: Any, x_in: Tensor, mask: Any, x_self: Any) -> list[Tensor]:
        states.append(x_t)
        return [x_t]

    draws = Draws(seed=4, ids=IDS)
    for self_condition in (False, True):
        training_loss(
            net,
            schedule,
            objective="pred_x0",
            x0=IMAGES,
            x_in=ENDS,
            draws=draws,
            self_condition=self_condition,
        )
    t, noise = draws.timesteps(1000), draws.noise(IMAGES.shape)
    expected = q_sample(schedule, x0=IMAGES, residual=ENDS - IMAGES, noise=noise, t=t)
    assert len(states) == 3 and all(torch.equal(state, expected) for state in states)
