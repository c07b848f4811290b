# SPDX-License-Identifier: Apache-2.0
"""The operations in 8 bits in plain PyTorch: what every engine has to equal, bit for bit.

Integers are exact (sums below 2**53 in float64); every float32 operation is rounded once, to
nearest, and none is contracted with another. An activation q stands for the number
scale · (q − zero_point). What a result becomes is said by an `Output`.

Every result is in channels_last; operands may be laid out in any way. The engines' faces
(`hetconv_kernels.backends.cpu_int8`) have these names and arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.common import pad_image
from ..errors import ArgumentError, InputTypeError, mismatch
from ..packing import dense_weight
from ..pooling import Pool, max_pooled
from ..problem import Geometry, check_image
from ..support import Support
from .checks import (
    Output,
    check_activation,
    check_bounds,
    check_no_overflow,
    check_operand,
    check_per_filter,
    check_same,
    check_scale,
    check_weight,
    check_zero_point,
    limits,
)


class Packed(NamedTuple):
    """A weight made ready: what `pack` returns and `fprop` takes in place of the weight.

    Attributes:
        dense: dead entries zero.  # float64 [F, C, KH, KW]
        reach: the sum of |w| of each filter.  # int64 [F]
    """

    dense: Tensor
    reach: Tensor


def pack(weight: Tensor, support: Support) -> Packed:
    """Makes a weight ready for many calls.

    Args:
        weight: canonical; dead entries are ignored.  # int8 [F, C, KH, KW] or [live]
        support: which weights exist.

    Raises:
        InputTypeError: the weight is not int8.
        ArgumentError: its shape is not the Support's.
    """
    check_weight(weight, support)
    dense = dense_weight(support, weight, torch.float64)
    return Packed(dense, dense.abs().sum((1, 2, 3)).to(torch.int64))


def fprop(
    x: Tensor,
    weight: Tensor | Packed,
    support: Support,
    geometry: Geometry,
    *,
    multiplier: Tensor,
    bias: Tensor,
    x_zero_point: int,
    output: Output,
    residual: Tensor | None = None,
    residual_multiplier: float = 1.0,
    residual_zero_point: int = 0,
    pool: Pool | None = None,
) -> Tensor:
    """Convolves integers and requantises.

        acc = bias[f] + Σ (x − x_zero_point) · w[f]                                 int32, exact
        t   = float32(acc) · multiplier[f] (+ float32(r − zr) · residual_multiplier)
        y   = rint(clamp(t, low − zy, high − zy)) + zy        or, in float32, clamp(t, low, high)

    Outside the image x counts as its zero point. With a pool, that is max-pooled.

    Args:
        x: activations.  # uint8 or int8 [N, C, H, W]
        weight: canonical, dead entries ignored, or what `pack` made.  # int8
        support: which weights exist.
        geometry: Support, stride, pads and dilation.
        multiplier: sx · sw[f] / sy, for a float32 output sx · sw[f].  # float32 [F]
        bias: in units of sx · sw[f].  # int32 [F]
        x_zero_point: of x.
        output: zero point, bounds and dtype of y.
        residual: added before the clamp.  # uint8 or int8 [N, F, OH, OW]
        residual_multiplier: sr / sy, for a float32 output sr.
        residual_zero_point: of the residual.
        pool: max-pooling of the result, or None.

    Returns:
        y in channels_last, pooled where asked for.  # [N, F, OH, OW]

    Raises:
        InputTypeError: a dtype that is not one of those above.
        ArgumentError: a shape, zero point, bound or multiplier that does not fit, or a filter
            whose accumulator could leave int32.
    """
    check_operand("input", x, x_zero_point)
    check_bounds(output)
    if x.shape[1] != support.channels:
        raise ArgumentError(mismatch("input channels", x.shape[1], f"{support.channels}"))
    check_image(geometry, x.shape[2], x.shape[3])
    packed = weight if isinstance(weight, Packed) else pack(weight, support)
    check_per_filter("multiplier", multiplier, support.filters, torch.float32)
    check_per_filter("bias", bias, support.filters, torch.int32)
    if not bool(torch.isfinite(multiplier).all()):
        raise ArgumentError(mismatch("multiplier", "NaN or Inf", "finite numbers"))
    check_no_overflow(packed.reach, bias)
    centred = pad_image(x.to(torch.float64) - x_zero_point, geometry.pads)
    acc = F.conv2d(centred, packed.dense, None, geometry.stride, 0, geometry.dilation)
    acc = acc + bias.to(torch.float64)[:, None, None]
    t = acc.to(torch.float32) * multiplier[:, None, None]
    if residual is not None:
        check_operand("residual", residual, residual_zero_point, "residual_zero_point")
        check_scale("residual_multiplier", residual_multiplier)
        check_same(("output", "residual"), (t, residual))
        t = t + _scaled(residual, residual_zero_point, residual_multiplier)
    y = _finish(t, output)
    return y if pool is None else _pooled(y, pool)


def add(
    a: Tensor,
    b: Tensor,
    *,
    a_multiplier: float,
    b_multiplier: float,
    a_zero_point: int,
    b_zero_point: int,
    output: Output,
) -> Tensor:
    """Adds: rint(clamp(float32(a − za) · ma + float32(b − zb) · mb, …)) + zy.

    Args:
        a: activations.  # uint8 or int8 [N, C, H, W]
        b: of the same shape.  # uint8 or int8 [N, C, H, W]
        a_multiplier: sa / sy, for a float32 output sa.
        b_multiplier: sb / sy, for a float32 output sb.
        a_zero_point: of a.
        b_zero_point: of b.
        output: zero point, bounds and dtype of y.

    Returns:
        y in channels_last.  # [N, C, H, W]

    Raises:
        InputTypeError: another dtype.
        ArgumentError: shapes that differ, or a number that is out of range.
    """
    for name, operand, zero, scale in (
        ("a", a, a_zero_point, a_multiplier),
        ("b", b, b_zero_point, b_multiplier),
    ):
        check_operand(name, operand, zero, f"{name}_zero_point")
        check_scale(f"{name}_multiplier", scale)
    check_same(("a", "b"), (a, b))
    check_bounds(output)
    t = _scaled(a, a_zero_point, a_multiplier) + _scaled(b, b_zero_point, b_multiplier)
    return _finish(t, output)


def requantize(
    x: Tensor,
    *,
    multiplier: float,
    x_zero_point: int,
    output: Output,
) -> Tensor:
    """Brings x to another scale: rint(clamp(float32(x − zx) · multiplier, …)) + zy.

    Args and errors as `add`, with ``multiplier`` = sx / sy.

    Returns:
        y in channels_last.  # [N, C, H, W]
    """
    check_operand("input", x, x_zero_point)
    check_scale("multiplier", multiplier)
    check_bounds(output)
    return _finish(_scaled(x, x_zero_point, multiplier), output)


def max_pool(x: Tensor, pool: Pool) -> Tensor:
    """Max-pools the integers, over the pixels that exist.

    Args:
        x: activations.  # uint8 or int8 [N, C, H, W]
        pool: the windows.

    Returns:
        y, of x's scale and zero point, in channels_last.  # [N, C, PH, PW]

    Raises:
        InputTypeError: another dtype.
        ArgumentError: no window has a place in the image.
    """
    check_activation("input", x)
    return _pooled(x, pool)


def mean(
    x: Tensor,
    *,
    multiplier: float,
    x_zero_point: int,
    output: Output,
) -> Tensor:
    """Averages over height and width: rint(clamp(float32(Σ x − n · zx) · m, …)) + zy.

    n is the number of pixels and m = float32(multiplier / n), the quotient in float64.

    Args:
        x: activations.  # uint8 or int8 [N, C, H, W]
        multiplier: sx / sy, for a float32 output sx; a double.
        x_zero_point: of x.
        output: zero point, bounds and dtype of y.

    Returns:
        y in channels_last.  # [N, C, 1, 1]

    Raises:
        InputTypeError: another dtype.
        ArgumentError: a number that is out of range, no pixels, or 2**23 pixels and more, whose
            sum int32 does not hold.
    """
    check_operand("input", x, x_zero_point)
    check_scale("multiplier", multiplier)
    check_bounds(output)
    pixels = x.shape[2] * x.shape[3]
    if not 0 < pixels < 2**23:
        raise ArgumentError(mismatch("pixels to average", pixels, f"from 1 to {2**23 - 1}"))
    total = x.to(torch.int64).sum((2, 3), keepdim=True) - pixels * x_zero_point
    t = total.to(torch.float32) * _float32(multiplier / pixels, x.device)
    return _finish(t, output)


def quantize_tensor(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """Quantises: clamp(rint(x / scale) + zero_point), the quotient in float32.

    An infinity goes to the end of the range; a NaN becomes the zero point, which stands for 0.

    Args:
        x: activations.  # float32 [N, C, H, W]
        scale: of the result.
        zero_point: of the result.
        dtype: uint8 or int8.

    Returns:
        q in channels_last.  # [N, C, H, W]

    Raises:
        InputTypeError: x is not float32, or the dtype is neither uint8 nor int8.
        ArgumentError: a rank, scale or zero point that does not fit.
    """
    if x.dtype != torch.float32 or x.layout != torch.strided:
        raise InputTypeError(
            mismatch("dtype to be quantised", f"{x.dtype}, {x.layout}", "strided float32")
        )
    if x.dim() != 4:
        raise ArgumentError(mismatch("input shape", tuple(x.shape), "[N, C, H, W]"))
    check_scale("scale", scale)
    check_zero_point("zero_point", zero_point, dtype)
    t = x / _float32(scale, x.device)
    return _finish(torch.where(t.isnan(), 0.0, t), Output(zero_point, *limits(dtype), dtype))


def dequantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Returns the numbers that integers stand for: float32(x − zero_point) · scale.

    Args:
        x: activations.  # uint8 or int8 [N, C, H, W]
        scale: of x.
        zero_point: of x.

    Returns:
        The numbers, in channels_last.  # float32 [N, C, H, W]

    Raises:
        InputTypeError: another dtype.
        ArgumentError: a rank, scale or zero point that does not fit.
    """
    check_activation("input", x)
    check_scale("scale", scale)
    check_zero_point("zero_point", zero_point, x.dtype)
    return _like_channels_last(_scaled(x, zero_point, scale))


def _pooled(x: Tensor, pool: Pool) -> Tensor:
    pool.check(x.shape[2], x.shape[3])
    return _like_channels_last(max_pooled(x.to(torch.float32), pool).to(x.dtype))


def _float32(value: float, device: torch.device) -> Tensor:
    """Rounds a number to float32 once; as a Python number PyTorch might carry it wider."""
    return torch.tensor(value, dtype=torch.float32, device=device)


def _scaled(x: Tensor, zero_point: int, multiplier: float) -> Tensor:
    centred = (x.to(torch.int32) - zero_point).to(torch.float32)
    return centred * _float32(multiplier, x.device)


def _finish(t: Tensor, output: Output) -> Tensor:
    """Clamps and, for 8 bits, rounds half to even and adds the zero point."""
    zero_point, low, high, dtype = output
    if dtype == torch.float32:
        return _like_channels_last(t.clamp(low, high))
    check_zero_point("y_zero_point", zero_point, dtype)
    clamped = t.clamp(low - zero_point, high - zero_point)
    return _like_channels_last((clamped.round().to(torch.int32) + zero_point).to(dtype))


def _like_channels_last(y: Tensor) -> Tensor:
    """Copies into a fresh tensor: of one channel or pixel, ``contiguous`` would keep strides."""
    fresh = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    return fresh.copy_(y)
