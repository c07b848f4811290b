# SPDX-License-Identifier: Apache-2.0
"""The reference in 8 bits against plain loops over integers, its extremes, and its refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.packing import live_weight
from hetconv_kernels.pooling import Pool
from hetconv_kernels.problem import Geometry, make_geometry
from hetconv_kernels.quantization import reference
from hetconv_kernels.quantization.checks import Output
from tests import int8_cases as cases

SUPPORTS = {
    "dense": hk.Support.dense(5, 4, 3),
    "het": hk.Support.het(6, 4, 3, p=2),
    "grouped": hk.Support.grouped(6, 4, (1, 3), 2),
    "irregular": hk.Support.from_mask(np.random.default_rng(0).random((4, 5, 2, 3)) < 0.4),
    "empty filter": hk.Support.from_mask(np.arange(4)[:, None, None, None] * np.ones((4, 5, 1, 1))
                                         > 0),
}  # fmt: skip
PLACES = [(1, 0, 1), (2, 1, 1), ((1, 2), (2, 0, 1, 3), (2, 1))]


def integers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, dtype=dtype)


def loops(x: torch.Tensor, w: torch.Tensor, geometry: Geometry, zx: int, bias: Any) -> np.ndarray:
    """Accumulates in Python's own integers, one product after another."""
    (sh, sw), (dh, dw), pads = geometry.stride, geometry.dilation, geometry.pads
    mask, images, weights = geometry.support.mask, x.numpy(), w.numpy()
    oh, ow = geometry.output_size(*x.shape[2:])
    acc = np.zeros((len(x), w.shape[0], oh, ow), np.int64) + bias.numpy()[:, None, None]
    for f, c, ky, kx in np.argwhere(mask):
        for oy in range(oh):
            for ox in range(ow):
                iy, ix = oy * sh + ky * dh - pads[0], ox * sw + kx * dw - pads[2]
                if 0 <= iy < x.shape[2] and 0 <= ix < x.shape[3]:
                    acc[:, f, oy, ox] += (images[:, c, iy, ix].astype(np.int64) - zx) * int(
                        weights[f, c, ky, kx]
                    )
    return acc


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
def test_a_convolution_is_the_sum_over_live_weights(support, place, dtype) -> None:
    geometry = make_geometry(support, *place)
    x, w = integers(dtype, 2, support.channels, 6, 7), integers(torch.int8, *support.shape)
    bias = torch.randint(-5000, 5000, (support.filters,), dtype=torch.int32)
    multiplier = torch.rand(support.filters) * 0.01 + 1e-4
    zx = 77 if dtype == torch.uint8 else -9
    acc = loops(x, w, geometry, zx, bias)
    r = integers(torch.int8, *acc.shape)
    # Every operation in float32 and rounded by numpy, none contracted.
    t = acc.astype(np.float32) * multiplier.numpy()[:, None, None]
    t = t + (r.numpy().astype(np.int32) - 5).astype(np.float32) * np.float32(0.3)
    truth = np.rint(np.clip(t, np.float32(20 - 30), np.float32(240 - 30))).astype(np.int64) + 30
    for weight in (w, live_weight(support, w), reference.pack(w, support)):
        y = reference.fprop(
            x, weight, support, geometry, multiplier=multiplier, bias=bias, x_zero_point=zx,
            output=Output(30, 20, 240, torch.uint8), residual=r,
            residual_multiplier=0.3, residual_zero_point=5,
        )  # fmt: skip
        assert np.array_equal(y.numpy(), truth.astype(np.uint8))
        assert y.is_contiguous(memory_format=torch.channels_last)


def arguments(**changes: Any) -> dict[str, Any]:
    """Returns the arguments that have usual values, with some changed."""
    usual = {"x_zero_point": 0, "y_zero_point": 0, "low": 0, "high": 255, "out_dtype": torch.uint8}
    return cases.gathered(usual | changes)


def pointwise(x, w, *, multiplier=1.0, bias=0, **changes) -> torch.Tensor:
    """Convolves one pixel with one filter."""
    support = hk.Support.dense(len(x), 1, 1)
    return reference.fprop(
        x.view(1, -1, 1, 1), w.view(1, -1, 1, 1), support, make_geometry(support),
        multiplier=torch.tensor([multiplier]), bias=torch.tensor([bias], dtype=torch.int32),
        **arguments(**changes),
    ).flatten()  # fmt: skip


@pytest.mark.parametrize(
    ("total", "multiplier", "result"),
    [
        (1, 0.5, 0), (3, 0.5, 2), (5, 0.5, 2), (7, 0.5, 4),  # half to even
        (511, 0.5, 255), (510, 0.5, 255), (100000, 1.0, 255), (-100000, 1.0, 0), (-1, 0.5, 0),
        (2**24 + 1, 2.0**-17, 128),
    ],
)  # fmt: skip
def test_rounding_is_half_to_even_and_saturation_is_exact(total, multiplier, result) -> None:
    zero = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int8)
    assert int(pointwise(*zero, multiplier=multiplier, bias=total)) == result


def test_an_accumulator_above_2_24_is_rounded_to_float32() -> None:
    zero = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int8)
    y = pointwise(*zero, bias=2**24 + 1, low=-1e30, high=1e30, out_dtype=torch.float32)
    assert float(y) == 2**24  # the tie goes to even


@pytest.mark.parametrize("x", [0, 255])
@pytest.mark.parametrize("w", [-127, 127])
@pytest.mark.parametrize("zero_point", [0, 255])
def test_the_extremes_of_every_operand(x: int, w: int, zero_point: int) -> None:
    count = 64
    y = pointwise(
        torch.full((count,), x, dtype=torch.uint8), torch.full((count,), w, dtype=torch.int8),
        x_zero_point=zero_point, low=-1e30, high=1e30, out_dtype=torch.float32,
    )  # fmt: skip
    assert float(y) == count * (x - zero_point) * w


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_zero_points_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = integers(dtype, 1, 3, 4, 4)
    for zero in (info.min, info.max):
        same = reference.requantize(
            x, multiplier=1.0, x_zero_point=zero, output=Output(zero, info.min, info.max, dtype),
        )  # fmt: skip
        assert torch.equal(same, x)


def test_sums_and_means_are_rounded_operation_by_operation() -> None:
    a, b = integers(torch.uint8, 2, 3, 4, 5), integers(torch.int8, 2, 3, 4, 5)
    y = reference.add(
        a, b, a_multiplier=0.1, b_multiplier=0.7, a_zero_point=3, b_zero_point=-4,
        output=Output(9, 9, 200, torch.uint8),
    )  # fmt: skip
    first = (a.numpy().astype(np.int32) - 3).astype(np.float32) * np.float32(0.1)
    t = first + (b.numpy().astype(np.int32) + 4).astype(np.float32) * np.float32(0.7)
    truth = np.rint(np.clip(t, np.float32(0), np.float32(191))).astype(np.int64) + 9
    assert np.array_equal(y.numpy(), truth)
    m = reference.mean(
        a, multiplier=0.37, x_zero_point=100, output=Output(50, 0, 255, torch.uint8),
    )  # fmt: skip
    total = a.numpy().astype(np.int64).sum((2, 3), keepdims=True) - 20 * 100
    t = total.astype(np.float32) * np.float32(0.37 / 20)
    assert np.array_equal(m.numpy(), np.rint(np.clip(t, -50, 205)).astype(np.int64) + 50)


def test_max_pooling_sees_only_pixels_that_exist() -> None:
    x = torch.full((1, 1, 3, 3), -128, dtype=torch.int8)
    y = reference.max_pool(x, Pool((3, 3), (2, 2), (1, 1)))
    assert torch.equal(y, torch.full((1, 1, 2, 2), -128, dtype=torch.int8))


def test_quantising_infinities_saturates_and_nan_becomes_zero() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([nan, inf, -inf, 3e38, 0.5, 1.5, -0.0]).view(1, -1, 1, 1)
    q = reference.quantize_tensor(x, 1.0, 7, torch.uint8).flatten().tolist()
    assert q == [7, 255, 0, 255, 7, 9, 7]


def test_an_empty_batch_gives_an_empty_result() -> None:
    support = SUPPORTS["het"]
    y = reference.fprop(
        torch.zeros(0, 6, 5, 5, dtype=torch.uint8), torch.zeros(support.shape, dtype=torch.int8),
        support, make_geometry(support), multiplier=torch.ones(4),
        bias=torch.zeros(4, dtype=torch.int32), **arguments(),
    )  # fmt: skip
    assert y.shape == (0, 4, 3, 3)


# Refusals ----------------------------------------------------------------------------------------

X = torch.zeros(1, 2, 3, 3, dtype=torch.uint8)
BAD_SCALES = (0.0, -1.0, float("nan"), float("inf"), 1e-45, 1e39)


@pytest.mark.parametrize("scale", BAD_SCALES)
def test_scales_that_are_no_positive_numbers_are_refused(scale: float) -> None:
    for call in (
        lambda: reference.quantize_tensor(X.float(), scale, 0, torch.uint8),
        lambda: reference.dequantize(X, scale, 0),
        lambda: reference.requantize(X, multiplier=scale, **arguments()),
        lambda: reference.mean(X, multiplier=scale, **arguments()),
    ):
        with pytest.raises(ArgumentError, match="positive number"):
            call()


@pytest.mark.parametrize("zero", [-1, 256, 1.0, True])
def test_zero_points_outside_of_the_dtype_are_refused(zero) -> None:
    for call in (
        lambda: reference.quantize_tensor(X.float(), 1.0, zero, torch.uint8),
        lambda: reference.dequantize(X, 1.0, zero),
        lambda: reference.requantize(X, multiplier=1.0, **arguments(x_zero_point=zero)),
        lambda: reference.requantize(X, multiplier=1.0, **arguments(y_zero_point=zero)),
    ):
        with pytest.raises(ArgumentError, match="integer from 0 to 255"):
            call()


@pytest.mark.parametrize(("low", "high"), [(-1, 255), (0, 256), (9, 8), (0.5, 9), (0, 1e99)])
def test_bounds_that_the_output_does_not_hold_are_refused(low, high) -> None:
    with pytest.raises(ArgumentError, match="low and high"):
        reference.requantize(X, multiplier=1.0, **arguments(low=low, high=high))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.bool], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputTypeError, match="uint8 or int8"):
        reference.requantize(X.to(dtype), multiplier=1.0, **arguments())
    with pytest.raises(InputTypeError):
        reference.requantize(X, multiplier=1.0, **arguments(out_dtype=dtype))


def test_a_filter_that_could_overflow_is_refused_at_the_first_one_that_could() -> None:
    w = torch.full((66311,), 127, dtype=torch.int8)  # 127 · 255 · 66311 < 2**31 < … 66312
    x = torch.full((66311,), 255, dtype=torch.uint8)
    room = 2**31 - 1 - 127 * 255 * 66311
    y = pointwise(x, w, bias=room, low=0.0, high=1e30, out_dtype=torch.float32)
    assert float(y) == 2.0**31  # 2**31 - 1 in float32
    with pytest.raises(ArgumentError, match="overflow"):
        pointwise(x, w, bias=room + 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_multipliers_that_are_not_finite_are_refused(bad: float) -> None:
    w = torch.zeros(2, dtype=torch.int8)
    with pytest.raises(ArgumentError, match="multiplier"):
        pointwise(X[0, :, 0, 0], w, multiplier=bad)
