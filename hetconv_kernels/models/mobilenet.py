# SPDX-License-Identifier: Apache-2.0
"""MobileNet (v1): depthwise 3×3 and pointwise 1×1 convolutions in turn."""

from __future__ import annotations

from torch import Tensor, nn

# (filters, stride) of the thirteen separable convolutions at width 1.
_SEPARABLE = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


def _conv_bn_relu(
    channels: int, filters: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]


class MobileNet(nn.Module):
    """MobileNet v1 for ImageNet: 4,231,976 parameters and 569 M multiply-accumulates at width 1.

    Source: Howard et al., 2017, arXiv 1704.04861.

    Args:
        num_classes: length of the output.
        width: multiplies every number of filters (the paper's α); rounded down, at least 8.
        image_channels: 3 for colour images.
    """

    def __init__(
        self, num_classes: int = 1000, width: float = 1.0, image_channels: int = 3
    ) -> None:
        super().__init__()
        channels = max(8, int(32 * width))
        blocks = [nn.Sequential(*_conv_bn_relu(image_channels, channels, 3, stride=2))]
        for full, stride in _SEPARABLE:
            filters = max(8, int(full * width))
            depthwise = _conv_bn_relu(channels, channels, 3, stride, groups=channels)
            blocks.append(nn.Sequential(*depthwise, *_conv_bn_relu(channels, filters, 1)))
            channels = filters
        self.features = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images: [N, image_channels, H, W] -> [N, num_classes]."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def mobilenet(num_classes: int = 1000, width: float = 1.0, image_channels: int = 3) -> MobileNet:
    """Builds `MobileNet` for 224×224 images."""
    return MobileNet(num_classes, width, image_channels)
