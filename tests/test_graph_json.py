# SPDX-License-Identifier: Apache-2.0
"""Graphs as data: steps come back as they were; a file cannot call what is not on the list."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.nn.functional as F_
from networks import network
from torch import fx, nn

from hetconv_kernels.errors import FileError
from hetconv_kernels.graph.graph_json import graph_from_json, graph_to_json
from hetconv_kernels.graph.trace import trace


def again(graph: fx.Graph) -> fx.Graph:
    return graph_from_json(json.loads(json.dumps(graph_to_json(graph))))


@pytest.mark.parametrize("name", ["resnet20", "densenet", "branches"])
def test_networks(name: str) -> None:
    model, x = network(name)
    traced = trace(model, x)
    copy = fx.GraphModule(model, again(traced.graph))
    with torch.no_grad():
        assert torch.equal(copy(x), traced(x))


class Args(nn.Module):
    def forward(self, x, scale=float("inf"), dims=(2, 3)):
        y = x[..., 1:, ::2].to(torch.float64).clamp(max=scale)
        first, second = torch.split(y, [1, 2], dim=1)
        z = F_.max_pool2d(F_.pad(torch.cat([first, second], 1), (0, 0, 1, 0)), 2)
        return {"a": z.mean(dims), "b": [z.size(0) + 1, None]}


def test_every_kind_of_argument() -> None:
    traced = fx.symbolic_trace(Args())
    copy = fx.GraphModule(nn.Module(), again(traced.graph))
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(copy(x)["a"], traced(x)["a"])
    assert copy(x)["b"] == [3, None]


def test_exported_operators() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return torch.relu_(self.conv(x if x.shape[2] > 1 else x * 2))

    model, x = Asks().eval(), torch.randn(2, 3, 4, 4)
    traced = trace(model, x)
    assert traced.meta["traced by"] == "torch.export"
    copy = fx.GraphModule(traced, again(traced.graph))
    with torch.no_grad():
        assert torch.equal(copy(x), model(x))


class AsOthersSayIt(nn.Module):
    """Checks of shapes, attention, gates and upsampling, in the words of timm's networks."""

    def forward(self, x, w, v):
        torch._assert(x.shape[1] == 4, "four channels")
        y = F_.conv_transpose2d(x, w, stride=2)
        gate = F_.conv1d(y.mean((2, 3)).unsqueeze(1), v, padding=1).sigmoid().transpose(1, 2)
        y = y * gate.unsqueeze(-1)
        q, k = torch.stack([y, y + 1], 0).unbind(0)
        z = F_.scaled_dot_product_attention(q.flatten(2), k.flatten(2), k.flatten(2))
        return z.reshape_as(y).view_as(q)


def test_what_other_packages_networks_call_is_on_the_list() -> None:
    traced = fx.symbolic_trace(AsOthersSayIt())
    copy = fx.GraphModule(nn.Module(), again(traced.graph))
    inputs = torch.randn(2, 4, 3, 3), torch.randn(4, 4, 2, 2), torch.randn(1, 1, 3)
    assert torch.equal(copy(*inputs), traced(*inputs))
    with pytest.raises(AssertionError, match="four channels"):
        copy(torch.randn(2, 3, 3, 3), *inputs[1:])


@pytest.mark.parametrize(
    ("op", "target", "message"),
    [
        ("call_function", torch.linalg.inv, "the function linalg_inv"),
        ("call_function", os.fspath, "the function fspath"),
        ("call_method", "numpy", "the method numpy"),
    ],
)
def test_what_is_not_on_the_list_is_not_saved(op: str, target, message: str) -> None:
    graph = fx.Graph()
    graph.create_node(op, target, (graph.placeholder("x"),))
    with pytest.raises(FileError, match=message):
        graph_to_json(graph)


STEP = {"name": "x", "op": "placeholder", "target": "x", "args": [], "kwargs": {}}


@pytest.mark.parametrize(
    "step",
    [
        {"op": "call_function", "target": "posix.system"},
        {"op": "call_function", "target": "torch.load"},
        {"op": "call_function", "target": "aten::from_file.default"},
        {"op": "call_function", "target": "prim::device.default"},
        {"op": "call_function", "target": "aten::relu.nothing"},
        {"op": "call_function", "target": "getattr", "args": [1, "__class__"]},
        {"op": "call_method", "target": "__setattr__"},
        {"op": "call_module", "target": "a b"},
        {"op": "get_attr", "target": "a;b"},
        {"op": "exec", "target": "x"},
        {"name": "import os"},
        {"name": "class"},
        {"target": "x = 1"},
        {"kwargs": {"a b": 1}},
        {"args": [{"node": "later"}]},
        {"args": [{"dtype": "nn"}]},
        {"args": [{"dtype": "channels_last"}]},
        {"kwargs": {"memory_format": {"memory_format": "float32"}}},
        {"args": [{"a": 1, "b": 2}]},
        {"args": 3},
    ],
)
def test_what_is_not_on_the_list_is_not_read(step) -> None:
    with pytest.raises(FileError):
        graph_from_json([STEP | step])


def test_a_memory_format_comes_back() -> None:
    graph, last = fx.Graph(), {"memory_format": torch.channels_last}
    graph.output(graph.call_method("clone", (graph.placeholder("x"),), last))
    (clone,) = (node for node in again(graph).nodes if node.target == "clone")
    assert clone.kwargs == last
