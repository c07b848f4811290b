# SPDX-License-Identifier: Apache-2.0
"""Interfaces: who reads a layer's channels, and where a width cannot change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compressing import tiny
from torch import nn

from hetconv_kernels import models
from hetconv_kernels.compress.interfaces import Interfaces, Reader, find_interfaces


def interfaces(model: nn.Module, *shape: int) -> Interfaces:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return find_interfaces(model, layers, torch.randn(*shape))


def test_a_chain_with_a_flatten() -> None:
    found = interfaces(tiny(), 2, 5, 6, 6)
    assert found.readers == {
        "0": (Reader("3", 1),),
        "3": (Reader("8", 4),),
        "8": (Reader("10", 1),),
    }
    assert "output of the network" in found.fixed["10"]


class Branches(nn.Module):
    """Everything that can happen to a width, once."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("stem", "one", "two", "joined", "summed", "twice", "normed"):
            setattr(self, name, nn.Conv2d(4, 4, 1))
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.last = nn.Conv2d(8, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.pooled = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 2)
        self.unused = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.depthwise(self.stem(x)))  # read by two, through a depthwise layer
        x = self.joined(self.one(x)) + self.summed(self.two(x))
        x = self.twice(self.twice(x))
        x = self.norm(self.normed(x))
        x = torch.cat([x, x], 1)
        return self.head(self.pooled(self.last(x)).mean((2, 3)))


def test_branches_sums_and_joins() -> None:
    found = interfaces(Branches(), 2, 4, 5, 5)
    assert found.readers == {
        "stem": (Reader("one", 1), Reader("two", 1)),
        "one": (Reader("joined", 1),),
        "two": (Reader("summed", 1),),
        "last": (Reader("pooled", 1),),
        "pooled": (Reader("head", 1),),
    }
    reasons = {
        "joined": "residual sum",
        "summed": "residual sum",
        "twice": "called 2 times",
        "normed": "GroupNorm",
        "head": "output of the network",
        "unused": "called 0 times",
        "depthwise": "channels are those of its input",
    }
    for name, reason in reasons.items():
        assert reason in found.fixed[name], name


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [
        (models.resnet20(), (1, 3, 32, 32), 9),  # the first convolution of each block
        (models.resnet50(), (1, 3, 64, 64), 33),  # the stem, and two of each block
        (models.vgg16_cifar(), (1, 3, 32, 32), 14),  # 13 convolutions and one linear layer
        (models.lenet5(), (1, 1, 28, 28), 3),
    ],
    ids=["resnet20", "resnet50", "vgg16", "lenet5"],
)
def test_networks_of_the_papers(model: nn.Module, shape: tuple[int, ...], count: int) -> None:
    assert len(interfaces(model, *shape).readers) == count


def test_a_network_that_cannot_be_traced_keeps_its_widths() -> None:
    class Branching(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    found = interfaces(Branching(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)), 1, 2, 3, 3)
    assert not found.readers
    assert "cannot be traced" in found.fixed["0"]


def test_modes_are_left_as_they_were() -> None:
    model = tiny().train()
    model[1].eval()
    interfaces(model, 2, 5, 6, 6)
    assert model.training
    assert not model[1].training
    assert model[1].num_batches_tracked == 0
