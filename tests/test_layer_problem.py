# SPDX-License-Identifier: Apache-2.0
"""layer.problem(x) is what the engines are asked about when the layer is called on x."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import BUILDERS, C, F, build, image
from quantized_layers import POOL, R, X, quantized
from quantized_layers import image as integers
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import choose
from hetconv_kernels.errors import ArgumentError, BackendError, InputTypeError
from hetconv_kernels.nn import FrequencyConv2d, QuantizedLinear, SupportLinear, fuse
from hetconv_kernels.problem import Problem


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """What engines are chosen for from now on."""
    found: list[Problem] = []
    choose = ops.choose

    def noting(problem: Problem, code: int) -> Any:
        found.append(problem)
        return choose(problem, code)

    monkeypatch.setattr(ops, "choose", noting)
    return found


def linear(**how: Any) -> SupportLinear:
    return SupportLinear(C, F, support=hk.Support.het(C, F, 1, p=4), **how).eval()


def frequency() -> FrequencyConv2d:
    return FrequencyConv2d(C, F, 3, padding=1, stride=2, path="spatial").eval()


def frozen_frequency() -> FrequencyConv2d:
    layer = frequency()
    layer.mix.freeze()
    return layer


def values(problem: Problem) -> dict[str, Any]:
    """What a Problem says, a Geometry by its values: two objects are never equal."""
    found = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    return {**found, "geometry": problem.geometry.__reduce__()[1]}


# What is called with what; a residual is the second argument.
CALLS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    **{kind: lambda kind=kind: (build(kind, padding=1), (image(),)) for kind in BUILDERS},  # type: ignore[misc]
    "no batch": lambda: (build("het"), (image()[0],)),
    "no bias, stride": lambda: (build("support", bias=False, stride=2), (image(),)),
    "outer pads": lambda: (build("het", padding=2, padding_mode="reflect"), (image(),)),
    "channels_last": lambda: (
        build("selfgroup"),
        (image().contiguous(memory_format=torch.channels_last),),
    ),
    "frozen": lambda: (build("support").freeze(), (image(),)),
    "frequency": lambda: (frequency(), (image(),)),
    "frequency, frozen": lambda: (frozen_frequency(), (image()[0],)),
    "linear": lambda: (linear(), (torch.randn(5, C),)),
    "linear, sequences": lambda: (linear(bias=False), (torch.randn(2, 3, C),)),
    "linear, frozen": lambda: (linear().freeze(), (torch.randn(5, C),)),
    "fused": lambda: (fuse(build("het"), nn.BatchNorm2d(F).eval(), "relu"), (image(),)),
    "fused, residual": lambda: (fuse(build("het", padding=1)), (image(), image(2, F, 9, 7))),
    "fused, pool": lambda: (fuse(build("support"), None, "silu", POOL), (image(),)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_layer_describes_what_its_call_asks(name: str, asked: list[Problem]) -> None:
    layer, arguments = CALLS[name]()
    described = layer.problem(*arguments)
    assert asked == []
    with torch.no_grad():
        layer(*arguments)
    assert asked == [described]


@pytest.mark.parametrize("name", ["het", "linear", "fused"])
def test_a_layer_describes_its_call_under_autocast(name: str, asked: list[Problem]) -> None:
    layer, arguments = CALLS[name]()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        described = layer.problem(*arguments)
        layer(*arguments)
    assert asked == [described]
    assert described.dtype == torch.bfloat16
    assert described.weight_dtype == torch.float32


@pytest.mark.parametrize("name", ["het", "grouped", "channels_last", "linear"])
def test_a_layer_describes_its_call_after_freezing(name: str, asked: list[Problem]) -> None:
    layer, arguments = CALLS[name]()
    described, now = layer.problem(*arguments, frozen=True), layer.problem(*arguments)
    assert values(described) != values(now)
    assert not layer.frozen
    with torch.no_grad():
        layer.freeze()(*arguments)
    assert asked == [layer.problem(*arguments)]
    assert values(asked[0]) == values(described)


def test_a_layer_sparse_in_frequency_describes_its_call_after_freezing(
    asked: list[Problem],
) -> None:
    layer, x = frequency(), image()
    described = layer.problem(x, frozen=True)
    assert values(described) != values(layer.problem(x))
    layer.mix.freeze()
    with torch.no_grad():
        layer(x)
    assert asked == [described]


@pytest.mark.parametrize("residual", [False, True])
def test_a_layer_in_8_bits_describes_its_work(residual: bool) -> None:
    layer = quantized(residual=R if residual else None)
    x = integers()
    y = (2, 12, 6, 5)
    found = layer.problem(x, torch.zeros(y, dtype=torch.uint8)) if residual else layer.problem(x)
    assert (found.x_shape, found.y_shape) == (tuple(x.shape), y)
    assert found.macs == 2 * layer.support.macs(6, 5)
    assert found.epilogue == ("shift", "residual")[: 1 + residual]
    assert found.bytes_moved == 2 * (8 * 99 + 12 * 30) + layer.support.live
    with pytest.raises(BackendError, match="dtype of a problem"):
        choose(found, 0)


def test_a_linear_layer_in_8_bits_is_described_a_row_a_pixel() -> None:
    layer = QuantizedLinear.from_float(linear(), X)
    found = layer.problem(torch.zeros((3, 5, C), dtype=torch.uint8))
    assert found.x_shape == (15, C, 1, 1)
    assert found.macs == 15 * layer.support.live


def test_what_the_call_refuses_cannot_be_described() -> None:
    wide, rows = image(2, C + 1, 9, 7), torch.randn(5, C + 1)
    refused = {"het": wide, "linear": rows, "fused": wide, "frozen": image().double()}
    refused["frequency"] = wide
    for name, wrong in refused.items():
        layer, _ = CALLS[name]()
        for call in (layer, layer.problem):
            with pytest.raises((ArgumentError, InputTypeError)):
                call(wrong)
    with pytest.raises(InputTypeError, match="dtype"):
        quantized().problem(torch.randn(2, 8, 11, 9))
    with pytest.raises(ArgumentError, match="input shape"):
        quantized().problem(integers(shape=(2, 9, 11, 9)))
