"""The UNet2DModel layout: its blocks written out again, its files, and what must be refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import ModelError
from rddm_dist.model.diffusers import CONFIG_FILE, OLD_NAMES, WEIGHTS_FILE, UNet2D, load_unet2d, parse_config

# Small ones in the manner of google/ddpm-celebahq-256 (padding 0, one head), ddpm-cifar10-32 (padding 1), and others.
CELEBAHQ = {
    "_class_name": "UNet2DModel", "act_fn": "silu", "attention_head_dim": None, "block_out_channels": [8, 8, 16],
    "center_input_sample": False, "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 4, "out_channels": 3, "sample_size": 32,
    "time_embedding_type": "positional", "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
CIFAR = {
    **CELEBAHQ, "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 1, "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1,
}  # fmt: skip
OTHER = {**CIFAR, "attention_head_dim": 4, "flip_sin_to_cos": True, "freq_shift": 0, "norm_num_groups": 8}
CONFIGS = {"celebahq": CELEBAHQ, "cifar": CIFAR, "heads": OTHER}


def make_net(values: Mapping[str, Any], seed: int = 0) -> UNet2D:
    torch.manual_seed(seed)
    net = UNet2D(parse_config(values, source="config"))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


def write(folder: Path, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    (folder / CONFIG_FILE).write_text(json.dumps(dict(values)))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_FILE)
    return folder


class Written:
    """The network in float64 from its description, one operation after the other, over a state dict."""

    def __init__(self, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        self.values, self.state = values, {name: tensor.double() for name, tensor in state.items()}

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        """A 3x3 convolution as nine shifted products."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        x = torch.nn.functional.pad(x, (padding,) * 4)
        height, width = (x.shape[2] - 3) // stride + 1, (x.shape[3] - 3) // stride + 1
        total = bias[None, :, None, None].expand(len(x), -1, height, width)
        for i in range(3):
            for j in range(3):
                window = x[:, :, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
                total = total + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], window)
        return total

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), self.values["norm_num_groups"], -1)
        groups = groups - groups.mean(2, keepdim=True)
        x = (groups / (groups.square().mean(2, keepdim=True) + self.values["norm_eps"]).sqrt()).reshape(x.shape)
        return x * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    @staticmethod
    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def time(self, t: Tensor) -> Tensor:
        half = self.values["block_out_channels"][0] // 2
        k = torch.arange(half, dtype=torch.float64) / (half - self.values["freq_shift"])
        angles = t.double()[:, None] * 10000.0**-k
        parts = [angles.sin(), angles.cos()]
        features = torch.cat(parts[::-1] if self.values["flip_sin_to_cos"] else parts, dim=1)
        return self.linear("time_embedding.linear_2", self.silu(self.linear("time_embedding.linear_1", features)))

    def res_block(self, name: str, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv(f"{name}.conv1", self.silu(self.norm(f"{name}.norm1", x)))
        y = y + self.linear(f"{name}.time_emb_proj", self.silu(time))[:, :, None, None]
        y = self.conv(f"{name}.conv2", self.silu(self.norm(f"{name}.norm2", y)))
        if f"{name}.conv_shortcut.weight" in self.state:
            weight, bias = (self.state[f"{name}.conv_shortcut.{part}"] for part in ("weight", "bias"))
            x = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], x) + bias[:, None, None]
        return x + y

    def attention(self, name: str, x: Tensor) -> Tensor:
        channels = x.shape[1]
        size = self.values["attention_head_dim"] or channels
        pixels = self.norm(f"{name}.group_norm", x).flatten(2).transpose(1, 2)
        q, k, v = (self.linear(f"{name}.{part}", pixels) for part in ("to_q", "to_k", "to_v"))
        heads = []
        for start in range(0, channels, size):
            part = slice(start, start + size)
            weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)).softmax(dim=2)
            heads.append(weights @ v[..., part])
        return x + self.linear(f"{name}.to_out.0", torch.cat(heads, dim=2)).transpose(1, 2).reshape(x.shape)

    def block(self, name: str, i: int, x: Tensor, time: Tensor, kind: str) -> Tensor:
        x = self.res_block(f"{name}.resnets.{i}", x, time)
        return self.attention(f"{name}.attentions.{i}", x) if kind.startswith("Attn") else x

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        layers, last = self.values["layers_per_block"], len(self.values["block_out_channels"]) - 1
        time, x = self.time(t), self.conv("conv_in", x.double())
        skips = [x]
        for level, kind in enumerate(self.values["down_block_types"]):
            name = f"down_blocks.{level}"
            for i in range(layers):
                x = self.block(name, i, x, time, kind)
                skips.append(x)
            if level < last:
                padding = self.values["downsample_padding"]
                x = torch.nn.functional.pad(x, (0, 1, 0, 1)) if padding == 0 else x
                x = self.conv(f"{name}.downsamplers.0.conv", x, stride=2, padding=padding)
                skips.append(x)
        x = self.attention("mid_block.attentions.0", self.res_block("mid_block.resnets.0", x, time))
        x = self.res_block("mid_block.resnets.1", x, time)
        for level, kind in enumerate(self.values["up_block_types"]):
            name = f"up_blocks.{level}"
            for i in range(layers + 1):
                x = self.block(name, i, torch.cat([x, skips.pop()], dim=1), time, kind)
            if level < last:
                x = self.conv(f"{name}.upsamplers.0.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        assert not skips
        return self.conv("conv_out", self.silu(self.norm("conv_norm_out", x)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(8, 8), (16, 12)])
def test_the_network_computes_what_its_description_says(name: str, size: tuple[int, int]) -> None:
    net = make_net(CONFIGS[name])
    written = Written(CONFIGS[name], net.state_dict())
    x, t = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 777.0])
    (output,) = net(x, (t + 5, t))
    expected = written(x, t)
    assert output.shape == x.shape and expected.std() > 0.1
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_what_is_not_in_the_description_is_ignored_and_attributes_are_those_of_a_network() -> None:
    net, x = make_net(CIFAR), torch.randn(2, 3, 8, 8)
    times = (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert torch.equal(net(x, times)[0], net(x, times, x + 1, torch.ones(2, 1, 8, 8), x - 1)[0])
    assert (net.condition, net.self_condition, net.image_channels, net.num_outputs) == ("none", False, 3, 1)
    assert net.multiple_of == 2 and make_net(CELEBAHQ).multiple_of == 4
    with pytest.raises(ValueError, match="image size 8x9 must be a multiple of 2"):
        net(x[..., :1].expand(2, 3, 8, 9), times)


@pytest.mark.parametrize("name", CONFIGS)
def test_files_with_new_and_old_attention_names_load_bit_for_bit(tmp_path: Path, name: str) -> None:
    net = make_net(CONFIGS[name])
    state = net.state_dict()
    old = {}
    for key, tensor in state.items():
        for old_name, new_name in OLD_NAMES.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        old[key] = tensor
    with_convolutions = {
        key: tensor[:, :, None, None] if ".query." in key and tensor.ndim == 2 else tensor
        for key, tensor in old.items()
    }
    assert set(old) != set(state)
    for given in (state, old, with_convolutions):
        loaded = load_unet2d(write(tmp_path, CONFIGS[name], given))
        assert not loaded.training and loaded.config == net.config
        assert {key for key, tensor in loaded.state_dict().items() if torch.equal(tensor, state[key])} == set(state)


def test_the_published_face_network_has_its_size() -> None:
    values = {
        **CELEBAHQ, "block_out_channels": [128, 128, 256, 256, 512, 512], "norm_num_groups": 32,
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    }  # fmt: skip
    with torch.device("meta"):
        net = UNet2D(parse_config(values, source="config"))
    assert sum(int(np.prod(p.shape)) for p in net.parameters()) == 113_673_219
    assert net.multiple_of == 32


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "describes UNet2DConditionModel; only UNet2DModel"),
        ({"act_fn": "gelu"}, "act_fn=gelu is not known; only silu is"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier is not known"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift=scale_shift is not known"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "down_block_types has SkipDownBlock2D"),
        ({"down_block_types": ["DownBlock2D"]}, "block_out_channels has 2 entries, down_block_types 1"),
        ({"norm_num_groups": 3}, "block_out_channels has 8, not a multiple of norm_num_groups=3"),
        ({"norm_num_groups": 0}, "a setting has the wrong type or is 0"),
        ({"block_out_channels": 8}, "a setting has the wrong type or is 0"),
        ({"downsample_padding": 2}, "downsample_padding=2 must be 0 or 1"),
    ],
)
def test_other_architectures_are_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    write(tmp_path, {**CIFAR, **changes}, {})
    with pytest.raises(ModelError, match=match) as error:
        load_unet2d(tmp_path)
    assert "\n" not in str(error.value) and CONFIG_FILE in str(error.value)


def test_missing_damaged_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match) as error:
            load_unet2d(tmp_path)
        assert "\n" not in str(error.value)

    refused("config.json does not exist")
    (tmp_path / CONFIG_FILE).write_text("{")
    refused("not valid JSON")
    (tmp_path / CONFIG_FILE).write_text("[1]")
    refused("describes nothing")
    (tmp_path / CONFIG_FILE).write_text(json.dumps(CIFAR))
    refused("do not exist; only safetensors are read")
    (tmp_path / WEIGHTS_FILE).write_bytes(b"PK\x03\x04 a pickle")
    refused("cannot be read")
    state = make_net(CIFAR).state_dict()
    key = "mid_block.attentions.0.to_q.weight"
    write(tmp_path, CIFAR, {name: tensor for name, tensor in state.items() if name != key})
    refused(rf"{key} is missing \(1 in all\)")
    write(tmp_path, CIFAR, {**state, "extra.weight": torch.zeros(1)})
    refused(r"extra.weight is unknown \(1 in all\)")
    write(tmp_path, CIFAR, {**state, key: torch.zeros(8, 16)})
    refused(f"{key} is of another shape")
