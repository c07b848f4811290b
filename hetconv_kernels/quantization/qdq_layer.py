# SPDX-License-Identifier: Apache-2.0
"""A quantised layer in QDQ form: one convolution, or a composition, with its epilogue."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..composition import ConvPart, compose, index_of, joined_results, pointwise_pads, split_pads
from ..errors import HetconvError, InputTypeError
from ..nn.quantized import QuantizedLayer, QuantizedLinear
from ..packing import dense_weight
from ..pooling import Pool, max_pooled
from ..problem import Geometry, Pads
from .checks import limits
from .scheme import Scale

SUMS = ("fused", "rounded")


def operators() -> Any:
    """Returns PyTorch's ``quantized_decomposed`` operators.

    Raises:
        HetconvError: this PyTorch does not have them.
    """
    try:
        import torch.ao.quantization.fx._decomposed  # registers them
    except ImportError as error:
        raise HetconvError(
            f"PyTorch {torch.__version__} has no operators quantized_decomposed, which PT2E "
            "programs and QDQ files are written in: use a version that has them (2.4 to 2.13)."
        ) from error
    return torch.ops.quantized_decomposed


def quantized(x: Tensor, scale: Scale) -> Tensor:
    """Quantises by PyTorch's operator."""
    y: Tensor = operators().quantize_per_tensor(
        x, scale.scale, scale.zero_point, *limits(scale.dtype), scale.dtype
    )
    return y


def dequantized(x: Tensor, scale: Scale) -> Tensor:
    """Dequantises by PyTorch's operator."""
    y: Tensor = operators().dequantize_per_tensor(
        x, scale.scale, scale.zero_point, *limits(scale.dtype), scale.dtype
    )
    return y


def finished(y: Tensor, act: str, scale: Scale | None) -> Tensor:
    """Activates and, where there is a Scale, quantises."""
    if act == "relu":
        y = torch.relu(y)
    elif act == "relu6":
        y = torch.clamp(y, 0.0, 6.0)
    return y if scale is None else quantized(y, scale)


def pooled(y: Tensor, pool: Pool, scale: Scale | None) -> Tensor:
    """Max-pools numbers, or integers of a Scale."""
    if scale is None:
        return max_pooled(y, pool)
    return quantized(max_pooled(dequantized(y, scale), pool), scale)


class QdqConv(nn.Module):
    """Numbers that one convolution of integers stands for: dequantised, convolved in float.

    Args:
        layer: whose integers it has.
        part: which of them.
        pads: of the convolution.
        biased: whether it adds the biases.
    """

    weight: Tensor
    weight_scale: Tensor
    zeros: Tensor
    channels: Tensor | None

    def __init__(self, layer: QuantizedLayer, part: ConvPart, pads: Pads, biased: bool) -> None:
        super().__init__()
        geometry: Geometry = layer._geometry
        assert layer.x is not None
        self.x, self.biased = layer.x, biased
        self.linear = isinstance(layer, QuantizedLinear)
        self.groups = part.groups
        self.stride = list(geometry.stride)
        self.dilation = [1, 1] if part.centre else list(geometry.dilation)
        around, padding = split_pads(pads)
        self.padding, self.pads = list(padding), around if any(around) else None
        weight = part.weight(dense_weight(layer.support, layer.weight, torch.int8))
        device = weight.device
        filters = slice(None) if part.filters is None else index_of(part.filters, device)
        channels = None if part.channels is None else index_of(part.channels, device)
        self.register_buffer("channels", channels)
        self.register_buffer("weight", weight.flatten(1) if self.linear else weight)
        scale = layer.weight_scale[filters].clone()
        self.register_buffer("weight_scale", scale)
        self.register_buffer("zeros", torch.zeros_like(scale, dtype=torch.int64))
        if biased:
            self.register_buffer("bias", layer.bias[filters].clone())
            self.register_buffer("bias_scale", (scale.double() * self.x.scale).float())

    def forward(self, x: Tensor) -> Tensor:
        """Convolves.  # integers [N, C, H, W] -> float32 [N, F, OH, OW]"""
        if self.channels is not None:
            x = x.index_select(1, self.channels)
        if self.pads is not None:
            top, bottom, left, right = self.pads
            x = F.pad(x, (left, right, top, bottom), value=self.x.zero_point)
        image = dequantized(x, self.x)
        per_filter = operators().dequantize_per_channel
        weight = per_filter(self.weight, self.weight_scale, self.zeros, 0, -128, 127, torch.int8)
        bias = None
        if self.biased:
            least, greatest = -(2**31), 2**31 - 1
            bias = per_filter(
                self.bias, self.bias_scale, self.zeros, 0, least, greatest, torch.int32
            )
        if self.linear:
            return F.linear(image, weight, bias)
        return F.conv2d(image, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class QdqLayer(nn.Module):
    """A `QuantizedConv2d` or `QuantizedLinear` in QDQ form, with the same arguments.

    Args:
        layer: the layer.
        form: ``"dense"`` or ``"composition"``.
        sums: ``"fused"`` or ``"rounded"``.

    Attributes:
        partials: Scales of what is rounded before a sum, by name; none where sums are fused.
        seen: ranges of what has no Scale yet, while batches run; None afterwards.
    """

    order: Tensor | None

    def __init__(self, layer: QuantizedLayer, form: str = "dense", sums: str = "fused") -> None:
        super().__init__()
        if layer.x is None:
            raise InputTypeError(layer._uncalibrated())
        geometry, linear = layer._geometry, isinstance(layer, QuantizedLinear)
        self.y, self.residual, self.act, self.pool = layer.y, layer.residual, layer.act, layer.pool
        groups = 1 if linear else layer.support.uniform_groups or 1
        rings: tuple[ConvPart, ...] = (ConvPart(None, None, groups, layer.support.mask),)
        point, order = None, None
        found = compose(geometry) if form == "composition" and not linear else None
        if found is not None:
            rings, order, point = found
        self.rings = nn.ModuleList(
            QdqConv(layer, part, geometry.pads, point is None) for part in rings
        )
        self.pointwise = None
        if point is not None:
            self.pointwise = QdqConv(layer, point, pointwise_pads(geometry), True)
        indices = None if order is None else index_of(order, layer.weight.device)
        self.register_buffer("order", indices)
        self.partials: dict[str, Scale] = {}
        self.seen: dict[str, tuple[float, float]] | None = None
        # What leaves in float needs no rounding, and has no range to derive one from.
        self.rounded = sums == "rounded" and self.y is not None
        if self.rounded and self.residual is not None:
            self.partials["sum"] = self._before_residual()
        if self.rounded and self.pointwise is not None:
            self.seen = {}

    @property
    def steps(self) -> int:
        """How many steps of the output a number may be off the integer layer's.

        One for a float output stands for its own rounding.
        """
        if self.y is None:
            return 1
        return math.floor(1 + sum(s.scale for s in self.partials.values()) / (2 * self.y.scale))

    def settle_(self) -> None:
        """Turns the ranges that were seen into Scales."""
        assert self.seen is not None
        assert self.y is not None
        for name, (low, high) in self.seen.items():
            self.partials[name] = Scale.of_range(low, high, self.y.dtype)
        self.seen = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Computes in float what stands between integers."""
        if self.pointwise is None and residual is None:
            # Each part is finished on its own, so that a runtime sees whole convolutions.
            results = [finished(ring(x), self.act, self.y) for ring in self.rings]
            y = joined_results(results, self.order)
            return y if self.pool is None else pooled(y, self.pool, self.y)
        name = "rings" if self.pointwise is not None else "sum"
        y = self._rounded(name, [ring(x) for ring in self.rings], self.order)
        if self.pointwise is not None:
            y = y + self._rounded("pointwise", [self.pointwise(x)], None)
            if residual is not None:
                y = self._rounded("sum", [y], None)
        if residual is not None:
            assert self.residual is not None
            y = y + dequantized(residual, self.residual)
        y = finished(y, self.act, self.y)
        return y if self.pool is None else pooled(y, self.pool, self.y)

    def _rounded(self, name: str, results: list[Tensor], order: Tensor | None) -> Tensor:
        """Joins partial results, on their Scale where there is one."""
        scale = self.partials.get(name)
        if scale is not None:
            return dequantized(joined_results([quantized(y, scale) for y in results], order), scale)
        y = joined_results(results, order)
        if self.seen is not None:
            low, high = self.seen.get(name, (0.0, 0.0))
            self.seen[name] = (min(low, float(y.min())), max(high, float(y.max())))
        return y

    def _before_residual(self) -> Scale:
        """Holds what a residual can bring into the range of the output; the rest saturates."""
        y, r = self.y, self.residual
        assert y is not None
        assert r is not None
        least, greatest = ((q - y.zero_point) * y.scale for q in y.bounds(self.act))
        return Scale.of_range(min(least - r.high, 0.0), max(greatest - r.low, 0.0), y.dtype)
