# SPDX-License-Identifier: Apache-2.0
"""DenseNet-121 and DenseNet-201 for ImageNet, as in torchvision, and DenseNet-121 for CIFAR."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BOTTLENECK = 4  # The 1x1 convolution of a layer has this many times the growth rate of filters.


class DenseLayer(nn.Module):
    """One layer of a dense block: BN, ReLU, 1×1, BN, ReLU, 3×3; it returns the new maps only.

    Args:
        channels: input channels.
        growth: filters of the 3×3 convolution.
    """

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, _BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(_BOTTLENECK * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(_BOTTLENECK * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the layer's new maps: [N, C, H, W] -> [N, growth, H, W]."""
        x = self.conv1(self.relu1(self.norm1(x)))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.Module):
    """Layers that each read everything before them.

    Args:
        layers: number of layers.
        channels: input channels.
        growth: maps that each layer adds.
    """

    def __init__(self, layers: int, channels: int, growth: int) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        """Appends every layer's maps: [N, C, H, W] -> [N, C + layers·growth, H, W]."""
        for layer in self.children():
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseNet(nn.Module):
    """A densely connected network for ImageNet.

    Source: Huang, Liu, van der Maaten, Weinberger, CVPR 2017, arXiv 1608.06993. The names in the
    state dict are torchvision's.

    Args:
        layers: layers of each dense block.
        growth: maps that each layer adds.
        stem: filters of the first convolution.
        num_classes: length of the output.
        image_channels: 3 for colour images.
        small_images: whether the stem is a 3×3 convolution that keeps the size, as for CIFAR.
    """

    def __init__(
        self,
        layers: Sequence[int],
        growth: int = 32,
        stem: int = 64,
        num_classes: int = 1000,
        image_channels: int = 3,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(
                    image_channels, stem, kernel, stride, padding=kernel // 2, bias=False
                ),
                norm0=nn.BatchNorm2d(stem),
                relu0=nn.ReLU(inplace=True),
            )
        )
        if not small_images:
            self.features.add_module("pool0", nn.MaxPool2d(3, 2, padding=1))
        channels = stem
        for i, count in enumerate(layers, start=1):
            self.features.add_module(f"denseblock{i}", DenseBlock(count, channels, growth))
            channels += count * growth
            if i == len(layers):
                continue
            transition = OrderedDict(
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(inplace=True),
                conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                pool=nn.AvgPool2d(2, 2),
            )
            self.features.add_module(f"transition{i}", nn.Sequential(transition))
            channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images: [N, image_channels, H, W] -> [N, num_classes]."""
        x = F.relu(self.features(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def densenet121(num_classes: int = 1000, image_channels: int = 3) -> DenseNet:
    """Builds DenseNet-121 for 224×224 images, 7,978,856 parameters."""
    return DenseNet((6, 12, 24, 16), num_classes=num_classes, image_channels=image_channels)


def densenet201(num_classes: int = 1000, image_channels: int = 3) -> DenseNet:
    """Builds DenseNet-201 for 224×224 images, 20,013,928 parameters."""
    return DenseNet((6, 12, 48, 32), num_classes=num_classes, image_channels=image_channels)


def densenet121_cifar(num_classes: int = 10, image_channels: int = 3) -> DenseNet:
    """Builds DenseNet-121 for 32×32 images: 888.35 M multiply-accumulates.

    The widths are those of `densenet121`; the stem is 3×3 and nothing is pooled before the blocks.
    """
    return DenseNet(
        (6, 12, 24, 16),
        num_classes=num_classes,
        image_channels=image_channels,
        small_images=True,
    )
