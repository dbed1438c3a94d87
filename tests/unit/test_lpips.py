"""LPIPS: the formula in plain loops, torchvision's names, and files of published weights and heads."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, DataError, ModelError
from rddm_dist.evaluation.features import load_lpips
from rddm_dist.evaluation.networks.architectures import convert
from rddm_dist.evaluation.networks.lpips import SCALE, SHIFT, LpipsNetwork, make_alex, make_vgg

MAKERS = {"lpips-alex": make_alex, "lpips-vgg": make_vgg}
CONVOLUTIONS = {"lpips-alex": (0, 3, 6, 8, 10), "lpips-vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}


def images(count: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, height, width)).astype(np.float32))


def small_network() -> LpipsNetwork:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU())
    return LpipsNetwork(layers, taps=(1, 4), channels=(4, 5), smallest=4).eval().requires_grad_(False)


def trunk_file(folder: Path, architecture: str) -> Path:
    """Random weights as torchvision saves them: the trunk and a classifier that LPIPS does not use."""
    torch.manual_seed(1)
    state = MAKERS[architecture]().state_dict()
    trunk = {name: tensor for name, tensor in state.items() if name.startswith("features.")}
    path = folder / f"{architecture}.pth"
    torch.save({**trunk, "classifier.1.weight": torch.zeros(2, 2)}, path)
    return path


def convolved(x: np.ndarray, net: LpipsNetwork, layer: int, *, pad: int) -> np.ndarray:
    """A 3x3 convolution and a ReLU, in loops.   (C, H, W) -> (C', H', W')"""
    state = net.state_dict()
    weight, bias = (state[f"features.{layer}.{part}"].double().numpy() for part in ("weight", "bias"))
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad)])
    height, width = x.shape[1] - 2, x.shape[2] - 2
    out = np.zeros((len(weight), height, width))
    for k, i, j in np.ndindex(out.shape):
        out[k, i, j] = max(0.0, (x[:, i : i + 3, j : j + 3] * weight[k]).sum() + bias[k])
    return out


def by_loops(net: LpipsNetwork, x: np.ndarray, y: np.ndarray) -> float:
    """The distance of two images (3, H, W), pixel by pixel."""
    total = 0.0
    maps = []
    for image in (x, y):
        scaled = np.stack([(image[c] / 127.5 - 1 - SHIFT[c]) / SCALE[c] for c in range(3)])
        first = convolved(scaled, net, 0, pad=0)
        _, height, width = first.shape
        pooled = first[:, : height // 2 * 2, : width // 2 * 2]
        pooled = pooled.reshape(len(first), height // 2, 2, width // 2, 2).max(axis=(2, 4))
        maps.append((first, convolved(pooled, net, 3, pad=1)))
    for tap in range(2):
        head = net.state_dict()[f"heads.{tap}.weight"].double().numpy().ravel()
        one, other = maps[0][tap], maps[1][tap]
        values = []
        for i, j in np.ndindex(one.shape[1:]):
            a, b = (v[:, i, j] / (np.linalg.norm(v[:, i, j]) + 1e-10) for v in (one, other))
            values.append((head * (a - b) ** 2).sum())
        total += np.mean(values)
    return float(total)


def test_the_distance_is_that_of_plain_loops() -> None:
    net = small_network()
    x, y = images(3, 9, 12, seed=1), images(3, 9, 12, seed=2)
    expected = [by_loops(net, a, b) for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True)]
    given = net(x, y)
    assert given.dtype == torch.float64
    assert given.tolist() == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 6) for value in expected}) == 3


@pytest.mark.parametrize("architecture", MAKERS)
def test_equal_images_are_at_distance_zero_and_order_does_not_matter(architecture: str) -> None:
    torch.manual_seed(2)
    net = MAKERS[architecture]().eval().requires_grad_(False)
    x, y = images(2, 33, 40, seed=1), images(2, 33, 40, seed=2)
    assert net(x, x).tolist() == [0.0, 0.0]
    assert torch.equal(net(x, y), net(y, x)) and net(x, y).abs().min() > 0


@pytest.mark.parametrize("architecture", MAKERS)
def test_the_smallest_images_are_measured_and_smaller_ones_refused(architecture: str) -> None:
    net = MAKERS[architecture]().eval().requires_grad_(False)
    side = net.smallest
    assert net(images(1, side, side), images(1, side, side, seed=1)).isfinite().all()
    with pytest.raises(DataError, match=f"at least {side}x{side} pixels, got 99x{side - 1}"):
        net(images(1, side - 1, 99), images(1, side - 1, 99))
    with pytest.raises(RuntimeError):  # so that the bound is not larger than need be
        net.features(images(1, side - 1, 99))


@pytest.mark.parametrize("architecture", MAKERS)
def test_layers_have_torchvisions_names(architecture: str) -> None:
    names = {name for name in MAKERS[architecture]().state_dict() if name.startswith("features.")}
    assert names == {f"features.{i}.{part}" for i in CONVOLUTIONS[architecture] for part in ("weight", "bias")}


@pytest.mark.parametrize(("architecture", "heads"), [("lpips-alex", "alex"), ("lpips-vgg", "vgg")])
def test_published_trunks_become_networks_with_the_heads_of_torchmetrics(
    tmp_path: Path, architecture: str, heads: str
) -> None:
    out = convert(architecture, weights=trunk_file(tmp_path, architecture), out=tmp_path / "lpips.safetensors")
    network = load_lpips(out)
    carried = distribution("torchmetrics").locate_file(f"torchmetrics/functional/image/lpips_models/{heads}.pth")
    state = torch.load(str(carried), map_location="cpu", weights_only=True)
    torch.manual_seed(1)
    net = MAKERS[architecture]().eval().requires_grad_(False)
    for k in range(5):
        net.state_dict()[f"heads.{k}.weight"].copy_(state[f"lin{k}.model.1.weight"])
    x, y = images(2, 32, 35, seed=1), images(2, 32, 35, seed=2)
    distance = network(x, y)
    assert torch.equal(distance, net(x, y))
    assert (distance > 0).all()
    assert network.name == architecture
    assert network.describe() == {"name": architecture, "sha256": network.digest}


@pytest.mark.parametrize("architecture", MAKERS)
def test_a_loaded_network_says_the_smallest_images_it_takes(tmp_path: Path, architecture: str) -> None:
    out = convert(architecture, weights=trunk_file(tmp_path, architecture), out=tmp_path / "lpips.safetensors")
    network = load_lpips(out)
    side = network.smallest
    assert network(images(1, side, side), images(1, side, side, seed=1)).isfinite().all()
    with pytest.raises(DataError, match=f"at least {side}x{side} pixels"):
        network(images(1, side, side - 1), images(1, side, side - 1, seed=1))


def test_given_heads_take_the_place_of_the_carried_ones(tmp_path: Path) -> None:
    channels = (64, 192, 384, 256, 256)
    zero = {f"lin{k}.model.1.weight": torch.zeros(1, count, 1, 1) for k, count in enumerate(channels)}
    torch.save(zero, tmp_path / "heads.pth")
    trunk = trunk_file(tmp_path, "lpips-alex")
    out = convert("lpips-alex", weights=trunk, heads=tmp_path / "heads.pth", out=tmp_path / "zero.safetensors")
    assert load_lpips(out)(images(2, 32, 32), images(2, 32, 32, seed=1)).tolist() == [0.0, 0.0]
    with pytest.raises(ConfigError, match="--heads goes with LPIPS"):
        convert("inception-v3-fid", weights=trunk, heads=tmp_path / "heads.pth", out=tmp_path / "x.safetensors")


def test_a_trunk_of_another_architecture_is_refused(tmp_path: Path) -> None:
    trunk = trunk_file(tmp_path, "lpips-alex")
    with pytest.raises(
        ModelError, match=r"is no lpips-vgg network: it .* get https://download\.pytorch\.org/models/vgg16"
    ):
        convert("lpips-vgg", weights=trunk, out=tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_pairs_of_different_shapes_are_refused(tmp_path: Path) -> None:
    out = convert("lpips-alex", weights=trunk_file(tmp_path, "lpips-alex"), out=tmp_path / "lpips.safetensors")
    network = load_lpips(out)
    with pytest.raises(ValueError, match="images of one shape"):
        network(images(1, 32, 32), images(1, 32, 40))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) float32"):
        network(images(1, 32, 32).double(), images(1, 32, 32).double())
