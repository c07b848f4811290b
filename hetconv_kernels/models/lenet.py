# SPDX-License-Identifier: Apache-2.0
"""LeNet-5 in the 20-50-500-10 form that the pruning papers count (431,080 parameters)."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet5(nn.Module):
    """LeNet-5 as Caffe ships it, which is the one that pruning papers mean by the name.

    It differs from the network of 1998 (6-16-120-84-10, 61,706 parameters): the compression rates
    of ADMM pruning and Play and Prune on MNIST are all relative to these 431,080 parameters.

    Source: LeCun, Bottou, Bengio, Haffner, Proc. IEEE 86(11), 1998; sizes of Caffe's
    ``lenet.prototxt``.

    Args:
        num_classes: length of the output.
        image_channels: 1 for MNIST.
    """

    def __init__(self, num_classes: int = 10, image_channels: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(image_channels, 20, 5),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(50 * 4 * 4, 500),
            nn.ReLU(inplace=True),
            nn.Linear(500, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images: [N, image_channels, 28, 28] -> [N, num_classes]."""
        return self.classifier(self.features(x))


def lenet5(num_classes: int = 10, image_channels: int = 1) -> LeNet5:
    """Builds `LeNet5` for 28×28 images."""
    return LeNet5(num_classes, image_channels)
