"""Networks prepared for sampling: what is the same in every call is computed once."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from rddm_dist.model.blocks import WSConv2d

NetT = TypeVar("NetT", bound=nn.Module)


def folded(net: NetT) -> NetT:
    """A copy for inference whose convolutions hold standardised filters, in the order of memory they are read in.

    It is called like `net`, gives the same outputs up to rounding and has no gradients. Filters larger than a pixel
    are its own, channels last; all else shares memory with `net`. It is a picture of the weights at this moment: fold
    again after they have changed. Standardising before `.bfloat16()` is more exact than after it.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()}
    result = copy.deepcopy(net, memo=dict(shared))
    for module in list(result.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, WSConv2d):
                setattr(module, name, _plain(child))
            elif isinstance(child, nn.Conv2d) and max(child.kernel_size) > 1:
                child.weight = _last(child.weight)
    return result.eval()


def _plain(conv: WSConv2d) -> nn.Conv2d:
    """The convolution with the standardised filters of `conv`."""
    with torch.device("meta"):
        plain = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
    with torch.no_grad():
        plain.weight = _last(conv.standardised())
    plain.bias = conv.bias
    return plain


def _last(weight: torch.Tensor) -> nn.Parameter:
    """(out, in, k, k), channels last in memory."""
    return nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last), requires_grad=False)


def compiled(net: NetT) -> NetT:
    """A folded network compiled by torch.compile; the first call with a new image size takes minutes.

    On a CPU its weights become constants of the compiled code, which lets them be packed for the convolutions once: do
    not change them, and call it without gradients.
    """
    on_cpu = next(net.parameters()).device.type == "cpu"
    return torch.compile(net, options={"freezing": True} if on_cpu else None)  # type: ignore[return-value]
