# SPDX-License-Identifier: Apache-2.0
"""Convolutions that compute their weight at each call become plain ones, or a reason is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.graph.rules import Keep


class Standardised(nn.Conv2d):
    """As timm's StdConv2d: zero mean and unit variance in each filter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True
        ).reshape_as(self.weight)
        return F.conv2d(
            x, weight, self.bias, self.stride, self.padding, self.dilation, groups=self.groups
        )


def network() -> nn.Sequential:
    """Pre-activation, with normalisation in groups."""
    torch.manual_seed(0)
    return nn.Sequential(
        Standardised(3, 8, 3, padding=1, bias=False),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        Standardised(8, 8, 3, stride=2, padding=2, dilation=2, groups=2),
        nn.ReLU(),
        Standardised(8, 4, 1),
    ).eval()


def test_the_plain_network_gives_the_same() -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    model[5].weight.requires_grad_(False)
    report = hk.convert(model, hk.rules.computed_weights())
    assert [swap.name for swap in report.swapped] == ["0", "3", "5"]
    assert {type(report.model[place]) for place in (0, 3, 5)} == {nn.Conv2d}
    assert not report.model[5].weight.requires_grad
    torch.testing.assert_close(report.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert hk.convert(report.model, hk.rules.computed_weights()).swapped == ()


class Pads(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Negates(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Attends(nn.Conv2d):
    """Its weight is of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias)


class Fails(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no image of mine")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Pads, "changes its input"),
        (Negates, "more than one convolution"),
        (Attends, "another weight for another input"),
        (Fails, "cannot be watched .no image of mine"),
    ],
)
def test_what_does_something_else_is_kept(kind: Any, reason: str) -> None:
    answer = hk.rules.computed_weights()("conv", kind(2, 3, 3))
    assert isinstance(answer, Keep)
    assert reason in answer.reason.replace("(", ".")


@pytest.mark.parametrize("module", [nn.Conv2d(2, 2, 1), nn.Linear(2, 2), nn.ReLU()])
def test_nothing_is_said_of_other_modules(module: nn.Module) -> None:
    assert hk.rules.computed_weights()("module", module) is None


def test_optimize_computes_the_weights_once() -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    report = hk.optimize(model, x)
    assert report.settled == ("0.weight", "3.weight", "5.weight")
    assert not any(isinstance(module, Standardised) for module in report.model.modules())
    with torch.no_grad():
        torch.testing.assert_close(report.model(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_compressor_names_the_rule_and_takes_what_it_gives() -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    method = hk.methods.SelfGrouping(target=0.5, step=0.5, clusters=2, epochs=0)
    settings: dict[str, Any] = {"example": x, "measure": False, "progress": False}
    with pytest.raises(hk.errors.ArgumentError, match=r"rules\.computed_weights may make it plain"):
        hk.compress(model, method, **settings)
    plain = hk.convert(model, hk.rules.computed_weights()).model
    report = hk.compress(plain, method, **settings, leave_plain=False)
    assert report.macs[1] < report.macs[0]
