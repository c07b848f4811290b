# SPDX-License-Identifier: Apache-2.0
"""Scale: what an 8-bit number stands for; and how weights and biases become integers.

    number = scale · (q − zero_point)

Activations have one Scale a tensor. Weights are symmetric, their zero point is 0, with a scale
for each filter, from the live weights alone. A bias is an int32 in units of
scale(x) · scale(w[f]), which is what the accumulator counts in.

Example: a ReLU's output from 0 to 5.1 as uint8 has the scale 5.1 / 255 = 0.02 and the zero point
0; the number 1.0 is stored as 50. A filter with weights from -0.635 to 0.5 has the scale
0.635 / 127 = 0.005; the weight 0.5 is stored as 100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, mismatch
from ..support import Support
from .checks import Output, check_no_overflow, check_scale, check_zero_point, limits

# The largest magnitude of a weight: symmetric, -128 is not used.
WEIGHT_MAX = 127
# A bias takes at most an eighth of the accumulator's range.
_BIAS_MAX = 2.0**28
_TINY = float(torch.finfo(torch.float32).tiny)
_DTYPES = {"uint8": torch.uint8, "int8": torch.int8}


@dataclass(frozen=True)
class Scale:
    """What the 8-bit numbers of a tensor stand for: scale · (q − zero_point).

    Args:
        scale: of one step; rounded to float32.
        zero_point: the integer that stands for 0.
        dtype: uint8 or int8.

    Raises:
        ArgumentError: a scale that is zero, negative, NaN, infinite or beyond float32, or a zero
            point that is no integer of the dtype's range.
        InputTypeError: another dtype.
    """

    scale: float
    zero_point: int
    dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        check_scale("scale", self.scale)
        check_zero_point("zero_point", self.zero_point, self.dtype)
        object.__setattr__(self, "scale", float(np.float32(self.scale)))

    @classmethod
    def of_range(cls, low: float, high: float, dtype: torch.dtype = torch.uint8) -> Scale:
        """Returns the finest Scale that reaches from low to high; 0 is always exact.

        Args:
            low: the least number, taken as 0 where it is positive.
            high: the greatest number, taken as 0 where it is negative.
            dtype: uint8 or int8.

        Raises:
            ArgumentError: a bound is NaN or infinite, or low is above high.
            InputTypeError: another dtype.
        """
        least, greatest = limits(dtype)
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ArgumentError(
                mismatch("range of activations", (low, high), "finite numbers, low <= high")
            )
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / (greatest - least)
        if step == 0:
            return cls(1.0, least if dtype == torch.uint8 else 0, dtype)
        step = min(max(step, _TINY), float(torch.finfo(torch.float32).max))
        zero = round(least - low / step)
        return cls(step, min(max(zero, least), greatest), dtype)

    @property
    def low(self) -> float:
        """The least number that can be stored."""
        return (limits(self.dtype)[0] - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The greatest number that can be stored."""
        return (limits(self.dtype)[1] - self.zero_point) * self.scale

    def bounds(self, act: str = "none") -> tuple[int, int]:
        """Returns the least and greatest integer that an activation gives.

        Args:
            act: ``"none"``, ``"relu"`` or ``"relu6"``.

        Raises:
            ArgumentError: an activation that is no clamp.
        """
        least, greatest = limits(self.dtype)
        low, high = bounds(act)
        if low == 0.0:
            least = self.zero_point
        if math.isfinite(high):
            greatest = max(least, min(greatest, round(high / self.scale) + self.zero_point))
        return least, greatest

    def to_dict(self) -> dict[str, Any]:
        """Returns the Scale as plain data; the float survives JSON bit for bit."""
        kind = str(self.dtype).removeprefix("torch.")
        return {"scale": self.scale, "zero_point": self.zero_point, "dtype": kind}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scale:
        """Reads what `to_dict` wrote.

        Raises:
            ArgumentError, InputTypeError: see the class.
            KeyError: something is missing, or the dtype has another name.
        """
        return cls(data["scale"], data["zero_point"], _DTYPES[data["dtype"]])

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind}({self.scale:.4g}, {self.zero_point})"


def bounds(act: str) -> tuple[float, float]:
    """Returns the numbers between which an activation clamps.

    Raises:
        ArgumentError: an activation that is no clamp.
    """
    known = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
    if act not in known:
        raise ArgumentError(
            mismatch(
                "activation of a quantised layer",
                repr(act),
                f"one of {', '.join(known)}",
                "Others are computed in float between the layers.",
            )
        )
    return known[act]


def output_of(y: Scale | None, act: str) -> Output:
    """Returns what a layer's results become: integers of a Scale or, for None, float32.

    Raises:
        ArgumentError: an activation that is no clamp.
    """
    if y is None:
        return Output(0, *bounds(act), torch.float32)
    return Output(y.zero_point, *y.bounds(act), y.dtype)


def ratio(numerator: Scale, denominator: Scale | None) -> float:
    """Returns the multiplier from one Scale to another, or to float32 (None), in double."""
    return numerator.scale / (1.0 if denominator is None else denominator.scale)


# Weights ----------------------------------------------------------------------------------------


def filter_of(support: Support, device: torch.device) -> Tensor:
    """Returns the filter that each entry of a live vector belongs to.  # int64 [live]"""
    key = ("filter of a live weight", device)
    found: Tensor | None = support.derived.get(key)
    if found is None:
        counts = support.mask.sum((1, 2, 3))
        with torch.inference_mode(False):
            found = torch.as_tensor(np.repeat(np.arange(support.filters), counts), device=device)
        if type(found) is Tensor:
            support.derived[key] = found
    return found


def weight_scale(support: Support, live: Tensor, shift: Tensor, x_scale: float) -> Tensor:
    """Returns the scale of each filter: its largest live weight, in magnitude, becomes 127.

    Where the bias is so much larger than the weights that it would leave its part of the
    accumulator, or all weights of a filter are zero, the scale is that of the bias.

    Args:
        support: which weights exist.
        live: the weights that exist.  # float [live]
        shift: the bias.  # float [F]
        x_scale: of the input.

    Returns:
        The scales.  # float32 [F]
    """
    live, shift = live.detach().double(), shift.detach().double()
    largest = torch.zeros(support.filters, dtype=torch.float64, device=live.device)
    largest.scatter_reduce_(0, filter_of(support, live.device), live.abs(), "amax")
    scale = torch.maximum(largest / WEIGHT_MAX, shift.abs() / (x_scale * _BIAS_MAX))
    scale = torch.where(scale == 0, 1.0, scale.clamp_min(_TINY))
    return scale.to(torch.float32)


def quantize_weight(
    support: Support, live: Tensor, shift: Tensor, x_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes integers of the weights and biases of a layer.

    Args:
        support: which weights exist.
        live: the weights that exist.  # float [live]
        shift: the bias.  # float [F]
        x_scale: of the input.

    Returns:
        The weights int8 [live], their scales float32 [F], the biases int32 [F].

    Raises:
        ArgumentError: a weight or bias is NaN or infinite, or a filter is so long that its
            accumulator could leave int32.
    """
    for name, values in (("weight", live), ("bias", shift)):
        if not bool(torch.isfinite(values).all()):
            raise ArgumentError(mismatch(f"values of the {name}", "NaN or Inf", "finite numbers"))
    scale = weight_scale(support, live, shift, x_scale)
    filters = filter_of(support, live.device)
    weight = (live.double() / scale.double()[filters]).round()
    weight = weight.clamp(-WEIGHT_MAX, WEIGHT_MAX).to(torch.int8)
    bias = (shift.double() / (scale.double() * x_scale)).round().to(torch.int32)
    check_no_overflow(reach(support, weight), bias)
    return weight, scale, bias


def reach(support: Support, weight: Tensor) -> Tensor:
    """Sums the magnitudes of each filter's live weights.  # int8 [live] -> int64 [F]"""
    total = torch.zeros(support.filters, dtype=torch.int64, device=weight.device)
    return total.index_add_(0, filter_of(support, weight.device), weight.to(torch.int64).abs())


def multiplier(x: Scale, weight: Tensor, y: Scale | None) -> Tensor:
    """Returns sx · sw[f] / sy (sx · sw[f] for a float32 output): in float64, rounded once.

    Args:
        x: Scale of the input.
        weight: scales of the filters.  # float32 [F]
        y: Scale of the output, None for float32.

    Returns:
        One number a filter.  # float32 [F]

    Raises:
        ArgumentError: a scale that is zero, negative, NaN or infinite, or a multiplier that
            float32 does not hold.
    """
    if not bool(((weight > 0) & torch.isfinite(weight)).all()):
        raise ArgumentError(
            mismatch("scales of the weights", "zero, negative, NaN or Inf", "positive numbers")
        )
    exact = weight.double() * x.scale / (1.0 if y is None else y.scale)
    rounded = exact.to(torch.float32)
    if not bool(torch.isfinite(rounded).all()):
        raise ArgumentError(
            mismatch("multiplier", float(exact.max()), "a number that float32 holds")
        )
    return rounded
