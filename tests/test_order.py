# SPDX-License-Identifier: Apache-2.0
"""order: groups become contiguous, the function stays, and no gather is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import NETWORKS, assert_same, interleaved, live_norms
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.graph.channels import Channels
from hetconv_kernels.graph.order import order
from hetconv_kernels.graph.trace import trace
from hetconv_kernels.nn import HetConv2d, SelfGroupConv2d


def ordered(model: nn.Module, x: torch.Tensor):
    traced = trace(model, x)
    before = [n.op for n in traced.graph.nodes]
    replaced, done = order(Channels(traced))
    assert [n.op for n in traced.graph.nodes] == before, "no step is added"
    return traced.eval(), replaced, done


def test_the_example_of_the_module() -> None:
    """Interleaved groups of p=2 on four channels: the order (0, 2, 1, 3) makes them blocked."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        HetConv2d(4, 4, 3, padding=1, p=2, order="interleaved"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        HetConv2d(4, 4, 3, padding=1, p=2, order="interleaved"),
        nn.Conv2d(4, 2, 1),
    ).eval()
    live_norms(model)
    x = torch.randn(2, 3, 6, 6)
    traced, replaced, done = ordered(model, x)
    assert {d.layers for d in done} == {("0",), ("1",), ("5",)}
    for name in ("1", "5"):
        assert (type(replaced[name]), replaced[name].order) == (HetConv2d, "blocked")
    assert torch.equal(replaced["2"].running_mean, model[2].running_mean[[0, 2, 1, 3]])
    assert torch.equal(replaced["6"].weight, model[6].weight[:, [0, 2, 1, 3]])
    assert_same(model, traced, x)


@pytest.mark.parametrize("name", ["dncnn", "resnet20", "densenet", "mobilenet"])
def test_networks_with_interleaved_groups(name: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    live_norms(model)
    model = interleaved(model)
    x = torch.randn(2, *shape)
    traced, _, done = ordered(model, x)
    assert_same(model, traced, x)
    assert bool(done) is (name != "mobilenet")  # its depthwise layers have nothing to put in order
    for moved in done:
        assert moved.runs[1] < moved.runs[0]


def test_residual_operands_move_together() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.het = HetConv2d(8, 8, 3, padding=1, p=4, order="interleaved")
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            y = self.stem(x)
            return self.head(self.het(y) + y)

    torch.manual_seed(0)
    model, x = Sum().eval(), torch.randn(2, 3, 5, 5)
    traced, replaced, done = ordered(model, x)
    assert [d.layers for d in done] == [("stem", "het")]
    assert replaced["het"].order == "blocked"
    assert_same(model, traced, x)


def test_self_grouped_layers_and_flattening() -> None:
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    keep = generator.random((4, 16)) < 0.4
    labels = generator.integers(0, 4, 12)
    conv = SelfGroupConv2d.from_groups(nn.Conv2d(16, 12, 3, padding=1), labels, keep)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), conv, nn.Flatten(), nn.Linear(12 * 16, 5)).eval()
    x = torch.randn(2, 3, 4, 4)
    traced, replaced, done = ordered(model, x)
    assert len(done) == 2
    labels = [int(np.flatnonzero([f in g.filters for g in replaced["1"].support.groups])[0])
              for f in range(12)]  # fmt: skip
    assert labels == sorted(labels), "the filters of a group are neighbours"
    assert_same(model, traced, x)


def test_depthwise_layers_move_with_their_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        HetConv2d(8, 4, 3, padding=1, p=2, order="interleaved"),
    ).eval()
    x = torch.randn(2, 3, 5, 5)
    traced, replaced, done = ordered(model, x)
    assert done[0].layers == ("0", "1")
    assert (type(replaced["1"]), replaced["1"].groups) == (nn.Conv2d, 8)
    assert_same(model, traced, x)


class Kept(nn.Module):
    def __init__(self, middle, width=8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.middle = middle
        self.het = HetConv2d(width, 8, 3, padding=1, p=2, order="interleaved")

    def forward(self, x):
        return self.het(self.middle(self.stem(x)))


@pytest.mark.parametrize(
    ("middle", "width"),
    [
        (nn.Conv2d(8, 8, 1, groups=2), 8),
        (nn.GroupNorm(2, 8), 8),
        (lambda x: x[:, :6], 6),
    ],
    ids=["grouped", "group-norm", "slice"],
)
def test_what_counts_on_the_order_keeps_it(middle, width: int) -> None:
    torch.manual_seed(0)
    model, x = Kept(middle, width).eval(), torch.randn(2, 3, 5, 5)
    traced, replaced, done = ordered(model, x)
    assert (replaced, done) == ({}, ())
    assert_same(model, traced, x)


def test_input_and_output_keep_their_order() -> None:
    model = nn.Sequential(HetConv2d(8, 8, 3, p=2, order="interleaved")).eval()
    _, replaced, _ = ordered(model, torch.randn(1, 8, 4, 4))
    assert replaced == {}


def test_concatenations_move_their_parts() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.het = HetConv2d(8, 6, 3, padding=1, p=2, order="interleaved")

        def forward(self, x):
            return self.het(torch.cat([self.a(x), self.b(x)], 1))

    torch.manual_seed(0)
    model, x = Cat().eval(), torch.randn(2, 3, 5, 5)
    traced, _, done = ordered(model, x)
    assert [d.layers for d in done] == [("a",), ("b",)]
    assert_same(model, traced, x)


def test_irregular_and_dense_layers_have_no_order() -> None:
    mask = np.random.default_rng(0).random((8, 8, 3, 3)) < 0.4
    layer = hk.nn.SupportConv2d(8, 8, 3, support=hk.Support.from_mask(mask))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.Conv2d(8, 2, 1)).eval()
    assert ordered(model, torch.randn(1, 3, 5, 5))[1] == {}
