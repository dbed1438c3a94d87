"""The weights of the reference numbers: a formula by position in the state dict."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def fill(module: nn.Module, how: str) -> nn.Module:
    """The weights of the reference numbers, by position in the state dict."""
    norms = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.GroupNorm)}
    with torch.no_grad():
        for k, (name, tensor) in enumerate(module.state_dict().items()):
            is_gain = name in norms or name.split(".")[-1] == "g"
            if how == "A":
                values = 0.05 * np.sin(0.7 * np.arange(tensor.numel()) + 1.3 * k).reshape(tuple(tensor.shape)) + is_gain
            else:
                z = np.random.RandomState(1000 + k).standard_normal(tuple(tensor.shape))
                scale = 0.1 if is_gain or tensor.ndim == 1 else 1 / np.sqrt(np.prod(tensor.shape[1:]))
                values = z * scale + is_gain
            tensor.copy_(torch.from_numpy(values.astype(np.float32)))
    return module
