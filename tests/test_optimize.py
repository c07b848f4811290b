# SPDX-License-Identifier: Apache-2.0
"""optimize: equal to the network, one pass a convolution, and an account that tells."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from detecting import detector
from networks import NETWORKS, assert_same, interleaved, kinds, network
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, VerificationError
from hetconv_kernels.nn import FusedConv2d, HetConv2d, SupportLinear


@pytest.mark.parametrize("form", ["dense", "het"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_masked_network(name: str, form: str) -> None:
    if form == "het" and name in ("resnet56", "resnet50"):
        pytest.skip("the same blocks as resnet20 and the dense resnet50")
    model, x = network(name)
    if form == "het":
        model = interleaved(model)
    report = hk.optimize(model, x)
    assert_same(model, report.model, x)
    assert not kinds(report.model, nn.Conv2d)
    assert not any(module.training for module in report.model.modules())
    assert (len(kinds(report.model, nn.BatchNorm2d)) > 0) is (name == "densenet")
    text = str(report)
    assert text.startswith("outputs compared: largest error")
    assert "the network, traced by torch.fx" in text


def test_channels_last_goes_through() -> None:
    model, x = network("resnet20")
    fast = hk.optimize(model, x).model
    image = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(fast(image), model(x), rtol=1e-4, atol=1e-5)


def test_the_original_is_left_alone() -> None:
    model, x = network("branches")
    state = copy.deepcopy(model.state_dict())
    hk.optimize(model, x)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_fully_connected_layers_with_a_support_are_frozen() -> None:
    mask = np.random.default_rng(0).random((1024, 1024, 1, 1)) < 0.02  # so that its Support pays
    layer = SupportLinear.from_linear(nn.Linear(1024, 1024), hk.Support.from_mask(mask))
    model = nn.Sequential(nn.Flatten(), layer).eval()
    report = hk.optimize(model, torch.randn(64, 1024))
    assert report.model.get_submodule("1").frozen


class Forks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.tail = HetConv2d(8, 8, 3, padding=1, p=2)

    def forward(self, x):
        y = self.body(x)
        return self.tail(y) if y.sum() > 0 else y


def test_what_cannot_be_traced_is_optimised_part_by_part() -> None:
    torch.manual_seed(0)
    model, x = Forks().eval(), torch.randn(2, 8, 5, 5)
    report = hk.optimize(model, x)
    assert type(report.model) is Forks
    assert [part.name for part in report.parts] == ["body"]
    assert [left.name for left in report.untraced] == [""]
    assert report.frozen == ("tail",)
    assert len(kinds(report.model, FusedConv2d)) == 1
    assert_same(model, report.model, x)
    text = str(report)
    assert "body, traced by torch.fx" in text
    assert "frozen, as they are: tail" in text
    assert "Forks cannot be traced" in text


def test_a_part_that_is_called_several_times_is_optimised_for_all_of_them() -> None:
    model, x = detector(), torch.randn(2, 3, 8, 8)
    report = hk.optimize(model, x)
    # The tower stands in a list and is called for two sizes of maps.
    assert [part.name for part in report.parts] == ["backbone", "towers.0"]
    with torch.no_grad():
        for mine, own in zip(report.model(x), model(x), strict=True):
            torch.testing.assert_close(mine, own)


class SizesMatter(nn.Module):
    """Its graph is that of one size: torch.export takes one of the branches."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.other = other

    def forward(self, x):
        y = self.conv(x)
        if x.shape[2] > 4:
            return y.relu()
        return y if self.other == "branch" else y.reshape(len(y), 8, x.shape[2], x.shape[3])


class Twice(Forks):
    def __init__(self, other: str) -> None:
        super().__init__()
        self.body = SizesMatter(other)

    def forward(self, x):
        one, two = self.body(x), self.body(x[:, :, :4, :4])
        return one + two.sum() if one.sum() > 0 else one


@pytest.mark.parametrize("other", ["branch", "reshape"])
def test_a_part_whose_graph_fits_its_first_call_only_stays(other: str) -> None:
    torch.manual_seed(0)
    model, x = Twice(other).eval(), torch.randn(2, 8, 5, 5)
    report = hk.optimize(model, x)
    assert not report.parts
    assert [left.name for left in report.untraced] == ["", "body"]
    assert_same(model, report.model, x)


def test_a_network_that_cannot_be_traced_converts_layer_by_layer() -> None:
    report = hk.convert(Forks(), hk.rules.het(p=2))
    assert [s.name for s in report.swapped] == ["body.0"]


def test_the_account_says_what_was_not_done() -> None:
    model, x = network("densenet")
    text = str(hk.optimize(model, x))
    assert "left alone: it does not follow a convolution alone" in text
    assert "fused: conv + bn + relu" in text
    assert "layers made smaller" in text


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="training mode"):
        hk.optimize(nn.Sequential(nn.Conv2d(2, 2, 1)), torch.randn(1, 2, 3, 3))

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    with pytest.raises(VerificationError, match="optimize changes the outputs"):
        hk.optimize(Counts().eval(), torch.randn(1, 2, 3, 3))
