# SPDX-License-Identifier: Apache-2.0
"""Layouts: moves that count channels, said anew for fewer of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F_
from networks import assert_same
from torch import nn

import hetconv_kernels as hk


def halves(x):
    first, second = x.chunk(2, 1)
    return first * second


def split(x):
    first, second = x.split([2, 4], 1)
    return torch.cat([second.relu(), first], 1)


class Net(nn.Module):
    """Six filters, of which 1 and 4 are dead; then what is under test, and a convolution."""

    def __init__(self, middle, width: int) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(width, 2, 3, padding=1)
        for part in (self.conv.weight, self.conv.bias):
            part.data[[1, 4]] = 0
        self.middle = middle

    def forward(self, x):
        return self.last(self.middle(self.conv(x)))


@pytest.mark.parametrize(
    ("middle", "width", "now"),
    [
        (halves, 3, 2),
        (split, 6, 4),
        (lambda x: x[:, :3], 3, 2),
        (lambda x: x[:, 2:5, ::2], 3, 2),
        (lambda x: x[:, -2:], 2, 1),
        (lambda x: torch.narrow(x, 1, 0, 6), 6, 6),
        (lambda x: F_.pad(x, (0, 0, 0, 0, 2, 1)), 9, 4),
        (lambda x: F_.pad(x[:, 2:], (1, 1, 1, 1, 0, 1)), 5, 5),
        (lambda x: torch.cat([x, x[:, 4:]], -3), 8, 5),
        (lambda x: x.permute(0, 1, 3, 2), 6, 4),
        (lambda x: x[..., ::2], 6, 6),
        (lambda x: x * torch.sigmoid(x.mean((2, 3))).view(2, 6, 1, 1), 6, 4),
        (lambda x: x * torch.sigmoid(x.mean((2, 3)))[:, :, None, None], 6, 4),
    ],
    ids=[
        *("chunk", "split", "slice", "slice-both", "slice-end", "narrow", "pad", "pad-both"),
        *("cat", "permute", "ellipsis", "gate-view", "gate-index"),
    ],
)
def test_fewer_channels(middle, width: int, now: int) -> None:
    """Where the number stays, the move was refused and its channels kept; equal in any case."""
    torch.manual_seed(0)
    model, x = Net(middle, width).eval(), torch.randn(2, 3, 6, 6)
    report = hk.compact(model, x)
    last = report.model.get_submodule("last")
    assert last.in_channels == now
    with torch.no_grad():  # a gate that says its batch works for that batch only
        torch.testing.assert_close(report.model(x), model(x))


@pytest.mark.parametrize(
    "flatten",
    [nn.Flatten(), lambda x: x.view(-1, 24), lambda x: x.reshape(x.shape[0], -1)],
    ids=["module", "numbers", "free"],
)
def test_flattening(flatten) -> None:
    class Head(Net):
        def __init__(self) -> None:
            super().__init__(flatten, 1)
            self.last = nn.Linear(24, 3)

    torch.manual_seed(0)
    model, x = Head().eval(), torch.randn(2, 3, 2, 2)
    report = hk.compact(model, x)
    assert report.model.get_submodule("last").in_features == 16
    assert_same(model, report.model, x)


def test_pads_that_keep_their_class_elsewhere() -> None:
    """A padded shortcut: the zeros in front and behind go with the channels they are added to."""

    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 6, 1)
            self.last = nn.Conv2d(6, 2, 1)
            for part in (self.wide.weight, self.wide.bias):
                part.data[[0, 4, 5]] = 0

        def forward(self, x):
            y = self.narrow(x)
            return self.last(self.wide(y) + F_.pad(y, (0, 0, 0, 0, 2, 2)))

    torch.manual_seed(0)
    model, x = Shortcut().eval(), torch.randn(2, 3, 4, 4)
    report = hk.compact(model, x)
    assert report.model.get_submodule("wide").out_channels == 3
    pad = next(n for n in report.model.graph.nodes if "pad" in str(n.target))
    assert pad.args[1] == [0, 0, 0, 0, 1, 0]
    assert_same(model, report.model, x)
