# SPDX-License-Identifier: Apache-2.0
"""Interfaces: who reads a layer's channels, and where a width cannot change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compressing import tiny
from torch import nn

from hetconv_kernels import models
from hetconv_kernels.compression.interfaces import Interfaces, Reader, find_interfaces


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
    assert "channel of the output" in found.fixed["10"]


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
        "joined": "residual sum, with that of 'summed'",
        "summed": "residual sum, with that of 'joined'",
        "twice": "called 2 times",
        "normed": "norm normalises groups of channels, which go together",
        "head": "channel of the output",
        "unused": "called 0 times",
        "depthwise": "channels are those of its input",
    }
    for name, reason in reasons.items():
        assert reason in found.fixed[name], name


class Joins(nn.Module):
    """Concatenations, a sum with itself, and a network that only torch.export can trace."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("one", "two", "alone", "turned"):
            setattr(self, name, nn.Conv2d(4, 4, 1))
        self.act = nn.ReLU()
        self.wide = nn.Conv2d(8, 4, 1)
        self.norm = nn.InstanceNorm2d(4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.alone(x))
        if x.shape[0] == 0:  # torch.fx cannot see this
            return x
        x = self.wide(torch.cat([self.one(x), self.two(x)], 1))
        x = self.turned(x)
        return self.last(self.norm(x + x.flip(1)))


def test_joins_and_a_second_way_to_trace() -> None:
    found = interfaces(Joins(), 2, 4, 5, 5)
    assert found.readers == {
        "alone": (Reader("one", 1), Reader("two", 1)),
        "wide": (Reader("turned", 1),),
    }
    for name in ("one", "two"):
        assert "concatenation that 'wide' reads" in found.fixed[name]
    assert "may mix its channels" in found.fixed["turned"]


@pytest.mark.parametrize(("parameters", "widths"), [(1, {"0": (Reader("2", 1),)}), (4, {})])
def test_a_prelu_of_one_parameter_is_the_same_for_all(parameters: int, widths: object) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.PReLU(parameters), nn.Conv2d(4, 2, 1))
    assert interfaces(model, 1, 2, 3, 3).readers == widths


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


class Shortcuts(nn.Module):
    """A residual stage whose first shortcut is a convolution, called before or after the others."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        for name in ("one", "two", "three", "four"):
            setattr(self, name, nn.Conv2d(4, 4, 1))
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4 * 9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(x) if self.first else x
        y = self.two(F.relu(self.one(x)))
        x = F.relu(y + (shortcut if self.first else self.shortcut(x)))
        x = F.relu(self.four(F.relu(self.three(x))) + x)
        return self.head(x.flatten(1))


@pytest.mark.parametrize("first", [True, False], ids=["shortcut first", "shortcut last"])
def test_a_sum_is_read_behind_its_deepest_summand(first: bool) -> None:
    found = interfaces(Shortcuts(first), 2, 4, 3, 3)
    assert found.behind == {"two": (Reader("three", 1),), "four": (Reader("head", 9),)}
    assert found.readers == {"one": (Reader("two", 1),), "three": (Reader("four", 1),)}
    assert "residual sum" in found.fixed["shortcut"]


def test_a_layer_is_behind_none_of_those_whose_width_can_change() -> None:
    assert interfaces(tiny(), 2, 5, 6, 6).behind == {}


class Ways(nn.Module):
    """What channels pass through with their width as it was, and are still themselves."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.norm = nn.GroupNorm(2, 4)
        self.wide, self.last = nn.Conv2d(8, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        if self.way == "gate":
            z = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
            return self.last(y * torch.sigmoid(z))
        if self.way == "batch_norm":
            return self.last(F.relu(F.batch_norm(y, self.mean, self.var)))
        if self.way == "group_norm":
            return self.last(self.norm(y))
        if self.way == "branches":
            return self.last(F.relu(y + self.two(x)))
        both = torch.cat([y, self.two(x)], 1)
        if self.way == "shuffle":
            n, c, h, w = both.shape
            both = both.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.wide(F.relu(both))


ONE, TWO = (0, 1, 2, 3, -1, -1, -1, -1), (-1, -1, -1, -1, 0, 1, 2, 3)


@pytest.mark.parametrize(
    ("way", "behind"),
    [
        ("gate", {"one": (Reader("squeeze", 1), Reader("last", 1))}),  # and not what excites
        ("batch_norm", {"one": (Reader("last", 1),)}),
        ("group_norm", {"one": (Reader("last", 1),)}),
        ("branches", {"one": (Reader("last", 1),), "two": (Reader("last", 1),)}),
        ("cat", {"one": (Reader("wide", 1, ONE),), "two": (Reader("wide", 1, TWO),)}),
        (
            "shuffle",
            {
                "one": (Reader("wide", 1, (0, -1, 1, -1, 2, -1, 3, -1)),),
                "two": (Reader("wide", 1, (-1, 0, -1, 1, -1, 2, -1, 3)),),
            },
        ),
    ],
)
def test_layers_are_followed_through_what_keeps_its_width(way: str, behind: dict) -> None:
    found = interfaces(Ways(way), 2, 3, 3, 3)
    assert found.behind == behind
    assert not set(behind) & set(found.readers)


def test_channels_that_the_output_shows_are_behind_nothing() -> None:
    class Features(nn.Module):
        """Gives the sum of its first block too, as backbones of detectors do."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = F.relu(self.one(x) + self.two(x))
            return x, self.head(x)

    assert interfaces(Features(), 2, 4, 3, 3).behind == {}


def test_filters_of_a_reader_are_by_number_or_in_order() -> None:
    assert Reader("a", 2).of_filters(3).tolist() == [0, 0, 1, 1, 2, 2]
    assert Reader("a", 1, ONE).of_filters(4).tolist() == list(ONE)
