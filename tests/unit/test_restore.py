"""Restoring 8-bit images: any size, exact rounding, noise that belongs to the image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, DataError, ModelError
from data_pipeline.preprocess import Preprocess, equalize, pad_bottom_right, resize
from data_pipeline.rng import Draws
from rddm_dist import load_model, restore
from rddm_dist.config import Config
from rddm_dist.diffusion.sampler import sample
from rddm_dist.diffusion.schedule import make_schedule, readjust
from rddm_dist.evaluation.restore import (
    NetSampler,
    Restorer,
    RestoreSettings,
    load_restorer,
    pad_to_multiple,
    restore_settings,
    to_images,
)
from rddm_dist.factory import make_net
from rddm_dist.model.weights import save_safetensors

CONFIG = Config.model_validate(
    {
        "model": {"dim": 8, "dim_mults": [1, 2, 2], "num_nets": 1},
        "diffusion": {"objective": "pred_res", "num_timesteps": 50, "sum_scale": 0.5},
        "sample": {"steps": 3},
    }
)


def images(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def make_restorer(*, seed: int = 0, eta: float = 0.0, preprocess: Preprocess | None = None) -> Restorer:
    torch.manual_seed(0)
    settings = RestoreSettings(objective="pred_res", steps=3, eta=eta, seed=seed, preprocess=preprocess or Preprocess())
    return Restorer(make_net(CONFIG), make_schedule(num_timesteps=50, sum_scale=0.5), settings)


class Oracle(nn.Module):
    """Knows the clean image, and takes only sizes that are multiples of 8."""

    multiple_of = 8

    def __init__(self, target: np.ndarray, *, value: float = 0.0) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        x0 = torch.from_numpy(target).permute(0, 3, 1, 2).float() / 127.5 - 1
        self.x0, self.value = pad_to_multiple(x0, 8), value

    def forward(
        self,
        x_t: Tensor,
        times: tuple[Tensor, Tensor],
        x_in: Tensor,
        mask: Tensor | None,
        x_self: Tensor | None = None,
    ) -> tuple[Tensor]:
        assert x_t.shape[-2] % 8 == 0 and x_t.shape[-1] % 8 == 0
        return (x_in - self.x0 + self.value,)


def oracle_restorer(target: np.ndarray, *, value: float = 0.0) -> Restorer:
    settings = RestoreSettings(objective="pred_res", steps=3)
    return Restorer(Oracle(target, value=value), make_schedule(num_timesteps=50), settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(16, 24), (13, 30), (3, 40), (1, 1)])
def test_an_oracle_gives_every_target_back_exactly_at_any_size(height: int, width: int) -> None:
    target = images(2, height, width, seed=1)
    restored = oracle_restorer(target).restore(images(2, height, width), [5, 6])
    assert restored.dtype == np.uint8
    assert np.array_equal(restored, target)


def test_all_256_values_survive_the_way_through_the_network_range() -> None:
    target = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(oracle_restorer(target).restore(255 - target, [0]), target)


def test_results_beyond_the_range_are_clamped() -> None:
    target = images(1, 8, 8)
    bright = oracle_restorer(target, value=-3.0).restore(target, [0])
    assert (bright == 255).all()


def test_padding_mirrors_and_repeats_the_edge_of_images_smaller_than_itself() -> None:
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    padded = pad_to_multiple(x, 5)
    assert padded[0, 0, 0].tolist() == [0, 1, 2, 1, 0]
    assert padded[0, 0, :, 0].tolist() == [0, 3, 3, 3, 3]
    assert pad_to_multiple(padded, 5) is padded or torch.equal(pad_to_multiple(padded, 5), padded)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_an_image_is_restored_the_same_alone_and_in_a_batch(eta: float) -> None:
    inputs, ids = images(3, 18, 21), [11, 22, 2**62 + 5]
    restorer = make_restorer(eta=eta)
    together = restorer.restore(inputs, ids)
    alone = np.concatenate([restorer.restore(inputs[i : i + 1], ids[i : i + 1]) for i in range(3)])
    # Other batch sizes may add up in another order: at most a value next door, and rarely.
    assert np.abs(together.astype(int) - alone).max() <= 1
    assert (together != alone).mean() < 1e-3


def test_the_noise_follows_id_and_seed() -> None:
    inputs = images(1, 16, 16)
    first = make_restorer().restore(inputs, [7])
    assert np.array_equal(first, make_restorer().restore(inputs, [7]))
    assert not np.array_equal(first, make_restorer().restore(inputs, [8]))
    assert not np.array_equal(first, make_restorer(seed=1).restore(inputs, [7]))


def test_a_mask_reaches_the_network() -> None:
    torch.manual_seed(0)
    net = make_net(CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"condition": "input_mask"})}))
    restorer = Restorer(net, make_schedule(num_timesteps=50), RestoreSettings(objective="pred_res", steps=1))
    inputs, mask = images(1, 10, 12), np.zeros((1, 10, 12), dtype=np.uint8)
    dark, light = restorer.restore(inputs, [0], mask), restorer.restore(inputs, [0], mask + 255)
    assert not np.array_equal(dark, light)
    assert np.array_equal(restorer.restore(inputs, [0], mask[..., None]), dark)


def test_restoring_applies_the_preprocessing_of_training() -> None:
    inputs, ids = images(2, 20, 28), [1, 2]
    equalized = np.stack([equalize(image) for image in inputs])
    got = make_restorer(preprocess=Preprocess(equalize=True)).restore(inputs, ids)
    assert np.array_equal(got, make_restorer().restore(equalized, ids))
    assert not np.array_equal(got, make_restorer().restore(inputs, ids))

    padded = np.stack([pad_bottom_right(image, min_side=24, multiple=16) for image in inputs])
    got = make_restorer(preprocess=Preprocess(pad_to=24, pad_multiple=16)).restore(inputs, ids)
    assert got.shape == inputs.shape and padded.shape == (2, 32, 32, 3)
    assert np.array_equal(got, make_restorer().restore(padded, ids)[:, :20, :28])

    square = make_restorer(preprocess=Preprocess(resize=16))
    got = square.restore(inputs, ids)
    resized = np.stack([resize(image, 16) for image in inputs])
    assert np.array_equal(got, make_restorer().restore(resized, ids))
    assert np.array_equal(square.as_restored(inputs[0]), resized[0])
    assert np.array_equal(make_restorer().as_restored(inputs[0]), inputs[0])
    assert square.settings.describe()["preprocess"] == {
        "pad_to": 0, "pad_multiple": 0, "equalize": False, "resize": 16
    }  # fmt: skip


def test_preprocessing_is_saved_with_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = CONFIG.model_dump(mode="json")
    values["data"]["preprocess"]["equalize"] = True
    save_safetensors(tmp_path / "model.safetensors", make_net(CONFIG).state_dict(), config=values)
    loaded, inputs = load_restorer(tmp_path / "model.safetensors"), images(1, 16, 16)
    assert loaded.settings.preprocess == Preprocess(equalize=True)
    assert np.array_equal(loaded.restore(inputs, [1]), make_restorer().restore(equalize(inputs[0])[None], [1]))


def test_a_network_that_yields_nan_is_reported() -> None:
    target = images(1, 8, 8)
    with pytest.raises(ModelError, match="not finite"):
        oracle_restorer(target, value=float("nan")).restore(target, [0])


def test_wrong_arguments_are_refused() -> None:
    restorer = make_restorer()
    with pytest.raises(DataError, match="uint8"):
        restorer.restore(images(1, 8, 8).astype(np.float32), [0])
    with pytest.raises(DataError, match="as many ids"):
        restorer.restore(images(2, 8, 8), [0])
    with pytest.raises(DataError, match=r"masks for these images must be \(1, 8, 8\) uint8, got \(1, 8, 9\) uint8"):
        restorer.restore(images(1, 8, 8), [0], np.zeros((1, 8, 9), np.uint8))
    with pytest.raises(DataError, match="got .* bool"):
        restorer.restore(images(1, 8, 8), [0], np.zeros((1, 8, 8), bool))
    with pytest.raises(ConfigError, match="steps=51"):
        settings = RestoreSettings(objective="pred_res", steps=51)
        Restorer(make_net(CONFIG), make_schedule(num_timesteps=50), settings)


def test_an_export_restores_as_the_network_it_was_made_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = make_net(CONFIG)
    save_safetensors(tmp_path / "model.safetensors", net.state_dict(), config=CONFIG.model_dump(mode="json"))
    loaded = load_restorer(tmp_path / "model.safetensors")
    assert (loaded.settings.steps, loaded.settings.eta) == (CONFIG.sample.steps, CONFIG.sample.eta)
    assert load_restorer(tmp_path / "model.safetensors", steps=2, eta=0.5).settings.describe()["steps"] == 2
    inputs = images(2, 18, 21)
    assert np.array_equal(loaded.restore(inputs, [1, 2]), make_restorer().restore(inputs, [1, 2]))


def test_a_model_that_is_not_there_is_a_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_restorer(tmp_path / "model.safetensors")


def test_folding_changes_neither_the_result_nor_the_network_and_copies_filters_alone() -> None:
    torch.manual_seed(0)
    net, schedule = make_net(CONFIG), make_schedule(num_timesteps=50, sum_scale=0.5)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x_in, draws = torch.rand(2, 3, 16, 24) * 2 - 1, Draws(0, torch.tensor([3, 4]))
    plain = sample(net, schedule, objective="pred_res", x_in=x_in, steps=3, draws=draws)
    sampler = NetSampler(net, schedule, RestoreSettings(objective="pred_res", steps=3))
    assert float((sampler(x_in, [3, 4]) - plain).abs().max() / plain.abs().max()) < 1e-5
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    of_net, of_sampler = ({p.data_ptr() for p in owner.parameters()} for owner in (net, sampler._net))
    copied = [p for p in sampler._net.parameters() if p.data_ptr() in of_sampler - of_net]
    assert copied and all(p.ndim == 4 and p.shape[-1] > 1 for p in copied)
    again = NetSampler(sampler._net, schedule, RestoreSettings(objective="pred_res", steps=2))
    assert {p.data_ptr() for p in again._net.parameters()} == of_sampler


@pytest.fixture
def two_outputs(tmp_path: Path) -> Path:
    """A model with two networks that are told the clocks."""
    values = CONFIG.model_dump(mode="json")
    values["model"]["num_nets"] = 2
    values["diffusion"] |= {"objective": "pred_res_noise", "time_input": "clocks"}
    torch.manual_seed(0)
    net = make_net(Config.model_validate(values))
    save_safetensors(tmp_path / "two.safetensors", net.state_dict(), config=values)
    return tmp_path / "two.safetensors"


TRAINED = {"num_timesteps": 50, "sum_scale": 0.5}


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        (["sample.path=residual_first"], {"path": "residual_first"}),
        (["sample.path=[[1.0, 0.70710678], [0.4, 0.2], [0, 0]]"], {"path": ((1.0, 0.5**0.5), (0.4, 0.2), (0, 0))}),
        (["sample.use=residual"], {"use": "residual"}),
        (["sample.update=x0", "sample.eta=0.5", "sample.steps=4"], {"update": "x0", "eta": 0.5, "steps": 4}),
        (
            ["sample.schedule.alpha_kind=power", "sample.schedule.alpha=increased", "sample.schedule.alpha_power=2"],
            {
                "schedule": readjust(
                    make_schedule(**TRAINED),  # type: ignore[arg-type]
                    alpha=make_schedule(kind="power", alpha="increased", alpha_power=2.0, **TRAINED),  # type: ignore[arg-type]
                )
            },
        ),
    ],
)
def test_overrides_change_the_sampler_as_its_arguments_do(
    two_outputs: Path, overrides: list[str], settings: dict[str, Any]
) -> None:
    model, inputs, ids = load_model(two_outputs, overrides=overrides), images(2, 16, 24), [0, 1]
    arguments = {"schedule": make_schedule(**TRAINED), "steps": 3, **settings}  # type: ignore[arg-type]
    x0 = sample(
        load_model(two_outputs).net,
        arguments.pop("schedule"),
        objective="pred_res_noise",
        x_in=torch.from_numpy(inputs).permute(0, 3, 1, 2).float() / 127.5 - 1,
        draws=Draws(0, torch.tensor(ids)),
        time_input="clocks",
        **arguments,
    )
    restored = restore(model, inputs)
    # The folded network rounds differently.
    assert np.abs(restored.astype(int) - to_images(x0)).max() <= 1 and (restored != to_images(x0)).mean() < 1e-3
    assert np.array_equal(load_restorer(two_outputs, overrides=overrides).restore(inputs, ids), restored)
    plain = load_model(two_outputs)
    assert (restored != restore(plain, inputs)).mean() > 0.01
    assert restore_settings(model.config).describe() != restore_settings(plain.config).describe()
    assert json.loads(json.dumps(restore_settings(model.config).describe()))["schedule"]["sum_scale"] == 0.5
    assert model.digest == plain.digest


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=3", r"--set train.steps=3 is no setting of the sampler; give sample.KEY=VALUE"),
        ("sample=3", "is no setting of the sampler"),
        ("sample.stepz=3", r"unknown key sample.stepz; did you mean sample.steps\?"),
        ("sample.schedule.alpha_powr=3", r"did you mean sample.schedule.alpha_power\?"),
        ("sample.steps=0", "sample.steps=0: input should be greater than or equal to 1"),
        ("sample.steps=51", "sample.steps=51 exceeds diffusion.num_timesteps=50"),
        ("sample.eta=1.5", "sample.eta=1.5"),
        ("sample.eta", "must have the form section.key=value"),
        ("sample.every=3", "sample.every is about previews during training"),
        ("sample.schedule.alpha_power=2", "has no effect with alpha_kind=same; set sample.schedule.alpha_kind"),
        ("sample.schedule={alpha_kind: linear, alpha: normal}", "sample.schedule.alpha=normal"),
    ],
)
def test_an_override_that_does_not_fit_is_one_line(two_outputs: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        load_model(two_outputs, overrides=[override])
    assert "\n" not in str(raised.value)


def test_masks_go_with_the_networks_that_see_them(two_outputs: Path, tmp_path: Path) -> None:
    values = CONFIG.model_dump(mode="json")
    values["model"]["condition"] = "input_mask"
    torch.manual_seed(0)
    path = tmp_path / "masked.safetensors"
    save_safetensors(path, make_net(Config.model_validate(values)).state_dict(), config=values)
    model, inputs, masks = load_model(path), images(2, 8, 12), images(2, 8, 12, seed=1)[..., 0]
    expected = load_restorer(path).restore(inputs, [0, 1], masks)
    assert np.array_equal(restore(model, inputs, masks=masks), expected)
    assert not np.array_equal(restore(model, inputs, masks=255 - masks), expected)
    with pytest.raises(ConfigError, match="needs a mask for every image"):
        restore(model, inputs)
    with pytest.raises(ConfigError, match="a mask was given, but this network has model.condition=input "):
        restore(load_model(two_outputs), inputs, masks=masks)
