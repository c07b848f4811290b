# SPDX-License-Identifier: Apache-2.0
"""DigitsNet: a small plain network for the 8×8 digits that scikit-learn ships."""

from __future__ import annotations

from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Four 3×3 convolutions with BatchNorm in two stages, and two fully-connected layers.

    No paper's: small enough that every method trains in seconds, with widths that are multiples
    of 8 and layers of each kind that the methods treat differently.

    Args:
        width: filters of the first stage; the second has twice as many.
        num_classes: length of the output.
    """

    def __init__(self, width: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for filters in (width, width, 0, 2 * width, 2 * width, 0):
            if filters == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            conv = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(filters), nn.ReLU()]
            channels = filters
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * 4, 64), nn.ReLU(), nn.Linear(64, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images: [N, 1, 8, 8] -> [N, num_classes]."""
        return self.classifier(self.features(x))


def digits_net(width: int = 32, num_classes: int = 10) -> DigitsNet:
    """Builds `DigitsNet`."""
    return DigitsNet(width, num_classes)
