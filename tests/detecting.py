# SPDX-License-Identifier: Apache-2.0
"""A network that cannot be traced whole, as a detector cannot, and whose parts can."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Detector(nn.Module):
    """A backbone, and a tower and a head on two sizes of its maps; the best places are chosen.

    Args:
        norm: makes the normalisation of a number of channels.
    """

    def __init__(self, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)
        )
        self.towers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))]
        )
        self.head = nn.Conv2d(4, 2, 1)
        self.scale = 1.0

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.backbone(x)
        found = []
        for size in (maps, F.max_pool2d(maps, 2)):
            for tower in self.towers:
                found.append(self.head(tower(size)).flatten(2))
        scores = torch.cat(found, 2) * self.scale
        if float(scores.detach().max()) > 1e9:  # no tracer has the value
            raise ValueError("the network has diverged")
        return [one[:, one[0] > one[0].median()] for one in scores]


def detector(**keywords: Any) -> Detector:
    """Makes it with the same random weights each time, in evaluation mode."""
    torch.manual_seed(0)
    model = Detector(**keywords)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.copy_(torch.randn(module.running_mean.shape) / 4)
            module.running_var.copy_(torch.rand(module.running_var.shape) + 0.5)
    return model.eval()


class FrozenBatchNorm2d(nn.Module):
    """torchvision's and detectron2's: all that it has are buffers."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        buffers: dict[str, Any] = self._buffers
        weight, bias, mean, variance = (
            buffers[key].reshape(1, -1, 1, 1)
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * (variance + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)
