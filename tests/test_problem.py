# SPDX-License-Identifier: Apache-2.0
"""The rules of nn.Conv2d for geometry, output size and memory format, and what a call refuses."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from strategies import random_mask
from torch import Tensor

from hetconv_kernels import Support
from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.problem import (
    DTYPES,
    Geometry,
    Problem,
    check_call,
    check_image,
    is_dense_shape,
    like_channels_last,
    make_geometry,
    memory_format,
    output_size,
    read_ints,
    weight_shapes,
)

DENSE = Support.dense(4, 6, 3)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


# Geometry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5), (7, 1)], ids=str)
def test_output_size_is_that_of_pytorch(kernel: tuple[int, int]) -> None:
    support = Support.dense(1, 1, kernel)
    weight = torch.ones(1, 1, *kernel)
    compared = 0
    for stride, dilation, pad in itertools.product((1, 2, (3, 1)), (1, 2, (1, 3)), (0, 1, (2, 3))):
        geometry = make_geometry(support, stride, pad, dilation)
        for size in ((7, 7), (8, 13), (21, 20)):
            found = geometry.output_size(*size)
            try:
                # The geometry's own dilation: a dilated single tap crashes in some of PyTorch.
                y = F.conv2d(torch.ones(1, 1, *size), weight, None, stride, pad, geometry.dilation)
            except RuntimeError:
                assert min(found) < 1
                continue
            assert found == tuple(y.shape[2:])
            compared += 1
    assert compared > 50


def test_output_size_counts_every_side() -> None:
    geometry = make_geometry(DENSE, 2, (1, 2, 3, 4))
    assert geometry.output_size(10, 10) == (6, 8)
    assert output_size(geometry.ints(10, 10)) == (6, 8)


@pytest.mark.parametrize(
    ("padding", "pads"),
    [
        (0, (0, 0, 0, 0)),
        (2, (2, 2, 2, 2)),
        ((1, 3), (1, 1, 3, 3)),
        ([1, 3], (1, 1, 3, 3)),
        ((2,), (2, 2, 2, 2)),
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        ([0, 1, 0, 1], (0, 1, 0, 1)),
        (np.int64(2), (2, 2, 2, 2)),
        ("valid", (0, 0, 0, 0)),
        ("same", (1, 1, 1, 1)),
    ],
    ids=str,
)
def test_padding_has_the_forms_of_pytorch_and_four_sides(
    padding: Any, pads: tuple[int, ...]
) -> None:
    geometry = make_geometry(DENSE, 1, padding)
    assert geometry.pads == pads
    assert all(type(side) is int for side in geometry.pads)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dilation", [1, 2, (3, 1)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 2), (4, 3), (1, 6)], ids=str)
def test_same_padding_is_that_of_pytorch(kernel: tuple[int, int], dilation: Any) -> None:
    support = Support.dense(2, 3, kernel)
    x, w = torch.randn(1, 2, 9, 8).double(), torch.randn(support.shape).double()
    geometry = make_geometry(support, 1, "same", dilation)
    assert geometry.output_size(9, 8) == (9, 8)
    top, bottom, left, right = geometry.pads
    padded = F.pad(x, (left, right, top, bottom))
    mine = F.conv2d(padded, w, dilation=geometry.dilation)
    torch.testing.assert_close(mine, F.conv2d(x, w, padding="same", dilation=geometry.dilation))


@pytest.mark.parametrize(
    ("kernel", "kept"), [((1, 1), (1, 1)), ((1, 3), (1, 4)), ((3, 1), (2, 1)), ((3, 3), (2, 4))]
)
def test_a_single_tap_is_not_dilated(kernel: tuple[int, int], kept: tuple[int, int]) -> None:
    assert make_geometry(Support.dense(1, 1, kernel), dilation=(2, 4)).dilation == kept


@pytest.mark.parametrize(
    ("padding", "symmetric"),
    [
        (1, (1, 1)),
        ((2, 3), (2, 3)),
        ((1, 1, 2, 2), (1, 2)),
        ((0, 1, 2, 2), None),
        ((1, 1, 2, 0), None),
    ],
    ids=str,
)
def test_symmetric_padding_is_told_from_uneven(padding: Any, symmetric: Any) -> None:
    assert make_geometry(DENSE, 1, padding).symmetric_padding == symmetric


def test_ints_carry_the_whole_geometry() -> None:
    geometry = make_geometry(DENSE, (2, 3), (1, 2, 3, 4), (5, 6))
    named = read_ints(geometry.ints(10, 11))
    assert named == (10, 11, DENSE.shape[1:], (2, 3), (1, 2, 3, 4), (5, 6), DENSE.digest)
    assert (named.height, named.width, named.stride) == (10, 11, (2, 3))
    assert (named.pads, named.dilation, named.digest) == ((1, 2, 3, 4), (5, 6), DENSE.digest)


def test_a_geometry_copies_without_its_caches() -> None:
    geometry = make_geometry(DENSE, 2, 1)
    geometry.choices["key"] = "value"
    assert copy.deepcopy(geometry) is geometry
    copied = pickle.loads(pickle.dumps(geometry))
    assert copied.ints(5, 6) == geometry.ints(5, 6)
    assert copied.support == geometry.support
    assert copied.choices == {}


BAD_GEOMETRY: dict[str, tuple[dict[str, Any], str]] = {
    "stride-zero": ({"stride": 0}, r"stride: received 0, expected one or two integers from 1"),
    "stride-negative": ({"stride": (1, -1)}, r"stride: received \(1, -1\)"),
    "stride-fraction": ({"stride": 1.5}, r"stride: received 1\.5"),
    "stride-fractions": ({"stride": (1.0, 2.0)}, r"stride: received \(1\.0, 2\.0\)"),
    "stride-bool": ({"stride": True}, r"stride: received True"),
    "stride-none": ({"stride": None}, r"stride: received None"),
    "stride-of-three": ({"stride": (1, 1, 1)}, r"one or two integers"),
    "stride-of-none": ({"stride": ()}, r"stride: received \(\)"),
    "stride-text": ({"stride": "2"}, r"stride: received 2, expected"),
    "stride-too-large": ({"stride": 2**31}, r"received 2147483648, expected .* to 2147483647"),
    "dilation-zero": ({"dilation": 0}, r"dilation: received 0, expected"),
    "dilation-too-large": ({"dilation": (1, 2**40)}, r"dilation: received \(1, 1099511627776\)"),
    "padding-negative": ({"padding": -1}, r"padding: received -1, expected .* from 0"),
    "padding-fraction": ({"padding": 0.5}, r"padding: received 0\.5"),
    "padding-of-three": ({"padding": (1, 1, 1)}, r"padding: received \(1, 1, 1\)"),
    "padding-one-side-negative": ({"padding": (0, 0, 0, -1)}, r"padding: received \(0, -1\)"),
    "padding-too-large": ({"padding": 2**31}, r"padding: received 2147483648"),
    "padding-word": ({"padding": "full"}, r"received 'full', expected 'same', 'valid' or numbers"),
    "same-with-a-stride": (
        {"padding": "same", "stride": 2},
        r"padding='same': received stride=\(2, 2\), expected stride 1\. Give numbers instead",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_GEOMETRY.values(), ids=BAD_GEOMETRY)
def test_a_bad_geometry_is_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_geometry(DENSE, **arguments)


@pytest.mark.parametrize(
    "what", [np.ones((2, 2, 3, 3), bool), None, "dense"], ids=["mask", "none", "str"]
)
def test_only_a_support_is_a_support(what: Any) -> None:
    with pytest.raises(InputTypeError, match=r"expected a Support\. See Support\.from_mask"):
        make_geometry(what)


# Memory format ----------------------------------------------------------------------------------


def layouts_of(n: int, c: int, h: int, w: int) -> dict[str, Tensor]:
    """The same shape with many strides."""
    wide = torch.randn(n, c + 2, h + 1, w + 2)
    last = wide.contiguous(memory_format=torch.channels_last)
    return {
        "contiguous": torch.randn(n, c, h, w),
        "channels_last": torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last),
        "cropped": wide[:, 1:-1, 1:, 1:-1],
        "channels_last-cropped": last[:, :c, 1:, 1:-1],
        "channels_last-channels": last[:, 1:-1, :h, :w],
        "turned": torch.randn(n, c, w, h).transpose(2, 3),
        "expanded": torch.randn(n, 1, h, w).expand(n, c, h, w),
        "batch-last": torch.randn(c, h, w, n).permute(3, 0, 1, 2),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [1, 3], ids=lambda k: f"{k}x{k}")
def test_memory_format_is_that_of_pytorchs_output(kernel: int, dtype: torch.dtype) -> None:
    for n, c, h, w, f in itertools.product((1, 2), (1, 3), (1, 5), (1, 4), (1, 6)):
        for groups in {1, c} if f % c == 0 else {1}:
            weight = torch.randn(f, c // groups, kernel, kernel).to(dtype)
            for name, x in layouts_of(n, c, h, w).items():
                x = x.to(dtype)
                for layout in LAYOUTS:
                    held = weight.contiguous(memory_format=layout)
                    y = F.conv2d(x, held, padding=kernel // 2, groups=groups)
                    expected = torch.empty(y.shape, memory_format=memory_format(x, held))
                    where = f"{name} {tuple(x.shape)} {x.stride()}, weight {held.stride()}"
                    # A dimension of one element may have any stride.
                    found, wanted = (
                        [step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1]
                        for t in (y, expected)
                    )
                    assert found == wanted, where


def test_memory_format_of_a_live_weight_follows_the_image() -> None:
    x, live = torch.randn(1, 4, 5, 5), torch.randn(7)
    assert memory_format(x, live) == torch.contiguous_format
    x = x.contiguous(memory_format=torch.channels_last)
    assert memory_format(x, live) == torch.channels_last
    assert memory_format(live, x) == torch.channels_last


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((2, 3, 4, 5), (60, 20, 5, 1), False),
        ((2, 3, 4, 5), (60, 1, 15, 3), True),
        ((2, 3, 4, 5), (0, 1, 15, 3), False),
        ((2, 3, 4, 5), (60, 0, 15, 3), False),
        ((0, 3, 4, 5), (60, 1, 15, 3), False),
        ((2, 1, 1, 1), (1, 1, 1, 1), False),
        ((2, 1, 4, 4), (16, 1, 4, 1), True),
        ((2, 1, 4, 4), (16, 16, 4, 1), False),
    ],
    ids=str,
)
def test_channels_last_ties_are_broken_as_in_pytorch(
    shape: tuple[int, ...], stride: tuple[int, ...], expected: bool
) -> None:
    assert like_channels_last(shape, stride) is expected


# Problem ----------------------------------------------------------------------------------------


def problem(support: Support, weight_shape: tuple[int, ...], **changes: Any) -> Problem:
    values: dict[str, Any] = {
        "verb": "fprop",
        "geometry": make_geometry(support, 2, (1, 2, 0, 3)),
        "batch": 5,
        "height": 9,
        "width": 8,
        "dtype": torch.bfloat16,
        "weight_shape": weight_shape,
        "weight_dtype": torch.float32,
        "device": torch.device("cpu"),
        "strides": (1,),
        "channels_last": False,
    }
    return Problem(**(values | changes))


def test_a_problem_gives_shapes_and_counts() -> None:
    support = Support.het(4, 6, 3, p=2)
    p = problem(support, support.shape)
    assert p.support is support
    assert (p.x_shape, p.y_shape, p.output_size) == ((5, 4, 9, 8), (5, 6, 5, 5), (5, 5))
    per_pixel = 6 * (9 * 2 + 2)
    assert p.macs == 5 * 25 * per_pixel
    assert p.dense_macs == 5 * 25 * 6 * 4 * 9
    assert p.bytes_moved == 2 * 5 * (4 * 72 + 6 * 25) + 4 * per_pixel
    assert p.format == torch.contiguous_format
    assert problem(support, support.shape, channels_last=True).format == torch.channels_last


def test_weights_of_every_canonical_shape_are_told_apart() -> None:
    mask = Support.from_mask(random_mask(0, (6, 4, 3, 3)))
    grouped = Support.grouped(4, 6, 3, 2)
    point = Support.from_mask(random_mask(0, (6, 4, 1, 1)))
    assert weight_shapes(mask) == ((6, 4, 3, 3), (mask.live,))
    assert weight_shapes(grouped) == ((6, 4, 3, 3), (grouped.live,), (6, 2, 3, 3))
    assert weight_shapes(point) == ((6, 4, 1, 1), (point.live,), (6, 4))
    assert weight_shapes(DENSE) == ((6, 4, 3, 3), (216,))
    for support in (mask, grouped, point):
        for shape in weight_shapes(support):
            dense = shape in (support.shape, (6, 4))
            assert is_dense_shape(support, shape) is dense
            assert problem(support, shape).live_weight is not dense


# Calls ------------------------------------------------------------------------------------------

GEOMETRY = make_geometry(DENSE, 1, 0)
X, W, BIAS = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(6)


def call(
    x: Tensor = X,
    weight: Tensor = W,
    bias: Tensor | None = BIAS,
    mixed: bool = False,
    geometry: Geometry = GEOMETRY,
) -> None:
    check_call(geometry, x, weight, bias, mixed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_good_calls_pass(dtype: torch.dtype) -> None:
    call(X.to(dtype), W.to(dtype), BIAS.to(dtype))
    call(X.to(dtype), W.to(dtype), None)
    call(X.to(dtype), W.to(dtype).flatten(), None)
    call(X[:0].to(dtype), W.to(dtype), None)
    call(X.to(dtype).transpose(2, 3), W.to(dtype), None)


def test_under_autocast_weight_and_bias_may_be_wider() -> None:
    call(X.bfloat16(), W, BIAS, mixed=True)
    call(X.bfloat16(), W, BIAS.bfloat16(), mixed=True)


BAD_CALLS: dict[str, tuple[dict[str, Any], type, str]] = {
    "input-int": ({"x": X.int()}, InputTypeError, r"input dtype.*torch\.int32.*strided float32"),
    "input-complex": ({"x": X.cfloat()}, InputTypeError, r"input dtype.*torch\.complex64"),
    "input-sparse": ({"x": X.to_sparse()}, InputTypeError, r"torch\.float32, torch\.sparse_coo"),
    "weight-int8": ({"weight": W.char()}, InputTypeError, r"weight dtype.*torch\.int8"),
    "weight-sparse": ({"weight": W.to_sparse()}, InputTypeError, r"weight dtype and layout"),
    "dtypes-differ": (
        {"x": X.double()},
        InputTypeError,
        r"input dtype: received torch\.float64, expected the weight's, torch\.float32.*autocast",
    ),
    "bias-dtype": ({"bias": BIAS.double()}, InputTypeError, r"bias dtype.*float64.*float32"),
    "bias-dtype-mixed": (
        {"x": X.bfloat16(), "bias": BIAS.double(), "mixed": True},
        InputTypeError,
        r"bias dtype: received torch\.float64",
    ),
    "rank-2": ({"x": X[0, 0]}, ArgumentError, r"input shape: received \(5, 5\).*\[C, H, W\]"),
    "rank-5": ({"x": X[None]}, ArgumentError, r"input shape: received \(1, 2, 4, 5, 5\)"),
    "channels": ({"x": X[:, :3]}, ArgumentError, r"input channels: received 3, expected 4, as in"),
    "weight-shape": (
        {"weight": W[:, :3]},
        ArgumentError,
        r"weight shape: received \(6, 3, 3, 3\), expected \(6, 4, 3, 3\) or \(216,\) for Support",
    ),
    "weight-transposed": ({"weight": W.transpose(0, 1)}, ArgumentError, r"received \(4, 6, 3, 3\)"),
    "live-length": ({"weight": W.flatten()[:-1]}, ArgumentError, r"received \(215,\)"),
    "bias-length": ({"bias": BIAS[:5]}, ArgumentError, r"bias shape: received \(5,\).*\(6,\)"),
    "bias-2d": ({"bias": BIAS[:, None]}, ArgumentError, r"bias shape: received \(6, 1\)"),
    "devices": (
        {"weight": W.to("meta")},
        ArgumentError,
        r"devices.*: received cpu, meta, cpu, expected one device\. Move them together",
    ),
    "bias-device": ({"bias": BIAS.to("meta")}, ArgumentError, r"received cpu, cpu, meta"),
    "no-output": ({"x": X[:, :, :2]}, ArgumentError, r"2x5, which gives a 0x3 output.*Enlarge"),
    "no-height": ({"x": X[:, :, :0]}, ArgumentError, r"input size: received 0x5"),
    "no-pixels-but-padding": (
        {"x": X[:, :, :0], "geometry": make_geometry(DENSE, 1, 2)},
        ArgumentError,
        r"input size: received 0x5",
    ),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_is_refused_in_words(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(**arguments)


@pytest.mark.parametrize("stride", [1, 2, 7])
def test_an_image_is_refused_exactly_where_pytorch_refuses_it(stride: int) -> None:
    weight = torch.ones(1, 1, 3, 2)
    geometry = make_geometry(Support.dense(1, 1, (3, 2)), stride, (1, 0), (2, 3))
    for height, width in itertools.product(range(1, 7), repeat=2):
        x = torch.ones(1, 1, height, width)
        try:
            F.conv2d(x, weight, None, stride, (1, 0), (2, 3))
        except RuntimeError:
            with pytest.raises(ArgumentError, match=f"input size: received {height}x{width}"):
                check_image(geometry, height, width)
        else:
            check_image(geometry, height, width)
