# SPDX-License-Identifier: Apache-2.0
"""The native engine in 8 bits: unsigned or signed activations, signed weights, int32 sums.

The functions have the names, arguments and meaning of `hetconv_kernels.quantization.reference`, and
give the same bits. The engine reads and writes channels_last: an operand in another layout is
copied into it first, at every call (``x.contiguous(memory_format=torch.channels_last)``), so keep
activations in that format.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..arena import allocate
from ..errors import ArgumentError, InputTypeError, mismatch
from ..packing import dense_weight
from ..pooling import Pool
from ..problem import Geometry, check_image, is_dense_shape
from ..quantization.checks import (
    Output,
    check_activation,
    check_bounds,
    check_cpu,
    check_operand,
    check_per_filter,
    check_same,
    check_scale,
    check_weight,
    check_zero_point,
    output_zero,
)
from ..support import Support

try:
    from .. import _cpu
except ImportError:  # nothing is compiled here
    _cpu = None  # type: ignore[assignment]

_LAST = torch.channels_last
_CPU = torch.device("cpu")
# Of numbers that are not brought to a Scale.
_FLOAT32 = Output(0, -math.inf, math.inf, torch.float32)
_NAMES = {torch.uint8: "uint8", torch.int8: "int8", torch.float32: "float32"}
# The instruction set; "" takes the best one here, or what HETCONV_ISA says.
_ISA = ""
# What is in the engine's vectors, "filters" or "pixels"; "auto" takes what costs less.
_FORM = "auto"


class Packed(Protocol):
    """A weight made ready for the engine: what `pack` returns, and `fprop` takes instead of it."""

    @property
    def bytes(self) -> int:
        """The size of the packed weights."""
        ...


def is_built() -> bool:
    """Tells whether the compiled engine is here."""
    return _cpu is not None


def isas() -> list[str]:
    """Lists the instruction sets that this machine can run, the fastest first."""
    return list(_cpu.int8_isas()) if _cpu is not None else []


def pack(weight: Tensor, support: Support) -> Packed:
    """Makes a weight ready for many calls; it is copied, so later changes do not show.

    Args:
        weight: canonical; dead entries are ignored.  # int8 [F, C, KH, KW] or [live]
        support: which weights exist.

    Raises:
        InputTypeError: the weight is not int8.
        ArgumentError: its shape is not the Support's, it is not on the CPU, or the Support is
            beyond the engine's integers.
    """
    check_weight(weight, support)
    check_cpu("weight", weight)
    plan = plan_of(support)
    # The packing itself leaves dead entries out.
    whole = is_dense_shape(support, weight.shape)
    dense = weight.view(support.shape) if whole else dense_weight(support, weight, torch.int8)
    packed: Packed = plan.pack(dense.data_ptr(), dense.stride(), torch.get_num_threads())
    return packed


def plan_of(support: Support) -> Any:
    """Returns the engine's lowering of a Support, made once and kept with it."""
    key = ("cpu int8", _ISA, _FORM)
    plan = support.derived.get(key)
    if plan is None:
        mask: Any = np.ascontiguousarray(support.mask).view(np.uint8)
        plan = support.derived[key] = _cpu.Int8Plan(mask, _ISA, _FORM)
    return plan


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
    """Convolves integers and requantises; see `hetconv_kernels.quantization.reference.fprop`.

    A weight that is a tensor is packed anew at every call; `pack` makes one ready for many.

    Returns:
        y in channels_last, pooled where asked for.  # [N, F, OH, OW]

    Raises:
        InputTypeError: a dtype that is not one of those above.
        ArgumentError: a shape, device, zero point, bound or multiplier that does not fit, or a
            filter whose accumulator could leave int32.
    """
    _check_x("input", x, x_zero_point)
    check_bounds(output)
    n, c, h, w = x.shape
    f = support.filters
    if c != support.channels:
        raise ArgumentError(mismatch("input channels", c, f"{support.channels}"))
    check_image(geometry, h, w)
    packed: Any = pack(weight, support) if isinstance(weight, Tensor) else weight
    check_per_filter("multiplier", multiplier, f, torch.float32)
    check_per_filter("bias", bias, f, torch.int32)
    check_cpu("multiplier", multiplier)
    check_cpu("bias", bias)
    zero, (_, low, high, out_dtype) = output_zero(output), output
    out = geometry.output_size(h, w)
    # A sum of two, and float32, are pooled in a pass of their own.
    inside = pool is not None and residual is None and out_dtype != torch.float32
    if pool is not None:
        pool.check(*out)
    size = pool.output_size(*out) if inside and pool is not None else out
    y = _empty(support, (n, f, *size), out_dtype)
    r, r_pointer = residual, 0
    if r is not None:
        _check_x("residual", r, residual_zero_point, "residual_zero_point")
        check_scale("residual_multiplier", residual_multiplier)
        check_same(("output", "residual"), (y, r))
        r = r.contiguous(memory_format=_LAST)
        r_pointer = r.data_ptr()
    x = x.contiguous(memory_format=_LAST)
    multiplier, bias = multiplier.contiguous(), bias.contiguous()
    pads = geometry.pads
    window = _window(pool, size) if inside and pool is not None else None
    arguments = (
        x.data_ptr(),
        x.dtype == torch.int8,
        x_zero_point,
        (n, h, w),
        y.data_ptr(),
        _NAMES[out_dtype],
        zero,
        low,
        high,
        out,
        geometry.stride,
        (pads[0], pads[2]),
        geometry.dilation,
        multiplier.data_ptr(),
        bias.data_ptr(),
        r_pointer,
        r is not None and r.dtype == torch.int8,
        residual_multiplier,
        residual_zero_point,
        torch.get_num_threads(),
    )
    if packed.fprop(*arguments, window) and (pool is None or inside):
        return y
    if inside:  # not even one row of the pooled image fits in the cache
        y = _empty(support, (n, f, *out), out_dtype)
        packed.fprop(*arguments[:4], y.data_ptr(), *arguments[5:], None)
    assert pool is not None
    if out_dtype == torch.float32:
        pooled = torch.nn.functional.max_pool2d(y, pool.kernel, pool.stride, pool.padding)
        return pooled.contiguous(memory_format=_LAST)
    return max_pool(y, pool)


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
    """Adds and requantises; see `hetconv_kernels.quantization.reference.add`.

    Raises:
        InputTypeError: a dtype that is not uint8, int8, or for the output float32.
        ArgumentError: shapes or devices that differ, or a number that is out of range.
    """
    _check_x("a", a, a_zero_point, "a_zero_point")
    _check_x("b", b, b_zero_point, "b_zero_point")
    check_scale("a_multiplier", a_multiplier)
    check_scale("b_multiplier", b_multiplier)
    check_same(("a", "b"), (a, b))
    check_bounds(output)
    operands = (a, a_zero_point, a_multiplier), (b, b_zero_point, b_multiplier)
    return _summed(operands, output)


def requantize(
    x: Tensor,
    *,
    multiplier: float,
    x_zero_point: int,
    output: Output,
) -> Tensor:
    """Brings x to another scale; see `hetconv_kernels.quantization.reference.requantize`.

    Raises:
        InputTypeError: a dtype that is not uint8, int8, or for the output float32.
        ArgumentError: another rank or device, or a number that is out of range.
    """
    _check_x("input", x, x_zero_point)
    check_scale("multiplier", multiplier)
    check_bounds(output)
    return _summed(((x, x_zero_point, multiplier),), output)


def max_pool(x: Tensor, pool: Pool) -> Tensor:
    """Max-pools the integers; see `hetconv_kernels.quantization.reference.max_pool`.

    Raises:
        InputTypeError: a dtype that is not uint8 or int8.
        ArgumentError: another rank or device, or no window has a place in the image.
    """
    check_activation("input", x)
    check_cpu("input", x)
    n, c, h, w = x.shape
    pool.check(h, w)
    size = pool.output_size(h, w)
    y = _empty("max_pool", (n, c, *size), x.dtype)
    x = x.contiguous(memory_format=_LAST)
    _kernels().max_pool(
        x.data_ptr(),
        x.dtype == torch.int8,
        (n, h, w, c),
        y.data_ptr(),
        torch.get_num_threads(),
        _window(pool, size),
    )
    return y


def mean(
    x: Tensor,
    *,
    multiplier: float,
    x_zero_point: int,
    output: Output,
) -> Tensor:
    """Averages over height and width; see `hetconv_kernels.quantization.reference.mean`.

    Raises:
        InputTypeError: a dtype that is not uint8, int8, or for the output float32.
        ArgumentError: another rank or device, a number that is out of range, no pixels, or 2**23
            pixels and more.
    """
    _check_x("input", x, x_zero_point)
    check_scale("multiplier", multiplier)
    check_bounds(output)
    n, c, h, w = x.shape
    if not 0 < h * w < 2**23:
        raise ArgumentError(mismatch("pixels to average", h * w, f"from 1 to {2**23 - 1}"))
    zero, (_, low, high, out_dtype) = output_zero(output), output
    y = _empty("mean", (n, c, 1, 1), out_dtype)
    x = x.contiguous(memory_format=_LAST)
    _kernels().mean(
        x.data_ptr(),
        x.dtype == torch.int8,
        x_zero_point,
        (n, h, w, c),
        multiplier / (h * w),
        y.data_ptr(),
        _NAMES[out_dtype],
        zero,
        low,
        high,
        torch.get_num_threads(),
    )
    return y


def quantize_tensor(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """Quantises float32, NaN to the zero point; see `hetconv_kernels.quantization.reference`.

    Raises:
        InputTypeError: x is not float32, or the dtype is neither uint8 nor int8.
        ArgumentError: a rank, device, scale or zero point that does not fit.
    """
    if x.dtype != torch.float32 or x.layout != torch.strided:
        raise InputTypeError(
            mismatch("dtype to be quantised", f"{x.dtype}, {x.layout}", "strided float32")
        )
    if x.dim() != 4:
        raise ArgumentError(mismatch("input shape", tuple(x.shape), "[N, C, H, W]"))
    check_cpu("input", x)
    check_scale("scale", scale)
    check_zero_point("zero_point", zero_point, dtype)
    y = _empty("quantize", tuple(x.shape), dtype)
    x = x.resolve_neg().contiguous(memory_format=_LAST)
    _kernels().quantize(
        x.data_ptr(),
        x.numel(),
        scale,
        zero_point,
        dtype == torch.int8,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def dequantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Returns float32(x − zero_point) · scale, in channels_last.

    Raises:
        InputTypeError: a dtype that is not uint8 or int8.
        ArgumentError: a rank, device, scale or zero point that does not fit.
    """
    _check_x("input", x, zero_point, "zero_point")
    check_scale("scale", scale)
    return _summed(((x, zero_point, scale),), _FLOAT32)


def _summed(
    operands: tuple[tuple[Tensor, int, float], ...],
    output: Output,
) -> Tensor:
    """Adds one or two operands, each with its zero point and multiplier, and requantises."""
    zero, (_, low, high, out_dtype) = output_zero(output), output
    y = _empty("sum", tuple(operands[0][0].shape), out_dtype)
    held = [(x.contiguous(memory_format=_LAST), point, m) for x, point, m in operands]
    flat = [(x.data_ptr(), x.dtype == torch.int8, point, m) for x, point, m in held]
    if len(flat) == 1:
        flat.append((0, False, 0, 1.0))
    finish = y.data_ptr(), _NAMES[out_dtype], zero, low, high
    _kernels().sum(y.numel(), *flat[0], *flat[1], *finish, torch.get_num_threads())
    return y


def _kernels() -> Any:
    found = _known_kernels.get(_ISA)
    if found is None:
        found = _known_kernels[_ISA] = _cpu.int8_kernels(_ISA)
    return found


_known_kernels: dict[str, Any] = {}


@lru_cache(256)
def _window(pool: Pool, size: tuple[int, int]) -> Any:
    """Returns the engine's description of a pooling that gives so many pixels."""
    return _cpu.Pool(*pool, size)


def _empty(owner: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return allocate(owner, shape, dtype, _CPU, _LAST)


def _check_x(name: str, x: Tensor, zero_point: int, zero_name: str = "x_zero_point") -> None:
    check_operand(name, x, zero_point, zero_name)
    check_cpu(name, x)
