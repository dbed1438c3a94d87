"""Inception v3 as FID uses it: the TensorFlow weights of 2015 under torchvision's names.

Szegedy et al.: Rethinking the Inception architecture for computer vision, CVPR 2016. The weights that FID was published
with came from another graph than the paper's: averages at the border leave the padding out, and the last block takes a
maximum where the others average. Block and layer names are those of the published conversion to PyTorch (pytorch-fid).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299  # pixels: what the network was trained on
FEATURES, CLASSES = 2048, 1008

Pair = tuple[int, int]


class InceptionV3(nn.Module):
    """Inception v3 up to its pooled features and its logits; 23 850 960 parameters.

    Images are resized to 299x299, bilinear without antialiasing and with half-pixel centres, and scaled to [-1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = Block35(192, pooled=32)
        self.Mixed_5c = Block35(256, pooled=64)
        self.Mixed_5d = Block35(288, pooled=64)
        self.Mixed_6a = Reduction17()
        self.Mixed_6b = Block17(inner=128)
        self.Mixed_6c = Block17(inner=160)
        self.Mixed_6d = Block17(inner=160)
        self.Mixed_6e = Block17(inner=192)
        self.Mixed_7a = Reduction8()
        self.Mixed_7b = Block8(1280, pools_maximum=False)
        self.Mixed_7c = Block8(2048, pools_maximum=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, 3, H, W) float32 in [0, 255]  ->  pooled features (B, 2048), logits (B, 1008), both float32.

        The logits leave out the bias of the last layer, as the code that the Inception Score was published with does.
        """
        x = F.interpolate(images / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) * 2 - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)  # (B, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7a(x)  # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))
        features = x.mean(dim=(2, 3))  # (B, 2048)
        return features, F.linear(features, self.fc.weight)


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation with running statistics, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | Pair, *, stride: int = 1, padding: int | Pair = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)
        self.bn.num_batches_tracked = None  # counts batches of a training; weight files need not hold it

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, inputs, H, W)  ->  (B, outputs, H', W'), not negative."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _same(inputs: int, outputs: int, kernel: int | Pair) -> ConvNorm:
    """A layer of stride 1 that keeps height and width."""
    padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    return ConvNorm(inputs, outputs, kernel, padding=padding)


def _average(x: Tensor) -> Tensor:
    """Means of 3x3 pixels; at the border of those that are there."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Block35(nn.Module):
    """Block at 35x35."""

    def __init__(self, inputs: int, *, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _same(inputs, 64, 1)
        self.branch5x5_1 = _same(inputs, 48, 1)
        self.branch5x5_2 = _same(48, 64, 5)
        self.branch3x3dbl_1 = _same(inputs, 64, 1)
        self.branch3x3dbl_2 = _same(64, 96, 3)
        self.branch3x3dbl_3 = _same(96, 96, 3)
        self.branch_pool = _same(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, inputs, H, W)  ->  (B, 224 + pooled, H, W)"""
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], dim=1)


class Reduction17(nn.Module):
    """From 35x35 to 17x17."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = _same(288, 64, 1)
        self.branch3x3dbl_2 = _same(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 288, H, W)  ->  (B, 768, (H - 1) // 2, (W - 1) // 2)"""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class Block17(nn.Module):
    """Block at 17x17, whose 7x7 convolutions are pairs of 1x7 and 7x1."""

    def __init__(self, *, inner: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = _same(768, 192, 1)
        self.branch7x7_1 = _same(768, inner, 1)
        self.branch7x7_2 = _same(inner, inner, row)
        self.branch7x7_3 = _same(inner, 192, column)
        self.branch7x7dbl_1 = _same(768, inner, 1)
        self.branch7x7dbl_2 = _same(inner, inner, column)
        self.branch7x7dbl_3 = _same(inner, inner, row)
        self.branch7x7dbl_4 = _same(inner, inner, column)
        self.branch7x7dbl_5 = _same(inner, 192, row)
        self.branch_pool = _same(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 768, H, W)  ->  (B, 768, H, W)"""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], dim=1)


class Reduction8(nn.Module):
    """From 17x17 to 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _same(768, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _same(768, 192, 1)
        self.branch7x7x3_2 = _same(192, 192, (1, 7))
        self.branch7x7x3_3 = _same(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 768, H, W)  ->  (B, 1280, (H - 1) // 2, (W - 1) // 2)"""
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class Block8(nn.Module):
    """Block at 8x8, whose 3x3 convolutions end in a 1x3 and a 3x1 side by side."""

    def __init__(self, inputs: int, *, pools_maximum: bool) -> None:
        super().__init__()
        self.pools_maximum = pools_maximum
        self.branch1x1 = _same(inputs, 320, 1)
        self.branch3x3_1 = _same(inputs, 384, 1)
        self.branch3x3_2a = _same(384, 384, (1, 3))
        self.branch3x3_2b = _same(384, 384, (3, 1))
        self.branch3x3dbl_1 = _same(inputs, 448, 1)
        self.branch3x3dbl_2 = _same(448, 384, 3)
        self.branch3x3dbl_3a = _same(384, 384, (1, 3))
        self.branch3x3dbl_3b = _same(384, 384, (3, 1))
        self.branch_pool = _same(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, inputs, H, W)  ->  (B, 2048, H, W)"""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pools_maximum else _average(x)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, dim=1)
