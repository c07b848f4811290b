# SPDX-License-Identifier: Apache-2.0
"""Residual networks: 18, 34 and 50 layers for ImageNet, 20, 56 and 110 for CIFAR.

Source: He, Zhang, Ren, Sun, CVPR 2016, arXiv 1512.03385. The ImageNet networks are torchvision's,
name by name; in the bottleneck the 3×3 convolution strides ("v1.5"), which is what gives
ResNet-50 its 4.0892 G multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _conv(channels: int, filters: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, kernel, stride, padding=kernel // 2, bias=False)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut.

    Args:
        channels: input channels.
        width: filters of both convolutions.
        stride: of the first convolution.
        downsample: the shortcut where it is not the identity.
    """

    expansion = 1

    def __init__(
        self, channels: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Adds the residual to the shortcut: [N, C, H, W] -> [N, width, H/stride, W/stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class Bottleneck(nn.Module):
    """A 1×1, a 3×3 and a widening 1×1 convolution and a shortcut.

    Args:
        channels: input channels.
        width: filters of the first two convolutions; the third has four times as many.
        stride: of the 3×3 convolution.
        downsample: the shortcut where it is not the identity.
    """

    expansion = 4

    def __init__(
        self, channels: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Adds the residual to the shortcut: [N, C, H, W] -> [N, 4·width, H/stride, W/stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + shortcut)


class PadShortcut(nn.Module):
    """The shortcut without parameters (the paper's option A): subsample, then zero channels.

    Args:
        stride: of the subsampling.
        missing: channels of zeros to add, half in front and half behind.
    """

    def __init__(self, stride: int, missing: int) -> None:
        super().__init__()
        self.stride = stride
        self.missing = missing

    def forward(self, x: Tensor) -> Tensor:
        """Matches the residual's shape: [N, C, H, W] -> [N, C + missing, H/stride, W/stride]."""
        front = self.missing // 2
        small = x[:, :, :: self.stride, :: self.stride]
        return F.pad(small, (0, 0, 0, 0, front, self.missing - front))


class ResNet(nn.Module):
    """A residual network for ImageNet: 7×7 stem, four stages, one fully connected layer.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: blocks of each of the four stages.
        num_classes: length of the output.
        image_channels: 3 for colour images.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = 64
        for stage, (count, width) in enumerate(zip(layers, (64, 128, 256, 512), strict=True)):
            blocks: list[nn.Module] = []
            for i in range(count):
                stride = 2 if i == 0 and stage > 0 else 1
                filters = width * block.expansion
                shortcut = None
                if stride != 1 or channels != filters:
                    shortcut = nn.Sequential(
                        _conv(channels, filters, 1, stride), nn.BatchNorm2d(filters)
                    )
                blocks.append(block(channels, width, stride, shortcut))
                channels = filters
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images: [N, image_channels, H, W] -> [N, num_classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class CifarResNet(nn.Module):
    """A residual network for 32×32 images: 3×3 stem, stages of 16, 32 and 64 filters.

    The shortcuts have no parameters (`PadShortcut`), as in the paper.

    Args:
        blocks: basic blocks of each of the three stages; the depth is 6·blocks + 2.
        num_classes: length of the output.
        image_channels: 3 for colour images.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, blocks: int, num_classes: int = 10, image_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv(image_channels, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        channels = 16
        for stage, width in enumerate((16, 32, 64)):
            members: list[nn.Module] = []
            for i in range(blocks):
                stride = 2 if i == 0 and stage > 0 else 1
                shortcut = PadShortcut(stride, width - channels) if width != channels else None
                members.append(BasicBlock(channels, width, stride, shortcut))
                channels = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*members))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images: [N, image_channels, H, W] -> [N, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(num_classes: int = 1000, image_channels: int = 3) -> ResNet:
    """Builds ResNet-18 for 224×224 images, 11,689,512 parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, image_channels)


def resnet34(num_classes: int = 1000, image_channels: int = 3) -> ResNet:
    """Builds ResNet-34 for 224×224 images, 21,797,672 parameters."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, image_channels)


def resnet50(num_classes: int = 1000, image_channels: int = 3) -> ResNet:
    """Builds ResNet-50 for 224×224 images, 25,557,032 parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, image_channels)


def resnet20(num_classes: int = 10, image_channels: int = 3) -> CifarResNet:
    """Builds ResNet-20 for 32×32 images, 269,722 parameters."""
    return CifarResNet(3, num_classes, image_channels)


def resnet56(num_classes: int = 10, image_channels: int = 3) -> CifarResNet:
    """Builds ResNet-56 for 32×32 images, 853,018 parameters."""
    return CifarResNet(9, num_classes, image_channels)


def resnet110(num_classes: int = 10, image_channels: int = 3) -> CifarResNet:
    """Builds ResNet-110 for 32×32 images, 1,727,962 parameters."""
    return CifarResNet(18, num_classes, image_channels)
