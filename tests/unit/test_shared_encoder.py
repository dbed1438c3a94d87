"""The shared-encoder network: which part sees what, gradients under checkpointing, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.model.shared import SharedEncoderNet
from rddm_dist.model.unet import Unet


def make(**settings: object) -> SharedEncoderNet:
    torch.manual_seed(0)
    return SharedEncoderNet(8, (1, 2), **settings)  # type: ignore[arg-type]


def make_inputs() -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    x_t, x_in = torch.randn(2, 2, 3, 8, 12, generator=torch.Generator().manual_seed(1)).unbind(0)
    return x_t, (torch.tensor([3.0, 700.0]), torch.tensor([50.0, 9.0])), x_in


@torch.no_grad()
def test_without_the_residual_decoder_it_is_a_unet() -> None:
    net, (x_t, times, x_in) = make(), make_inputs()
    state = {
        name.replace("final_res_block_2", "final_res_block").replace("final_conv_2", "final_conv"): tensor
        for name, tensor in net.state_dict().items()
        if not name.startswith(("ups_no_skip", "final_res_block_1", "final_conv_1"))
    }
    unet = Unet(8, dim_mults=(1, 2), in_channels=6)
    unet.load_state_dict(state)
    assert torch.equal(net(x_t, times, x_in)[1], unet(torch.cat([x_t, x_in], dim=1), times[0]))


@torch.no_grad()
def test_the_residual_is_a_function_of_the_middle_alone() -> None:
    """Other skips, the same middle: the residual stays and the second output moves."""
    net, (x_t, times, x_in) = make(), make_inputs()
    residual, rest = net(x_t, times, x_in)
    net.init_conv.register_forward_hook(lambda module, args, output: output + 1)
    middle: list[Tensor] = []
    hook = net.mid_block2.register_forward_hook(lambda module, args, output: middle.append(output))
    moved_residual, _ = net(x_t, times, x_in)
    hook.remove()
    assert not torch.equal(moved_residual, residual)
    net.mid_block2.register_forward_hook(lambda module, args, output: middle[0])
    other_residual, other_rest = net(x_t.flip(0), times, x_in)
    assert torch.equal(other_residual, moved_residual) and not torch.equal(other_rest, rest)


@torch.no_grad()
def test_both_outputs_are_told_the_time_of_the_residual() -> None:
    net, (x_t, (first, second), x_in) = make(), make_inputs()
    outputs = net(x_t, (first, second), x_in)
    same, moved = net(x_t, (first, second + 100), x_in), net(x_t, (first + 100, second), x_in)
    for i in range(2):
        assert torch.equal(same[i], outputs[i]) and not torch.equal(moved[i], outputs[i])


def test_activation_checkpointing_changes_no_gradient_and_no_key() -> None:
    gradients, keys = [], []
    for activation_checkpointing in (False, True):
        net = make(activation_checkpointing=activation_checkpointing)
        torch.stack([output.square().mean() for output in net(*make_inputs())]).sum().backward()
        gradients.append([p.grad for p in net.parameters()])
        keys.append(list(net.state_dict()))
    assert keys[0] == keys[1] and all(gradient is not None for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_images_and_settings_that_do_not_fit_are_refused() -> None:
    x_t, times, x_in = make_inputs()
    with pytest.raises(ConfigError, match="model.condition=text"):
        make(condition="text")
    with pytest.raises(ConfigError, match="needs the degraded image"):
        make()(x_t, times)
    with pytest.raises(ConfigError, match="needs a mask"):
        make(condition="input_mask")(x_t, times, x_in)
    with pytest.raises(ValueError, match="image size 8x11 must be a multiple of 2"):
        make()(x_t[..., :11], times, x_in[..., :11])
