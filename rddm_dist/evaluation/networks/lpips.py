"""LPIPS 0.1: a learned distance between images, over the features of AlexNet or VGG16.

Zhang, Isola, Efros, Shechtman, Wang: The unreasonable effectiveness of deep features as a perceptual metric, CVPR 2018,
equation 1, with the linear heads of version 0.1. Layers of the trunks have torchvision's names (features.N).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data_pipeline.errors import DataError

# What the authors subtract and divide by, for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10  # added to the length of a feature vector

ALEX_CHANNELS = (64, 192, 384, 256, 256)
VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class LpipsNetwork(nn.Module):
    """The distance over one trunk.

    features: layers, of which each of `taps` (indices of layers) gives features of as many channels as `channels`
    says; smallest: the least height and width of images, in pixels.
    """

    def __init__(self, features: nn.Sequential, *, taps: Sequence[int], channels: Sequence[int], smallest: int) -> None:
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(nn.Conv2d(count, 1, 1, bias=False) for count in channels)
        self.taps, self.smallest = tuple(taps), smallest

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (B, 3, H, W) float32 in [0, 255]  ->  (B,) float64, 0 for equal images.

        sum over taps of mean over pixels of head . (f(x) / |f(x)| - f(y) / |f(y)|)^2, with |.| over channels.
        DataError for images smaller than the trunk takes.
        """
        if min(x.shape[-2:]) < self.smallest:
            height, width = x.shape[-2:]
            raise DataError(
                f"LPIPS over this trunk needs at least {self.smallest}x{self.smallest} pixels, got {width}x{height}"
            )
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for head, one, other in zip(self.heads, self._directions(x), self._directions(y), strict=True):
            weighted = head((one - other).square())  # (B, 1, H', W')
            total = total + weighted.flatten(1).double().mean(dim=1)
        return total

    def _directions(self, images: Tensor) -> list[Tensor]:
        """Features of unit length at every tap.   (B, 3, H, W) in [0, 255]  ->  each (B, C, H', W')"""
        shift, scale = (images.new_tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        x = (images / 127.5 - 1 - shift) / scale
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + EPSILON))
        return found


def make_alex() -> LpipsNetwork:
    """LPIPS over AlexNet's five convolutions."""
    c1, c2, c3, c4, c5 = ALEX_CHANNELS
    layers = [
        nn.Conv2d(3, c1, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(c1, c2, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(c2, c3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(c3, c4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(c4, c5, 3, padding=1),
        nn.ReLU(),
    ]
    return LpipsNetwork(nn.Sequential(*layers), taps=(1, 4, 7, 9, 11), channels=ALEX_CHANNELS, smallest=31)


def make_vgg() -> LpipsNetwork:
    """LPIPS over VGG16, at the end of each of its five stages."""
    layers: list[nn.Module] = []
    taps = []
    inputs = 3
    for stage in VGG_STAGES:
        if layers:
            layers.append(nn.MaxPool2d(2, stride=2))
        for outputs in stage:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        taps.append(len(layers) - 1)
    channels = [stage[-1] for stage in VGG_STAGES]
    return LpipsNetwork(nn.Sequential(*layers), taps=taps, channels=channels, smallest=16)
