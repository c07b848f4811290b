# SPDX-License-Identifier: Apache-2.0
"""fold: what becomes part of a convolution, and what must not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F_
from networks import NETWORKS, assert_same, kinds, live_norms
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.graph.fold import fold
from hetconv_kernels.graph.trace import trace
from hetconv_kernels.nn import FusedConv2d, GroupedConv2d, HetConv2d, SupportLinear


class Net(nn.Module):
    """conv and, where the code under test uses them, bn and a second conv."""

    def __init__(self, code, conv=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.code = code
        self.conv = nn.Conv2d(4, 4, 3, padding=1) if conv is None else conv
        self.other = nn.Conv2d(4, 4, 1)
        self.bn, self.bn1 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        live_norms(self)

    def forward(self, x):
        return self.code(self, x)


def folded(model: nn.Module, x: torch.Tensor | None = None):
    x = torch.randn(2, 4, 5, 5) if x is None else x
    model.eval()
    traced = trace(model, x)
    report = fold(traced)
    assert_same(model, traced, x)
    return traced, {f.name: f.parts for f in report.fused}, dict(report.left)


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (lambda m, x: m.conv(x), "conv"),
        (lambda m, x: m.bn(m.conv(x)), "conv + bn"),
        (lambda m, x: m.relu(m.bn(m.conv(x))), "conv + bn + relu"),
        (lambda m, x: F_.relu6(m.bn(m.conv(x)) + x), "conv + bn + residual + relu6"),
        (lambda m, x: F_.silu(x + m.conv(x)), "conv + residual + silu"),
        (lambda m, x: torch.add(m.conv(x), x).relu(), "conv + residual + relu"),
        (lambda m, x: F_.hardtanh(m.conv(x), 0, 6), "conv + relu6"),
        (lambda m, x: F_.gelu(m.conv(x)), "conv + gelu"),
        (lambda m, x: F_.max_pool2d(m.conv(x), 2), "conv + maxpool"),
        (
            lambda m, x: F_.max_pool2d(m.relu(m.bn(m.conv(x))), 3, 2, 1),
            "conv + bn + relu + maxpool",
        ),
        (lambda m, x: nn.MaxPool2d((3, 2), (1, 2))(m.conv(x) + x), "conv + residual + maxpool"),
        # What must stay apart:
        (lambda m, x: F_.max_pool2d(m.conv(x), 2, ceil_mode=True), "conv"),
        (lambda m, x: F_.max_pool2d(m.conv(x), 2, dilation=2), "conv"),
        (lambda m, x: F_.max_pool2d(m.conv(x), 2, return_indices=True)[0], "conv"),
        (lambda m, x: F_.max_pool2d(y := m.conv(x), 3, 1, 1) + y, "conv"),
        (lambda m, x: F_.max_pool2d(F_.max_pool2d(m.conv(x), 2), 2), "conv + maxpool"),
        (lambda m, x: F_.max_pool2d(m.conv(x), 2).relu(), "conv + maxpool"),
        (lambda m, x: F_.avg_pool2d(m.conv(x), 2), "conv"),
        (lambda m, x: F_.gelu(m.conv(x), approximate="tanh"), "conv"),
        (lambda m, x: F_.hardtanh(m.conv(x)), "conv"),
        (lambda m, x: torch.add(m.conv(x), x, alpha=2), "conv"),
        (lambda m, x: m.conv(x) + x.mean((2, 3), keepdim=True), "conv"),
        (lambda m, x: m.conv(x) + 1, "conv"),
        (lambda m, x: (y := m.conv(x)) + y, "conv"),
        (lambda m, x: m.relu(y := m.conv(x) * 1) + y, "conv"),
        (lambda m, x: (y := m.bn(m.conv(x))).relu() * y, "conv + bn"),
        (lambda m, x: m.bn1(m.bn(m.conv(x))), "conv + bn"),
        (lambda m, x: m.bn(m.conv(x).relu()), "conv + relu"),
        (lambda m, x: m.conv(x).relu() + x, "conv + relu"),
        (lambda m, x: m.conv(x).sigmoid(), "conv"),
    ],
)
def test_patterns(code, parts: str) -> None:
    traced, fused, _ = folded(Net(code))
    assert fused == {"conv": parts}
    assert len(kinds(traced, FusedConv2d)) == 1


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        lambda: HetConv2d(4, 4, 3, padding=1, p=2),
        lambda: HetConv2d(4, 4, 3, padding=1, p=2).freeze(),
        lambda: GroupedConv2d(4, 4, 3, padding=1, groups=2),
    ],
    ids=["depthwise", "het", "frozen", "grouped"],
)
def test_every_kind_of_convolution(conv) -> None:
    _, fused, _ = folded(Net(lambda m, x: F_.relu(m.bn(m.conv(x)) + x), conv()))
    assert fused == {"conv": "conv + bn + residual + relu"}


def two(m, x):
    return m.relu(m.bn(m.conv(x)) + m.bn1(m.other(x)))


def test_the_layer_with_a_support_takes_the_sum() -> None:
    _, fused, _ = folded(Net(two))
    assert fused == {"conv": "conv + bn + residual + relu", "other": "conv + bn"}
    model = Net(lambda m, x: m.relu(m.bn(m.other(x)) + m.bn1(m.conv(x))), HetConv2d(4, 4, 1, p=1))
    assert folded(model)[1] == {"other": "conv + bn", "conv": "conv + bn + residual + relu"}


def test_a_sum_with_a_sum() -> None:
    def code(m, x):
        return m.relu(m.conv(x) + m.relu(m.other(x) + x))

    _, fused, _ = folded(Net(code))
    assert fused == {"conv": "conv + residual + relu", "other": "conv + residual + relu"}


def test_an_input_that_is_changed_in_place_later_is_read_before() -> None:
    def code(m, x):
        y = x * 1
        z = m.conv(y)
        return z + m.relu(y)  # the ReLU overwrites y after conv has read it

    traced, fused, _ = folded(Net(code))
    assert fused == {"conv": "conv + residual"}
    assert not any(module.inplace for module in kinds(traced, nn.ReLU))


@pytest.mark.parametrize(
    ("code", "conv", "name", "reason"),
    [
        (lambda m, x: m.conv(m.conv(x)), None, "conv", "it is called 2 times"),
        (
            lambda m, x: m.conv(x),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "conv",
            "its padding mode is reflect",
        ),
        (
            lambda m, x: m.bn(m.conv(x)),
            nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
            "conv",
            "it is parametrised",
        ),
        (lambda m, x: m.bn(x), None, "bn", "it does not follow a convolution alone"),
    ],
    ids=["twice", "reflect", "parametrised", "bn-first"],
)
def test_what_is_left_says_why(code, conv, name: str, reason: str) -> None:
    _, _, left = folded(Net(code, conv))
    assert reason in left[name]


def test_single_images_are_left() -> None:
    _, fused, left = folded(Net(lambda m, x: m.conv(x[0])[None]))
    assert fused == {}
    assert left["conv"] == "its input is a single image"


def test_dropout_and_identity_go() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(), nn.Identity(), nn.ReLU())
    traced, fused, _ = folded(model)
    assert fused == {"0": "conv + relu"}
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "output"]


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"resnet56", "vgg16"}))
def test_networks(name: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    live_norms(model)
    traced, fused, left = folded(model, torch.randn(2, *shape))
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    assert len(fused) == layers
    norms = [name for name, m in traced.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(norms) == set(left)
    assert bool(norms) is (name == "densenet")  # it normalises before its convolutions


def test_fully_connected_layers_are_frozen_and_shared_weights_left() -> None:
    class Fully(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice, self.tied = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.other = nn.Linear(4, 4, bias=False)
            self.other.weight = self.tied.weight

        def forward(self, x):
            return self.other(self.tied(self.twice(self.twice(self.first(x)))))

    traced, fused, _ = folded(Fully(), torch.randn(2, 3, 5))
    assert list(fused) == ["first", "twice"]
    assert all(layer.frozen for layer in kinds(traced, SupportLinear))
    assert traced.tied.weight is traced.other.weight


def test_layers_whose_result_nothing_reads_are_gone() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.one(x)
            self.head(torch.relu(self.two(first)).mean((2, 3)))
            return first

    model, x = Unread().eval(), torch.randn(2, 3, 6, 6)
    report = hk.optimize(model, x)
    torch.testing.assert_close(report.model(x), model(x))
    assert [name for name, _ in report.model.named_children()] == ["one"]
    assert [fused.name for part in report.parts for fused in part.folded.fused] == ["one"]
