# SPDX-License-Identifier: Apache-2.0
"""What a call in 8 bits must be like: dtypes, zero points, bounds, scales; no int32 overflow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, InputTypeError, mismatch
from ..problem import weight_shapes
from ..support import Support

# The activations' dtypes with the least and the greatest value of each.
INTEGER_RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
_NAMES = "uint8 or int8"


class Output(NamedTuple):
    """What the result of an operation in 8 bits becomes.

    Bounds are in units of y: a ReLU is ``low=zero_point`` for 8 bits and ``low=0.0`` for float32.

    Attributes:
        zero_point: of y; not read for a float32 output.
        low: the least value of y.
        high: the greatest value of y.
        dtype: uint8, int8 or float32.
    """

    zero_point: int
    low: float
    high: float
    dtype: torch.dtype


def limits(dtype: torch.dtype) -> tuple[int, int]:
    """Returns the least and the greatest value of an activation's dtype.

    Raises:
        InputTypeError: neither uint8 nor int8.
    """
    found = INTEGER_RANGES.get(dtype)
    if found is None:
        raise InputTypeError(mismatch("dtype of quantised activations", dtype, f"torch.{_NAMES}"))
    return found


def check_activation(name: str, x: Tensor) -> None:
    """Refuses what is no quantised image.  # uint8 or int8 [N, C, H, W]

    Raises:
        InputTypeError: another dtype or layout.
        ArgumentError: another rank.
    """
    if x.dtype not in INTEGER_RANGES or x.layout != torch.strided:
        raise InputTypeError(
            mismatch(
                f"{name} dtype and layout",
                f"{x.dtype}, {x.layout}",
                f"strided {_NAMES}",
                "Quantise it first, see hetconv_kernels.nn.Quantize.",
            )
        )
    if x.dim() != 4:
        raise ArgumentError(mismatch(f"{name} shape", tuple(x.shape), "[N, C, H, W]"))


def check_zero_point(name: str, value: int, dtype: torch.dtype) -> None:
    """Refuses a zero point that is no integer of the dtype's range.

    Raises:
        ArgumentError: not an integer, or out of range.
        InputTypeError: the dtype is neither uint8 nor int8.
    """
    least, greatest = limits(dtype)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= greatest:
        raise ArgumentError(
            mismatch(name, value, f"an integer from {least} to {greatest} for {dtype}")
        )


def check_operand(name: str, x: Tensor, zero_point: int, zero_name: str = "x_zero_point") -> None:
    """Refuses what is no quantised image, or a zero point that its integers do not have.

    Raises:
        ArgumentError, InputTypeError: see `check_activation` and `check_zero_point`.
    """
    check_activation(name, x)
    check_zero_point(zero_name, zero_point, x.dtype)


def check_cpu(name: str, x: Tensor) -> None:
    """Refuses what the compiled engine cannot read.

    Raises:
        ArgumentError: it is on another device.
    """
    if not x.is_cpu:
        raise ArgumentError(
            mismatch(f"{name} device", x.device, "cpu", "Use the backend 'reference'.")
        )


def output_zero(output: Output) -> int:
    """Returns the zero point of an output, 0 for one in float32; errors as `check_zero_point`."""
    if output.dtype not in INTEGER_RANGES:
        return 0
    check_zero_point("y_zero_point", output.zero_point, output.dtype)
    return output.zero_point


def check_scale(name: str, value: float) -> None:
    """Refuses a scale or multiplier that is not a positive normal number of float32.

    Raises:
        ArgumentError: zero, negative, NaN, infinite, or beyond float32.
    """
    least, greatest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    # A NaN fails both comparisons.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (least <= value <= greatest)
    ):
        raise ArgumentError(
            mismatch(
                name,
                value,
                f"a positive number from {least:.3g} to {greatest:.3g}",
                "A layer that was not calibrated has no scales.",
            )
        )


def check_bounds(output: Output) -> None:
    """Refuses bounds of an output that its dtype does not hold.

    Raises:
        ArgumentError: low above high, NaN, or for 8 bits no integers of the dtype's range.
        InputTypeError: the dtype is none of uint8, int8 and float32.
    """
    _, low, high, dtype = output
    if dtype == torch.float32:
        if not low <= high:
            raise ArgumentError(mismatch("low and high", (low, high), "low <= high, no NaN"))
        return
    least, greatest = limits(dtype)
    whole = all(math.isfinite(v) and int(v) == v for v in (low, high))
    if not whole or not least <= low <= high <= greatest:
        raise ArgumentError(
            mismatch(
                "low and high",
                (low, high),
                f"integers with {least} <= low <= high <= {greatest} for {dtype}",
            )
        )


def check_weight(weight: Tensor, support: Support) -> None:
    """Refuses what is no canonical int8 weight.  # int8 [F, C, KH, KW] or [live]

    Raises:
        InputTypeError: another dtype.
        ArgumentError: another shape.
    """
    if weight.dtype != torch.int8:
        raise InputTypeError(mismatch("weight dtype", weight.dtype, "torch.int8"))
    shapes = weight_shapes(support)
    if tuple(weight.shape) not in shapes:
        text = " or ".join(map(str, shapes))
        raise ArgumentError(mismatch("weight shape", tuple(weight.shape), f"{text} for {support}"))


def check_per_filter(name: str, values: Tensor, filters: int, dtype: torch.dtype) -> None:
    """Refuses what is not one number of the dtype per filter.  # [F]

    Raises:
        InputTypeError: another dtype.
        ArgumentError: another shape.
    """
    if values.dtype != dtype:
        raise InputTypeError(mismatch(f"{name} dtype", values.dtype, dtype))
    if tuple(values.shape) != (filters,):
        raise ArgumentError(mismatch(f"{name} shape", tuple(values.shape), f"({filters},)"))


def check_no_overflow(reach: Tensor, bias: Tensor) -> None:
    """Refuses filters whose accumulator could leave int32, whatever the activations are.

    Args:
        reach: the sum of |w| over each filter's live weights.  # int64 [F]
        bias: of each filter.  # int32 [F]

    Raises:
        ArgumentError: 255 · reach + |bias| is 2**31 or more for a filter.
    """
    bound = reach * 255 + bias.to(torch.int64).abs()
    worst = int(bound.max()) if bound.numel() else 0
    if worst >= 2**31:
        raise ArgumentError(
            mismatch(
                "sum of |w| * 255 + |bias| of a filter",
                worst,
                f"less than 2**31 = {2**31}",
                "Its int32 accumulator could overflow: keep this layer in float.",
            )
        )


def check_same(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Refuses operands of different shapes or devices.

    Raises:
        ArgumentError: shapes or devices differ.
    """
    first = tensors[0]
    for name, tensor in zip(names[1:], tensors[1:], strict=True):
        if tensor.shape != first.shape:
            raise ArgumentError(
                mismatch(
                    f"{name} shape", tuple(tensor.shape), f"{tuple(first.shape)}, as {names[0]}"
                )
            )
        if tensor.device != first.device:
            raise ArgumentError(
                mismatch(f"{name} device", tensor.device, f"{first.device}, as {names[0]}")
            )
