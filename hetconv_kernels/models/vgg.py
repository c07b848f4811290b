# SPDX-License-Identifier: Apache-2.0
"""VGG-16 for ImageNet (as in torchvision) and for CIFAR (classifier 512 → 512 → classes)."""

from __future__ import annotations

from torch import Tensor, nn

# Filters of the 13 convolutions; 0 is a 2x2 max pooling.
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class VGG(nn.Module):
    """VGG-16: thirteen 3×3 convolutions in five stages, then fully connected layers.

    Source: Simonyan, Zisserman, ICLR 2015, arXiv 1409.1556. The names in the state dict are
    torchvision's (``features.N``, ``classifier.N``).

    Args:
        classifier: what maps the pooled features to the classes.
        pooled: height and width of the features that ``classifier`` reads, in pixels.
        batch_norm: whether a BatchNorm2d follows each convolution.
        image_channels: 3 for colour images.
    """

    def __init__(
        self, classifier: nn.Module, pooled: int, batch_norm: bool, image_channels: int = 3
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = image_channels
        for filters in _VGG16:
            if filters == 0:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers.append(nn.Conv2d(channels, filters, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(filters))
            layers.append(nn.ReLU(inplace=True))
            channels = filters
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        self.classifier = classifier
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images: [N, image_channels, H, W] -> [N, num_classes]."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg16(num_classes: int = 1000, batch_norm: bool = False, image_channels: int = 3) -> VGG:
    """Builds VGG-16 for 224×224 images, 138,357,544 parameters (torchvision's ``vgg16``).

    Args:
        num_classes: length of the output.
        batch_norm: True is torchvision's ``vgg16_bn``, 138,365,992 parameters.
        image_channels: 3 for colour images.
    """
    classifier = nn.Sequential(
        nn.Linear(512 * 7 * 7, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, num_classes),
    )
    return VGG(classifier, 7, batch_norm, image_channels)


def vgg16_cifar(num_classes: int = 10, batch_norm: bool = True, image_channels: int = 3) -> VGG:
    """Builds VGG-16 for 32×32 images with the classifier 512 → 512 → ``num_classes``.

    This is the variant of the HetConv paper (Singh et al., CVPR 2019, arXiv 1903.04120):
    313.464 M multiply-accumulates in convolutions and fully connected layers.
    """
    classifier = nn.Sequential(
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(512, num_classes),
    )
    return VGG(classifier, 1, batch_norm, image_channels)
