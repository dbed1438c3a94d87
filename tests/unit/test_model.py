"""The networks: published outputs, keys and sizes, gradients under checkpointing, types, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from rddm_dist.model.blocks import (
    Attention,
    ConvBlock,
    LayerNormC,
    LinearAttention,
    PreNorm,
    ResBlock,
    Residual,
    SinusoidalEmbedding,
    WSConv2d,
    upsample,
)
from rddm_dist.model.net import RddmNet
from rddm_dist.model.unet import Unet

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(GOLDEN_DIR / "unet.npz")
KEYS = json.loads((GOLDEN_DIR / "state_dict_keys.json").read_text())
TOLERANCE = 5e-4

T_0_777 = torch.tensor([0.0, 777.0])
ALPHA_CLOCK = torch.tensor([993.6471557617188, 188.18807983398438])
BETA_CLOCK = torch.tensor([999.9798583984375, 583.9190673828125])


def pattern(shape: tuple[int, ...], a: float, b: float) -> Tensor:
    return torch.from_numpy(np.sin(a * np.arange(np.prod(shape)) + b).astype(np.float32).reshape(shape))


def fill(module: nn.Module) -> nn.Module:
    """The weights of the reference numbers, by position in the state dict."""
    norms = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.GroupNorm)}
    with torch.no_grad():
        for k, (name, tensor) in enumerate(module.state_dict().items()):
            z = np.random.RandomState(1000 + k).standard_normal(tuple(tensor.shape))
            if name in norms or name.split(".")[-1] == "g":
                values = 1 + 0.1 * z
            elif tensor.ndim == 1:
                values = 0.1 * z
            else:
                values = z / np.sqrt(np.prod(tensor.shape[1:]))
            tensor.copy_(torch.from_numpy(values.astype(np.float32)))
    return module


def assert_golden(output: Tensor, name: str) -> None:
    torch.testing.assert_close(output, torch.from_numpy(GOLDEN[name]), rtol=0, atol=TOLERANCE)


MODULES: dict[str, nn.Module] = {
    "WeightStandardizedConv2d_16_24_k3": WSConv2d(16, 24, 3, padding=1),
    "LayerNorm_16": LayerNormC(16),
    "Block_16_24": ConvBlock(16, 24),
    "LinearAttention_16": LinearAttention(16),
    "Attention_16": Attention(16),
    "Residual_PreNorm_LinearAttention_16": Residual(PreNorm(16, LinearAttention(16))),
    "Downsample_16_24": nn.Conv2d(16, 24, 4, 2, 1),
    "Upsample_16_24": upsample(16, 24),
    "ResnetBlock_16_24_t32": ResBlock(16, 24, time_dim=32),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
def test_modules_equal_the_published_ones(name: str) -> None:
    inputs = [pattern((2, 16, 6, 4), 0.11, 0.3)]
    if name.startswith("Resnet"):
        inputs.append(pattern((2, 32), 0.2, 0.1))
    assert_golden(fill(MODULES[name])(*inputs), f"B/modules/{name}")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dim", "channels", "time"),
    [
        ("dim8_uncond", 8, 3, T_0_777),
        ("dim64_uncond", 64, 3, T_0_777),
        ("dim64_cond", 64, 6, T_0_777),
        ("dim64_cond_float_time_993.64716_188.18808", 64, 6, ALPHA_CLOCK),
        ("dim8_cond_mask", 8, 9, T_0_777),
    ],
)
def test_unets_equal_the_published_ones(name: str, dim: int, channels: int, time: Tensor) -> None:
    net = fill(Unet(dim, in_channels=channels))
    assert_golden(net(pattern((2, channels, 32, 32), 0.013, 0.2), time), f"B/unet/{name}")


@torch.no_grad()
def test_a_two_level_unet_on_an_oblong_image_equals_the_published_one() -> None:
    net = fill(Unet(8, dim_mults=(1, 2), in_channels=6))
    output = net(pattern((1, 6, 24, 40), 0.013, 0.2), torch.tensor([5.0]))
    assert_golden(output, "B/unet/dim8_mults12_nonsquare")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "num_nets", "condition", "times"),
    [
        ("dim8_share0_cond", 2, "input", (T_0_777, T_0_777)),
        ("dim8_shareminus1_cond", 1, "input", (T_0_777, T_0_777)),
        ("dim8_num_unet2_two_times", 2, "none", (ALPHA_CLOCK, BETA_CLOCK)),
        ("dim8_num_unet2_translation", 2, "none", (T_0_777, T_0_777)),
    ],
)
def test_rddm_nets_equal_the_published_ones(
    name: str, num_nets: int, condition: str, times: tuple[Tensor, Tensor]
) -> None:
    net = fill(RddmNet(8, num_nets=num_nets, condition=condition))
    channels = 6 if condition == "input" else 3
    x = pattern((2, channels, 32, 32), 0.013, 0.2)
    outputs = net(x[:, :3], times, x[:, 3:])
    assert len(outputs) == num_nets
    for i, output in enumerate(outputs):
        assert_golden(output, f"B/unetres/{name}/out{i}")


def test_state_dict_has_the_published_keys_in_order() -> None:
    with torch.device("meta"):
        net = Unet(64)
    assert [[name, list(tensor.shape)] for name, tensor in net.state_dict().items()] == KEYS["unet_dim64"]


@pytest.mark.parametrize("name", KEYS["counts"])
def test_sizes_are_the_published_ones(name: str) -> None:
    num_nets, condition = name.split()
    with torch.device("meta"):
        net = RddmNet(64, num_nets=int(num_nets), condition=condition)
    assert sum(p.numel() for p in net.parameters()) == KEYS["counts"][name]["parameters"]
    assert len(net.state_dict()) == KEYS["counts"][name]["tensors"]
    assert {key.split(".")[0] for key in net.state_dict()} == {f"unet{i}" for i in range(int(num_nets))}


def test_sinusoidal_embedding_takes_real_times() -> None:
    embedding = SinusoidalEmbedding(8)(torch.tensor([0.0, 123.456]))
    frequencies = 10000.0 ** (-np.arange(4) / 3)
    expected = np.concatenate([np.sin(123.456 * frequencies), np.cos(123.456 * frequencies)])
    np.testing.assert_allclose(embedding[1], expected, atol=2e-5)
    assert embedding[0].tolist() == [0.0] * 4 + [1.0] * 4


def test_linear_attention_equals_its_definition() -> None:
    """The context folded into the output weights against the formula written out, pixel by pixel."""
    torch.manual_seed(0)
    module, x = LinearAttention(16).double(), torch.randn(2, 16, 5, 3, dtype=torch.float64)
    qkv = torch.einsum("oc,bcn->bon", module.to_qkv.weight.flatten(1), x.flatten(2))
    q, k, v = qkv.reshape(2, 3, 4, 32, 15).unbind(1)
    q, k, v = q.softmax(2) * 32**-0.5, k.softmax(3), v / 15
    out = torch.einsum("bhdn,bhen,bhdm->bhem", k, v, q).reshape(2, 128, 5, 3)
    readout, norm = module.to_out
    expected = norm(nn.functional.conv2d(out, readout.weight, readout.bias))
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def test_weight_standardisation_ignores_shift_and_scale_of_a_filter() -> None:
    torch.manual_seed(0)
    conv, x = WSConv2d(8, 8, 3, padding=1), torch.randn(1, 8, 6, 6)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(30).add_(0.7)
    torch.testing.assert_close(conv(x), before, rtol=0.005, atol=0.005)
    assert before.abs().max() > 1


def small_net(**settings: object) -> RddmNet:
    torch.manual_seed(0)
    return RddmNet(16, (1, 2, 4), **settings)  # type: ignore[arg-type]


def small_inputs(batch: int = 2) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t, x_in = torch.randn(2, batch, 3, 16, 24, generator=generator).unbind(0)
    return x_t, (torch.arange(batch) * 100.0, torch.arange(batch) * 50.0 + 7), x_in


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for activation_checkpointing in (False, True):
        net = small_net(num_nets=2, activation_checkpointing=activation_checkpointing)
        loss = torch.stack([output.square().mean() for output in net(*small_inputs())]).sum()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in net.parameters())])
    assert all(gradient is not None for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_activation_checkpointing_keeps_the_keys_and_recomputes_in_backward() -> None:
    net = small_net(num_nets=1, activation_checkpointing=True)
    assert list(net.state_dict()) == list(small_net(num_nets=1).state_dict())
    calls: list[int] = []
    net.unet0.mid_block1.register_forward_hook(lambda *args: calls.append(1))
    net(*small_inputs())[0].sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        net(*small_inputs())
    assert len(calls) == 3


def test_each_network_is_told_its_own_time() -> None:
    net = small_net(num_nets=2)
    x_t, (alpha, beta), x_in = small_inputs()
    both = net(x_t, (alpha, beta), x_in)
    changed = net(x_t, (alpha, beta + 100), x_in)
    assert torch.equal(both[0], changed[0]) and not torch.equal(both[1], changed[1])
    for which, time in [("residual", 0), ("noise", 1)]:
        single = small_net(num_nets=1, time_of_single=which)
        expected = single.unet0(torch.cat([x_t, x_in], 1), (alpha, beta)[time])
        assert torch.equal(single(x_t, (alpha, beta), x_in)[0], expected)


def test_images_enter_in_the_published_order() -> None:
    diffusion = np.load(GOLDEN_DIR / "diffusion.npz")
    expected = torch.from_numpy(diffusion["model_input_with_mask/x_in_9ch"])
    mask = torch.from_numpy(diffusion["inputs/mask"])
    net = RddmNet(8, (1, 2), num_nets=1, condition="input_mask")
    seen: list[Tensor] = []
    net.unet0.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for given in (mask, mask[:, :1]):
        net(expected[:, :3], (T_0_777, T_0_777), torch.from_numpy(diffusion["inputs/x_in"]), given)
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(seen[1][:, 6:], mask[:, :1].expand(-1, 3, -1, -1))


def test_what_the_condition_does_not_name_is_ignored() -> None:
    x_t, times, x_in = small_inputs()
    net = small_net(num_nets=1, condition="none")
    assert torch.equal(net(x_t, times)[0], net(x_t, times, x_in, torch.ones(2, 1, 16, 24))[0])


def test_a_sample_hardly_depends_on_its_batch_or_memory_format() -> None:
    x_t, times, x_in = small_inputs(4)
    net = small_net(num_nets=1).eval()
    with torch.no_grad():
        whole = net(x_t, times, x_in)[0]
        rows = [net(x_t[i : i + 1], (times[0][i : i + 1],) * 2, x_in[i : i + 1])[0] for i in range(4)]
        torch.testing.assert_close(whole, torch.cat(rows), rtol=0, atol=1e-5)
        channels_last = net.to(memory_format=torch.channels_last)(x_t, times, x_in)[0]
        torch.testing.assert_close(channels_last, whole, rtol=0, atol=1e-5)


def test_a_bfloat16_network_takes_float32_images_and_precise_times() -> None:
    x_t, times, x_in = small_inputs()
    with torch.no_grad():
        exact = small_net(num_nets=1)(x_t, times, x_in)[0]
        rounded = small_net(num_nets=1).bfloat16()(x_t, times, x_in)[0]
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.03


@pytest.mark.parametrize("dim", [0, 12, -8])
def test_a_width_that_groups_cannot_share_is_refused(dim: int) -> None:
    with pytest.raises(ConfigError, match=f"model.dim={dim} must be a positive multiple of 8"):
        RddmNet(dim)


def test_impossible_networks_and_inputs_are_refused() -> None:
    with pytest.raises(ConfigError, match="model.num_nets=3"):
        RddmNet(8, num_nets=3)
    with pytest.raises(ConfigError, match="model.condition=text.*none, input, input_mask"):
        RddmNet(8, condition="text")
    with pytest.raises(ConfigError, match="model.dim_mults"):
        RddmNet(8, ())
    with pytest.raises(ConfigError, match="time_of_single=both"):
        RddmNet(8, time_of_single="both")
    x_t, times, x_in = small_inputs()
    with pytest.raises(ConfigError, match="needs the degraded image"):
        small_net(num_nets=1)(x_t, times)
    with pytest.raises(ConfigError, match="needs a mask"):
        small_net(num_nets=1, condition="input_mask")(x_t, times, x_in)
    with pytest.raises(ValueError, match="image size 16x22 must be a multiple of 4"):
        small_net(num_nets=1)(x_t[..., :22], times, x_in[..., :22])
