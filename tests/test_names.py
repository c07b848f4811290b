# SPDX-License-Identifier: Apache-2.0
"""Names: the same thing has one name, however the code of a network says it."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F_
from torch import fx, nn

from hetconv_kernels.graph.names import describe_node, module_of, name_of


class Says(nn.Module):
    def __init__(self, what) -> None:
        super().__init__()
        self.inner = what if isinstance(what, nn.Module) else nn.Identity()
        self.what = self.inner if isinstance(what, nn.Module) else what

    def forward(self, x):
        return self.what(x)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (F_.relu, "relu"),
        (torch.relu_, "relu"),
        (lambda x: x.relu_(), "relu"),
        (torch.ops.aten.relu_.default, "relu"),
        (nn.Hardtanh(0, 6), "hardtanh"),
        (torch.ops.aten.hardtanh_.default, "hardtanh"),
        (lambda x: x + x, "add"),
        (lambda x: operator.iadd(x, x), "add"),
        (lambda x: torch.add(x, x), "add"),
        (lambda x: torch.ops.aten.add.Tensor(x, x), "add"),
        (lambda x: x.add_(x), "add"),
        (lambda x: F_.max_pool2d(x, 2), "max_pool2d"),
        (nn.MaxPool2d(2), "max_pool2d"),
        (lambda x: x[:, 1:], "getitem"),
        (lambda x: torch.cat([x, x], 1), "cat"),
        (nn.Flatten(), "flatten"),
        (lambda x: x.flatten(1), "flatten"),
        (nn.GroupNorm(1, 2), "GroupNorm"),
        (nn.Dropout2d(), "feature_dropout"),
    ],
)
def test_one_thing_has_one_name(what, name: str) -> None:
    traced = fx.symbolic_trace(Says(what))
    node = [n for n in traced.graph.nodes if n.op not in ("placeholder", "output")][-1]
    assert name_of(node) == name


def test_descriptions() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    first, called, last = traced.graph.nodes
    assert [describe_node(n) for n in (first, called, last)] == ["the input", "0", "the output"]
    assert module_of(called) is traced.get_submodule("0")
    assert module_of(first) is None
