# SPDX-License-Identifier: Apache-2.0
"""The steps between quantised layers: near float, of any shape, refused where scales do not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F_

from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.nn import (
    Dequantize,
    Quantize,
    QuantizedAdd,
    QuantizedAvgPool2d,
    QuantizedMaxPool2d,
    QuantizedPad,
    Requantize,
)
from hetconv_kernels.pooling import Pool
from hetconv_kernels.quantization.scheme import Scale

A, B, Y = Scale(0.02, 128), Scale(0.05, -3, torch.int8), Scale(0.04, 90)
SHAPES = [(2, 3, 5, 4), (4, 6), (7,), (2, 3, 4)]


def integers(scale: Scale, shape) -> torch.Tensor:
    info = torch.iinfo(scale.dtype)
    return torch.randint(info.min, info.max + 1, shape, dtype=scale.dtype)


def numbers(q: torch.Tensor, scale: Scale) -> torch.Tensor:
    return (q.float() - scale.zero_point) * scale.scale


def near(result: torch.Tensor, truth: torch.Tensor, y: Scale | None) -> bool:
    if y is None:
        return torch.allclose(result, truth, atol=1e-5)
    return float((numbers(result, y) - truth.clamp(y.low, y.high)).abs().max()) <= 0.501 * y.scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_quantised_comes_back_within_half_a_step(shape) -> None:
    x = torch.randn(shape)
    q = Quantize(A)(x)
    assert q.shape == x.shape
    assert q.dtype == torch.uint8
    assert near(q, x, A)
    assert torch.equal(Dequantize(A)(q), numbers(q, A))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("y", [Y, None], ids=["uint8", "float32"])
def test_sums_of_two_scales(shape, y) -> None:
    a, b = integers(A, shape), integers(B, shape)
    truth = torch.relu(numbers(a, A) + numbers(b, B))
    assert near(QuantizedAdd(A, B, y, "relu")(a, b), truth, y)


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("y", [Y, None], ids=["uint8", "float32"])
def test_a_change_of_scale_with_an_activation(act: str, y) -> None:
    acts = {"none": lambda t: t, "relu": torch.relu, "relu6": F_.relu6}
    x = integers(B, (2, 3, 5, 4))
    assert near(Requantize(B, y, act)(x), acts[act](numbers(x, B)), y)


def test_max_pooling_is_that_of_the_numbers() -> None:
    x, pool = integers(B, (2, 3, 7, 8)), Pool((3, 3), (2, 2), (1, 1))
    truth = F_.max_pool2d(numbers(x, B), 3, 2, 1)
    assert torch.equal(numbers(QuantizedMaxPool2d(pool)(x), B), truth)


@pytest.mark.parametrize("y", [Y, None], ids=["uint8", "float32"])
def test_the_mean_over_an_image(y) -> None:
    x = integers(A, (2, 3, 7, 8))
    assert near(QuantizedAvgPool2d(A, y)(x), numbers(x, A).mean((2, 3), keepdim=True), y)
    flat = QuantizedAvgPool2d(A, y, keepdim=False)(x)
    assert flat.shape == (2, 3)
    assert near(flat, numbers(x, A).mean((2, 3)), y)


def test_pooling_to_the_size_that_is_there_changes_nothing() -> None:
    x, layer = integers(A, (2, 3, 7, 7)), QuantizedAvgPool2d(A, A, (7, 7))
    assert layer(x) is x
    wide = integers(A, (2, 3, 14, 21))
    assert near(layer(wide), F_.adaptive_avg_pool2d(numbers(wide, A), (7, 7)), A)


def test_padding_stands_for_zero() -> None:
    x, pads = integers(A, (2, 3, 4, 5)), (1, 0, 2, 1, 0, 3)
    truth = F_.pad(numbers(x, A), pads)
    assert torch.equal(numbers(QuantizedPad(A, pads)(x), A), truth)


@pytest.mark.parametrize(
    "step",
    [
        Quantize(A), Dequantize(B), Requantize(A, Y, "relu6"), Requantize(A, None),
        QuantizedAdd(A, B, Y), QuantizedMaxPool2d(Pool((2, 2), (2, 2), (0, 0))),
        QuantizedAvgPool2d(A, A, (7, 7)), QuantizedAvgPool2d(A, None, keepdim=False),
        QuantizedPad(A, (1, 1)),
    ],
    ids=lambda step: type(step).__name__,
)  # fmt: skip
def test_a_step_is_built_again_from_its_description(step) -> None:
    import json

    again = type(step).from_description(json.loads(json.dumps(step.describe())))
    assert repr(again) == repr(step)
    assert again.describe() == step.describe()


@pytest.mark.parametrize("scale", [None, 0.1])
def test_steps_without_a_scale_are_refused(scale) -> None:
    for build in (
        lambda: Quantize(scale), lambda: Dequantize(scale), lambda: Requantize(scale, Y),
        lambda: QuantizedAdd(A, scale, Y), lambda: QuantizedPad(scale, (1, 1)),
    ):  # fmt: skip
        with pytest.raises(InputTypeError, match="calibrate"):
            build()


def test_integers_of_another_dtype_are_refused() -> None:
    x = integers(B, (2, 3, 4, 4))
    for step in (Dequantize(A), Requantize(A, Y), QuantizedAvgPool2d(A, Y), QuantizedPad(A, (1,))):
        with pytest.raises(InputTypeError, match=r"int8.*uint8, as calibrated"):
            step(x)
    with pytest.raises(InputTypeError, match="float64"):
        Quantize(A)(torch.zeros(2, 3, dtype=torch.float64))


def test_a_pooling_to_several_pixels_keeps_its_scale() -> None:
    with pytest.raises(ArgumentError, match="several pixels"):
        QuantizedAvgPool2d(A, Y, (2, 2))


@pytest.mark.parametrize(
    ("step", "given"),
    [
        (Quantize(A), lambda: (torch.randn(4, 6),)),
        (QuantizedAdd(A, B, Y, "relu"), lambda: (integers(A, (4, 6)), integers(B, (4, 6)))),
        (QuantizedAvgPool2d(A, Y, keepdim=False), lambda: (integers(A, (2, 3, 4, 4)),)),
        (QuantizedMaxPool2d(Pool((2, 2), (2, 2), (0, 0))), lambda: (integers(A, (2, 3, 4, 4)),)),
    ],
    ids=["quantize", "add", "mean", "max_pool"],
)
def test_torch_compile_and_export_give_the_same(step, given) -> None:
    x = given()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*x), step(*x))
    assert torch.equal(torch.export.export(step, x).module()(*x), step(*x))
