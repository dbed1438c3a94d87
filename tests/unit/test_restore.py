"""Restoring 8-bit images: any size, exact rounding, noise that belongs to the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, DataError, ModelError
from data_pipeline.preprocess import Preprocess, equalize, pad_bottom_right, resize
from rddm_dist.config import Config
from rddm_dist.diffusion.schedule import make_schedule
from rddm_dist.evaluation.restore import Restorer, RestoreSettings, load_restorer, pad_to_multiple
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
