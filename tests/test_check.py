# SPDX-License-Identifier: Apache-2.0
"""match and verify: what rounding explains passes, anything else does not."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import network
from torch import nn

from hetconv_kernels.errors import VerificationError
from hetconv_kernels.graph.check import match, verify


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_in_another_memory_format_passes(dtype: torch.dtype) -> None:
    model, x = network("lenet5")
    model, x = model.to(dtype), x.to(dtype)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    found = match(model, other, (x,))
    assert found.ok
    assert found.own > 0
    assert "allowed" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0], ids=["slightly", "wholly"])
def test_one_changed_bias_does_not(scale: float, dtype: torch.dtype) -> None:
    model, x = network("resnet20")
    model, x = model.to(dtype), x.to(dtype)
    other = copy.deepcopy(model)
    other.fc.bias.data[3] += scale * (1 if dtype == torch.float32 else 1e-8)
    found = match(model, other, (x,))
    assert not found.ok
    with pytest.raises(VerificationError, match=r"rewriting changes the outputs .* left as it was"):
        verify(model, other, (x,), "rewriting")


def test_the_example_alone_may_hide_a_difference() -> None:
    """Where the example is all zeros, the noise shows nothing either; elsewhere it does."""
    model = nn.Conv2d(2, 2, 1).eval()
    other = copy.deepcopy(model)
    other.weight.data[:, 0] = 0
    x = torch.zeros(1, 2, 3, 3)
    x[:, 1] = 1
    assert not match(model, other, (x,)).ok


@pytest.mark.parametrize(
    "wrong",
    [lambda y: y[:, :1], lambda y: y * float("nan"), lambda y: y / 0],
    ids=["shape", "nan", "inf"],
)
def test_shapes_and_values_that_are_not_finite(wrong) -> None:
    class Wrong(nn.Module):
        def forward(self, x):
            return wrong(x)

    assert match(nn.Identity(), Wrong(), (torch.randn(1, 2, 3, 3),)).error == float("inf")


def test_outputs_and_inputs_may_be_nested() -> None:
    class Pair(nn.Module):
        def __init__(self, sign: int) -> None:
            super().__init__()
            self.sign = sign

        def forward(self, x, more):
            return {"a": x, "b": [more["y"] * self.sign, 3]}

    inputs = (torch.randn(2), {"y": torch.randn(2), "n": torch.arange(2)})
    assert match(Pair(1), Pair(1), inputs).ok
    assert not match(Pair(1), Pair(-1), inputs).ok
