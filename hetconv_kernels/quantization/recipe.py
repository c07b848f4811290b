# SPDX-License-Identifier: Apache-2.0
"""What the readers of QDQ files write down: operations on named values, constants among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, FileError, mismatch
from ..nn.quantized import QuantizedLayer
from ..packing import live_weight
from .checks import check_no_overflow
from .scheme import Scale, reach


@dataclass(frozen=True)
class Operation:
    """One operation of what is read.

    Attributes:
        kind: ``quantize``, ``dequantize``, ``conv``, ``linear``, ``add``, ``act``, ``max_pool``,
            ``mean``, ``pad``, ``move``, ``cat`` or ``same``.
        where: node and operator in the file's own words, for messages.
        inputs: names of the values that are read; "" for one that is not there.
        output: name of the value that it gives.
        settings: what else the kind needs, see the methods of `_Assembler`.
    """

    kind: str
    where: str
    inputs: tuple[str, ...]
    output: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A network as operations.

    Attributes:
        inputs: names of its inputs.
        outputs: names of its outputs.
        operations: in an order in which they can run.
        constants: values that are known beforehand.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    constants: dict[str, Tensor]


def refused(where: str, received: object, expected: object, way_out: str = "") -> FileError:
    """Makes the error for what cannot be imported; it says the node and its operator."""
    return FileError(mismatch(where, received, expected, way_out))


@dataclass
class Fixed:
    """A constant; with a scale, integers that stand for numbers.

    Attributes:
        values: integers, or numbers.
        scale: one, or one for each index along the axis; None for plain numbers.
        axis: of the scales.
    """

    values: Tensor
    scale: Tensor | None = None
    axis: int = 0

    def numbers(self) -> Tensor:
        """Returns the numbers in float64."""
        if self.scale is None:
            return self.values.double()
        scale = self.scale.double()
        if scale.numel() > 1:
            shape = [1] * self.values.dim()
            shape[self.axis] = -1
            scale = scale.view(shape)
        return self.values.double() * scale


def rounded(values: Tensor, s: dict[str, Any]) -> Tensor:
    """Quantises a constant, for files that keep their weights in float."""
    shape = [1] * values.dim()
    if s["scale"].numel() > 1:
        shape[s["axis"]] = -1
    scale, zero = s["scale"].double().view(shape), s["zero_point"].double().view(shape)
    return ((values.double() / scale).round() + zero).clamp(s["low"], s["high"]).to(s["dtype"])


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """Writes the weight of a grouped convolution as a dense one.  # [F, C, KH, KW]"""
    if groups == 1:
        return weight
    filters, channels, *kernel = weight.shape
    dense = weight.new_zeros(filters, channels * groups, *kernel)
    rows = filters // groups
    for g in range(groups):
        own = slice(g * rows, (g + 1) * rows)
        dense[own, g * channels : (g + 1) * channels] = weight[own]
    return dense


def filled(
    layer: QuantizedLayer, dense: Tensor, weight: Fixed, bias: Fixed | None,
    more: Tensor | None,
) -> QuantizedLayer:  # fmt: skip
    """Gives a layer the integers and scales that were read.

    Raises:
        ArgumentError: they are no signed weights with a scale per filter, or could overflow.
    """
    if dense.dtype != torch.int8:
        raise ArgumentError(mismatch("dtype of the weight", dense.dtype, "torch.int8"))
    assert weight.scale is not None
    assert layer.x is not None
    scale, filters = weight.scale.float(), layer.support.filters
    if scale.numel() == 1:
        scale = scale.expand(filters)
    elif weight.axis != 0 or len(scale) != filters:
        received = f"{len(scale)} along axis {weight.axis}"
        raise ArgumentError(mismatch("scales of the weight", received, f"{filters} along axis 0"))
    # A filter of zeros may come with the scale zero; whatever it is multiplied with is zero.
    empty = dense.flatten(1).eq(0).all(1) & (scale <= 0)
    scale = torch.where(empty, torch.ones_like(scale), scale).contiguous()
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        received = "zero, negative, NaN or Inf"
        raise ArgumentError(mismatch("scales of the weights", received, "positive numbers"))
    unit = scale.double() * layer.x.scale
    steps = torch.zeros(filters, dtype=torch.float64)
    if bias is not None:
        own = bias.scale is not None and torch.allclose(bias.scale.double(), unit, 1e-6, 0.0)
        steps = bias.values.double() if own else bias.numbers().flatten() / unit
    if more is not None:
        steps = steps + more / unit
    steps = steps.round()
    if not bool((steps.abs() < 2.0**31).all()):
        raise ArgumentError(
            mismatch("bias", "larger than int32 in steps of its scale, or no number", "int32")
        )
    live = live_weight(layer.support, dense.contiguous())
    integers = steps.to(torch.int32)
    check_no_overflow(reach(layer.support, live), integers)
    return layer.set_(live, scale, integers)


def identifier(name: str) -> str:
    """Makes an attribute's name of a value's."""
    plain = "".join(c if c.isalnum() else "_" for c in name).strip("_") or "value"
    return f"n{plain}" if plain[0].isdigit() else plain


def scale_of(op: Operation) -> Scale:
    """Returns the Scale of a quantisation of activations."""
    s = op.settings
    if s["scale"].numel() != 1:
        raise refused(op.where, f"{s['scale'].numel()} scales of an activation", "one")
    return Scale(float(s["scale"]), int(s["zero_point"]), s["dtype"])


def float_conv(
    weight: Fixed,
    bias: Fixed | None,
    settings: dict[str, Any],
    padding: tuple[int, int],
) -> nn.Conv2d:
    """Makes a convolution in float of constants."""
    filters, channels, kh, kw = weight.values.shape
    groups = settings["groups"]
    layer = nn.Conv2d(
        channels * groups, filters, (kh, kw), settings["stride"], padding, settings["dilation"],
        groups, bias is not None,
    )  # fmt: skip
    return _with_numbers(layer, weight, bias)


def float_linear(weight: Fixed, bias: Fixed | None) -> nn.Linear:
    """Makes a fully connected layer in float of constants."""
    filters, channels = weight.values.shape
    return _with_numbers(nn.Linear(channels, filters, bias is not None), weight, bias)


def _with_numbers(layer: Any, weight: Fixed, bias: Fixed | None) -> Any:
    layer.weight = nn.Parameter(weight.numbers().float())
    if bias is not None:
        layer.bias = nn.Parameter(bias.numbers().float())
    return layer
