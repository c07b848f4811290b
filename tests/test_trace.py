# SPDX-License-Identifier: Apache-2.0
"""trace: torch.fx first, torch.export second, and a clear answer when neither works."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F_
from networks import network
from torch import fx, nn

from hetconv_kernels.errors import ArgumentError, InputTypeError, TraceError
from hetconv_kernels.graph.trace import as_inputs, check_network, symbolic_graph, trace
from hetconv_kernels.nn import HetConv2d


@pytest.mark.parametrize("name", ["resnet20", "densenet", "mobilenet", "branches"])
def test_networks_trace_by_fx_with_free_sizes(name: str) -> None:
    model, x = network(name)
    traced = trace(model, x)
    assert traced.meta["traced by"] == "torch.fx"
    with torch.no_grad():
        assert torch.equal(traced(x[:1]), model(x[:1]))
    names = {n.target for n in traced.graph.nodes if n.op == "call_module"}
    assert names <= dict(model.named_modules()).keys()


def test_layers_of_this_package_are_leaves() -> None:
    traced = trace(nn.Sequential(HetConv2d(4, 4, 3), nn.ReLU()).eval(), torch.randn(1, 4, 5, 5))
    assert [(n.op, n.target) for n in traced.graph.nodes][1:3] == [
        ("call_module", "0"),
        ("call_module", "1"),
    ]
    alone = trace(HetConv2d(4, 4, 3).eval(), torch.randn(1, 4, 5, 5))
    assert [n.op for n in alone.graph.nodes] == ["placeholder", "call_module", "output"]


def test_nodes_know_their_shapes_and_values() -> None:
    class Sizes(nn.Module):
        def forward(self, x):
            first, second = x.chunk(2, 1)
            return (first + second).view(x.size(0), -1)

    traced = trace(Sizes(), torch.randn(3, 4, 2, 2))
    meta = {n.name: n.meta for n in traced.graph.nodes}
    assert meta["x"]["shape"] == (3, 4, 2, 2)
    assert meta["chunk"]["shape"] == ((3, 2, 2, 2), (3, 2, 2, 2))
    assert meta["size"]["value"] == 3
    assert meta["view"]["shape"] == (3, 8)


class AsksForSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.het = HetConv2d(4, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F_.interpolate(x, 8) if x.shape[2] < 8 else x
        return self.head(self.het(self.body(x)).mean((2, 3)))


def test_export_is_the_second_try_and_gives_modules_back() -> None:
    model, x = AsksForSizes().eval(), torch.randn(2, 3, 9, 9)
    traced = trace(model, x)
    assert traced.meta["traced by"] == "torch.export"
    names = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert names == ["body.0", "body.1", "het", "head"]
    assert traced.get_submodule("het") is model.het
    with torch.no_grad():
        for batch in (2, 5):
            y = torch.randn(batch, 3, 9, 9)
            assert torch.equal(traced(y), model(y))


def test_what_reads_after_a_change_in_place_reads_the_change() -> None:
    class Mutates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            y.relu_()
            return y + 1

    traced = trace(Mutates().eval(), torch.randn(1, 3, 2, 2))
    total = next(n for n in traced.graph.nodes if n.target is operator.add)
    assert total.args[0].target == "relu_"


def test_the_example_is_left_as_it_is() -> None:
    x = torch.randn(1, 3, 4, 4)
    before = x.clone()
    trace(nn.Sequential(nn.ReLU(inplace=True)).eval(), x)
    assert torch.equal(x, before)


def test_neither_way_works_and_both_reasons_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Fork(nn.Module):
        def forward(self, x):
            large = x[x > 0]
            return x if large.numel() > 4 else -x

    with pytest.raises(TraceError, match=r"Fork cannot be traced \(torch.fx: .*; torch.export: "):
        trace(Fork(), torch.randn(2, 3))
    # Of such a network torch.export prints all that it has of the graph.
    assert "def forward" not in capsys.readouterr().err


def test_wrong_sizes_are_a_reason_too() -> None:
    with pytest.raises(TraceError, match=r"torch.fx: RuntimeError"):
        trace(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), torch.randn(1, 5, 2, 2))


def test_arguments() -> None:
    x = torch.randn(1)
    assert as_inputs(x) == (x,)
    assert as_inputs([x, 2]) == (x, 2)
    with pytest.raises(InputTypeError, match="example: received int"):
        as_inputs(3)
    check_network(nn.Sequential().eval())
    model = nn.Sequential(nn.Sequential(nn.Dropout())).eval()
    model[0][0].train()
    with pytest.raises(ArgumentError, match=r"training mode at '0.0'"):
        check_network(model)


@fx.wrap
def stochastic_depth(x, p: float, mode: str, training: bool = True):
    """Stands for torchvision's, which torch.fx takes as one step too."""
    return x * 0 if training else x


class Drops(nn.Module):
    def forward(self, x):
        return stochastic_depth(x.relu(), 0.1, "row", self.training) + x


def test_stochastic_depth_is_no_step_in_evaluation_mode_and_one_in_training() -> None:
    assert len(symbolic_graph(Drops().eval()).nodes) == 4
    assert len(symbolic_graph(Drops().train()).nodes) == 5
    x = torch.randn(2, 3)
    assert torch.equal(fx.GraphModule(Drops(), symbolic_graph(Drops().eval()))(x), x.relu() + x)
