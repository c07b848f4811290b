# SPDX-License-Identifier: Apache-2.0
"""Channels: which hang together, through everything that passes them on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F_
from networks import network
from torch import nn

from hetconv_kernels.graph.channels import Channels
from hetconv_kernels.graph.trace import trace


class Net(nn.Module):
    """conv makes four channels of three; what is under test sees them; then comes another conv."""

    def __init__(self, middle, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(channels, 2, 1)
        self.middle = middle

    def forward(self, x):
        return self.last(self.middle(self.conv(x)))


def swapped(x):
    first, second = x.chunk(2, 1)
    return torch.cat([second, first], 1)


def channels_of(model: nn.Module, shape=(2, 3, 4, 4)) -> Channels:
    return Channels(trace(model.eval(), torch.randn(*shape)))


def seen(found: Channels, name: str = "last") -> list[int]:
    """Says which filters of conv a layer reads, by their numbers; 9 is something else."""
    nodes = {str(n.target): n for n in found.layers}
    made = found.of(nodes["conv"]).tolist()
    read = found.of(found.reader(nodes[name])).tolist()
    return [made.index(c) if c in made else 9 for c in read]


def test_the_example_of_the_module() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.conv2(F_.relu(self.conv1(x))) + x

    found = channels_of(Block(), (1, 2, 3, 3))
    assert found.count == 4
    first, second = found.layers
    source = found.reader(first)
    assert found.of(second).tolist() == found.of(source).tolist()
    assert not set(found.of(first)) & set(found.frozen)
    assert set(found.of(second)) <= set(found.frozen)
    assert sorted(found.members()[int(found.of(second)[1])]) == [("conv2", 1)]


@pytest.mark.parametrize(
    ("middle", "read"),
    [
        (nn.Identity(), [0, 1, 2, 3]),
        (nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.AvgPool2d(2)), [0, 1, 2, 3]),
        (lambda x: torch.cat([x, x.sigmoid()], 1), [0, 1, 2, 3, 0, 1, 2, 3]),
        (lambda x: x[:, 1:3], [1, 2]),
        (swapped, [2, 3, 0, 1]),
        (lambda x: x.split([1, 3], 1)[1], [1, 2, 3]),
        (lambda x: F_.pad(x, (0, 0, 0, 0, 1, 2)), [9, 0, 1, 2, 3, 9, 9]),
        (lambda x: F_.pad(x, (1, 1, 1, 1)), [0, 1, 2, 3]),
        (nn.ChannelShuffle(2), [0, 2, 1, 3]),
        (lambda x: x.permute(0, 1, 3, 2), [0, 1, 2, 3]),
        (lambda x: x * 2 + 1, [0, 1, 2, 3]),
        (lambda x: x[:, :, ::2, ::2], [0, 1, 2, 3]),
        (lambda x: x * x.mean((2, 3), keepdim=True), [0, 1, 2, 3]),
        (lambda x: F_.interpolate(x, scale_factor=2), [0, 1, 2, 3]),
    ],
)
def test_channels_are_passed_on(middle, read: list[int]) -> None:
    found = channels_of(Net(middle, len(read)))
    assert seen(found) == read


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: x.softmax(1),
        nn.LayerNorm([4, 4, 4]),
        lambda x: F_.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
        lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1),
        lambda x: torch.cumsum(x, 1),
    ],
    ids=["softmax", "layer-norm", "pixel-shuffle", "mean", "cumsum"],
)
def test_what_mixes_channels_freezes_them(middle) -> None:
    found = channels_of(Net(middle))
    assert set(found.of(next(iter(found.layers)))) <= set(found.frozen)


@pytest.mark.parametrize(
    ("middle", "frozen"),
    [
        (lambda x: x[:, 1:3].repeat(1, 2, 1, 1), True),
        (nn.ChannelShuffle(2), True),
        (lambda x: x.view(2, 2, 2, 4, 4).transpose(1, 2).reshape(2, 4, 4, 4), True),
        (swapped, False),
        (lambda x: torch.cat(x.chunk(2, 1), 1), True),
        (lambda x: F_.pad(x[:, :2], (0, 0, 0, 0, 1, 1)), False),
    ],
    ids=["repeat", "shuffle", "views", "chunk", "chunk-as-a-list", "slice-and-pad"],
)
def test_moves_that_cannot_be_said_anew_freeze(middle, frozen: bool) -> None:
    found = channels_of(Net(middle))
    made = found.of(next(iter(found.layers)))
    assert bool(set(made) & set(found.frozen)) is frozen


@pytest.mark.parametrize(
    "flatten",
    [nn.Flatten(), lambda x: x.view(2, 16), lambda x: x.reshape(x.size(0), -1)],
    ids=["flatten", "view", "reshape"],
)
def test_a_flattened_channel_is_its_pixels(flatten) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Linear(16, 2)
            self.flatten = flatten

        def forward(self, x):
            return self.last(self.flatten(self.conv(x)))

    assert seen(channels_of(Head(), (2, 3, 2, 2))) == np.repeat(range(4), 4).tolist()


def test_padded_shortcuts_tie_the_channels_in_the_middle() -> None:
    model, x = network("resnet20")
    found = Channels(trace(model, x))
    layers = {str(n.target): n for n in found.layers}
    stem, wide = found.of(layers["conv1"]), found.of(layers["layer2.0.conv2"])
    assert wide[8:24].tolist() == stem.tolist()
    assert not set(wide[:8]) & set(stem)


def test_sums_of_unequal_widths_are_not_guessed_at() -> None:
    found = channels_of(Net(lambda x: x + x[:, :1]))
    assert set(found.of(next(iter(found.layers)))) <= set(found.frozen)


def test_a_lone_parameter_freezes_what_it_meets() -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__(lambda x: x * self.scale)
            self.scale = nn.Parameter(torch.rand(1, 4, 1, 1))

    found = channels_of(Scaled())
    assert set(found.of(next(iter(found.layers)))) <= set(found.frozen)


def shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().reshape(n, c, h, w)


def normed(x):
    return F_.batch_norm(x, torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize(
    ("middle", "read", "reason"),
    [
        (shuffled, [0, 2, 1, 3], "counts channels"),
        (normed, [0, 1, 2, 3], "may mix its channels"),
        (nn.GroupNorm(2, 4), [0, 1, 2, 3], "normalises groups of channels"),
    ],
    ids=["shuffle", "batch norm as a function", "group norm"],
)
def test_channels_are_followed_through_what_nothing_is_taken_out_of(middle, read, reason) -> None:
    found = channels_of(Net(middle))
    assert seen(found) == read
    fixed = found.bound() | found.frozen
    assert all(reason in fixed[int(c)] for c in found.of(next(iter(found.layers))))


def test_five_dimensions_that_mix_pixels_with_channels_end_the_way() -> None:
    def mixed(x):
        n, c, h, w = x.shape
        return x.view(n, 2, 2, h, w).transpose(2, 4).reshape(n, c, h, w)

    assert seen(channels_of(Net(mixed))) == [9] * 4


def tokens(x):
    y = x.flatten(2).transpose(1, 2)
    return torch.cat([y[:, :1], y], 1)[:, 1:].transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    "middle",
    [
        tokens,
        lambda x: F_.relu(x.flatten(2)).view(x.shape),
        lambda x: x.flatten(2).softmax(1).view(x.shape),
        lambda x: (x.flatten(2) + x.view(2, 4, 16).flip(1)).view(x.shape),
    ],
    ids=["tokens", "relu", "softmax", "sum"],
)
def test_what_reads_channels_in_another_rank_keeps_them(middle) -> None:
    found = channels_of(Net(middle))
    assert set(found.of(next(iter(found.layers)))) <= set(found.frozen)


def test_an_output_of_another_rank_keeps_its_channels() -> None:
    found = channels_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2)))
    assert set(found.frozen.values()) >= {"it is a channel of the output"}
    assert set(found.of(next(iter(found.layers)))) <= set(found.frozen)
