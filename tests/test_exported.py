# SPDX-License-Identifier: Apache-2.0
"""lift: exported operators become the calls of layers they came from, and only those."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F_
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.graph.exported import lift
from hetconv_kernels.nn import HetConv2d, fuse
from hetconv_kernels.pooling import Pool


def called(model: nn.Module, x: torch.Tensor) -> list[str]:
    traced = lift(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    return [str(n.target) for n in traced.graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(4),
        HetConv2d(4, 4, 3, padding=1),
        hk.nn.GroupedConv2d(4, 4, 3, groups=2),
        HetConv2d(4, 4, 3).freeze(),
        fuse(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4).eval(), "relu"),
        fuse(nn.Conv2d(4, 4, 3), None, "relu", Pool((2, 2), (1, 1), (0, 0))),
    ],
    ids=["same", "depthwise", "norm", "het", "grouped", "frozen", "fused", "pooled"],
)
def test_layers_come_back(layer: nn.Module) -> None:
    model = nn.ModuleDict({"inner": layer}).eval()
    model.forward = lambda x: model["inner"](x)  # type: ignore[method-assign]
    assert called(model, torch.randn(2, 4, 5, 5)) == ["inner"]


class Model(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def test_a_layer_that_pads_first_stays_operators() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")).eval()
    assert called(model, torch.randn(2, 4, 5, 5)) == []


def test_functions_on_parameters_stay_operators() -> None:
    class Uses(Model):
        def forward(self, x):
            return F_.conv2d(x, self.a.weight, self.b.bias)

    assert called(Uses(a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)), torch.randn(1, 4, 3, 3)) == []


def test_a_residual_goes_with_its_fused_layer() -> None:
    class Adds(Model):
        def forward(self, x):
            return self.conv(x, x)

    fused = fuse(nn.Conv2d(4, 4, 3, padding=1), act="relu")
    traced = lift(Adds(conv=fused).eval(), (torch.randn(2, 4, 5, 5),))
    node = next(n for n in traced.graph.nodes if n.op == "call_module")
    assert len(node.args) == 2


def test_constants_below_a_layers_name_survive() -> None:
    """A Support's bits are lifted under the first layer that uses them."""
    shared = hk.Support.het(4, 4, 3)

    class Twice(Model):
        def forward(self, x):
            return hk.functional.support_conv2d(self.a(x), self.b, shared, padding=1)

    model = Twice(a=hk.nn.SupportConv2d(4, 4, 3, padding=1, support=shared))
    model.b = nn.Parameter(torch.randn(4, 4, 3, 3))
    assert called(model.eval(), torch.randn(2, 4, 5, 5)) == ["a"]
