# SPDX-License-Identifier: Apache-2.0
"""Networks that change a view in place, through optimize, compact, 8 bits and bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hetconv_kernels as hk


class Net(nn.Module):
    """A tensor with several readers, one of which is changed."""

    def __init__(self, order: Callable[..., Tensor], change: Callable[..., None]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.relu = nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True)
        self.order, self.change = order, change
        with torch.no_grad():
            self.a.weight[2] = 0
            self.a.bias[2] = 0.1  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.order(self, self.a(x), self.change)


def early(s: Net, y: Tensor, change: Any) -> Tensor:
    change(s, y)
    return s.b(y) + y


def between(s: Net, y: Tensor, change: Any) -> Tensor:
    """The convolution reads y before it is changed, the sum after it."""
    z = s.b(y)
    change(s, y)
    return z + y


def before_an_activation(s: Net, y: Tensor, change: Any) -> Tensor:
    z = s.b(y) + y
    change(s, y)
    return F.relu(z) + s.c(y)


def two_convolutions(s: Net, y: Tensor, change: Any) -> Tensor:
    z, w = s.b(y), s.c(y)
    change(s, y)
    return F.relu(z + w) + y


def through_a_view(s: Net, y: Tensor, change: Any) -> Tensor:
    v = y[:, :4]
    z = s.c(torch.cat([v, v], 1))
    change(s, y)
    return z + s.b(y) + torch.cat([v, v], 1)


def multiplied(s: Net, y: Tensor) -> None:
    y[:, :4].mul_(2)


def function_on_a_view(s: Net, y: Tensor) -> None:
    F.relu(y[:, :4], inplace=True)


def module_on_a_view(s: Net, y: Tensor) -> None:
    s.relu(y[:, 2:])


def module_on_the_whole(s: Net, y: Tensor) -> None:
    s.relu(y)


def another_function(s: Net, y: Tensor) -> None:
    F.hardtanh(y[:, 2:], inplace=True)


def assigned(s: Net, y: Tensor) -> None:
    y[:, :2] = 1.0


def augmented(s: Net, y: Tensor) -> None:
    z = y[:, :4]
    z += 1  # torch.fx takes it for z = z + 1


ORDERS = [early, between, before_an_activation, two_convolutions, through_a_view]
CHANGES = [
    multiplied, function_on_a_view, module_on_a_view, module_on_the_whole, another_function,
    assigned, augmented,
]  # fmt: skip
# What makes the network, and how far its output may be from the original's.
WAYS: dict[str, tuple[Callable[[nn.Module, Tensor], Any], float]] = {
    "compact": (lambda m, x: hk.compact(m, x), 1e-5),
    "optimize": (lambda m, x: hk.optimize(m, x), 1e-5),
    "bfloat16": (lambda m, x: hk.optimize(m, x, dtype=torch.bfloat16), 0.05),
    "8 bits": (lambda m, x: hk.quantize(m, [x]), 0.15),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("order", ORDERS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_what_reads_a_tensor_reads_it_as_it_was_then(order: Any, change: Any, way: str) -> None:
    model, x = Net(order, change).eval(), torch.randn(1, 3, 12, 12)
    make, allowed = WAYS[way]
    expected = model(x)
    report = make(model, x)
    assert "left as it was" not in str(report), "only the comparison stood before a wrong network"
    for network in (report.model, copy.deepcopy(report.model)):
        for _ in range(3):  # recorded, then as a program
            error = (network(x) - expected).abs().max() / expected.abs().max()
            assert error <= allowed
