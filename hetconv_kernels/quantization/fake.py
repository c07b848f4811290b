# SPDX-License-Identifier: Apache-2.0
"""Fake quantisation: float layers that compute with the numbers that 8 bits can hold.

They have the Scales of the integer layers that `to_integer` makes of them, so a network that is
trained so is the integer network, up to a step where float32 rounds a tie the other way. Gradients
go straight through the rounding; where an activation saturates they are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import conv2d
from ..nn.base import STAND_IN, ForcedBackend, as_step
from ..nn.quantized import QuantizedConv2d, QuantizedLinear
from ..nn.quantized_layer import QuantizedLayer
from ..nn.quantized_steps import (
    Dequantize,
    Quantize,
    QuantizedAdd,
    QuantizedAvgPool2d,
    QuantizedMaxPool2d,
    QuantizedPad,
    Requantize,
)
from ..packing import bits_on
from ..pooling import Pool, max_pooled
from ..problem import Geometry
from ..support import Support
from .checks import limits
from .scheme import WEIGHT_MAX, Scale, bounds, filter_of, weight_scale


def fake_quantize(x: Tensor, scale: Scale) -> Tensor:
    """Rounds to the numbers that a Scale can hold; the gradient passes where nothing saturates."""
    least, greatest = limits(scale.dtype)
    q = (x.detach() / scale.scale).round() + scale.zero_point
    numbers = (q.clamp(least, greatest) - scale.zero_point) * scale.scale
    return through(numbers, x.clamp(scale.low, scale.high))


def through(value: Tensor, gradient: Tensor) -> Tensor:
    """Returns a value whose gradient is that of another tensor.

    The difference of a tensor and itself is an exact zero.
    """
    return value.detach() + (gradient - gradient.detach())


def clamped(x: Tensor, act: str) -> Tensor:
    """Applies an activation that is a clamp."""
    low, high = bounds(act)
    return x if act == "none" else x.clamp(low, high)


class FakeQuantizedLayer(ForcedBackend):
    """A convolution or fully connected layer in training under fake quantisation.

    The weights are the live ones alone, so what a compressor has removed stays removed. The scale
    of each filter follows its weights; the Scales of activations are those of the calibration.

    Args:
        kind: what `to_integer` makes: `QuantizedConv2d` or `QuantizedLinear`.
        geometry: Support, stride, pads and dilation.
        weight: the live weights.  # float32 [live]
        shift: the biases.  # float32 [F]
        x: Scale of the input.
        y: Scale of the output, None for float32.
        residual: Scale of what is added, if anything is.
        act: ``"none"``, ``"relu"`` or ``"relu6"``.
        pool: max-pooling of that, or None.
        backend: forces an engine; None follows `use_backend`.
    """

    def __init__(
        self,
        kind: type[QuantizedLayer],
        geometry: Geometry,
        weight: Tensor,
        shift: Tensor,
        x: Scale,
        y: Scale | None,
        residual: Scale | None = None,
        act: str = "none",
        pool: Pool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.kind, self._geometry, self.act, self.pool = kind, geometry, act, pool
        self.x, self.y, self.residual, self.backend = x, y, residual, backend
        self.weight = nn.Parameter(weight.detach().clone())
        self.shift = nn.Parameter(shift.detach().clone())

    @property
    def support(self) -> Support:
        """Which weights exist."""
        return self._geometry.support

    def _apply(self, fn: Any, recurse: bool = True) -> FakeQuantizedLayer:
        super()._apply(fn, recurse)
        bits_on(self.support, self.weight.device)
        return self

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Returns weights and biases as their integers stand for them.  # [live], [F]"""
        weight, shift = self.weight, self.shift
        scale = weight_scale(self.support, weight, shift, self.x.scale).double()
        steps = scale[filter_of(self.support, weight.device)]
        q = (weight.detach().double() / steps).round().clamp(-WEIGHT_MAX, WEIGHT_MAX)
        unit = scale * self.x.scale
        bias = (shift.detach().double() / unit).round() * unit
        return (
            through((q * steps).to(weight.dtype), weight),
            through(bias.to(shift.dtype), shift),
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolves (multiplies) with rounded weights and rounds the output."""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x, residual)
            return recorded
        weight, shift = self.rounded()
        linear = self.kind is QuantizedLinear
        image = x.reshape(-1, x.shape[-1], 1, 1) if linear else x
        y = conv2d(image, weight, shift, self._geometry, self._backend_code())
        y = clamped(y if residual is None else y + residual, self.act)
        if self.pool is not None:
            y = max_pooled(y, self.pool)
        y = y if self.y is None else fake_quantize(y, self.y)
        return y.reshape(*x.shape[:-1], y.shape[1]) if linear else y

    def to_integer(self) -> QuantizedLayer:
        """Returns the layer in 8 bits.

        Raises:
            ArgumentError: a weight is NaN or infinite, or an accumulator could leave int32.
        """
        extras: dict[str, Any] = {}
        if self.kind is QuantizedConv2d:
            extras = {"residual": self.residual, "pool": self.pool}
        layer = self.kind(
            self._geometry,
            x=self.x,
            y=self.y,
            act=self.act,
            backend=self.backend,
            device=self.weight.device,
            **extras,
        )
        return layer.set_float_(self.weight.detach(), self.shift.detach()).eval()

    def extra_repr(self) -> str:
        """Says sizes and Scales."""
        f, c, kh, kw = self.support.shape
        y = "float32" if self.y is None else str(self.y)
        return f"{c}, {f}, kernel_size={(kh, kw)}, x={self.x}, y={y}, act={self.act}"


class FakeStep(nn.Module):
    """A step between quantised layers, computed in float with the numbers of its Scales.

    Args:
        step: the step in 8 bits.
    """

    def __init__(self, step: ForcedBackend) -> None:
        super().__init__()
        self._step = (step,)  # not a part: it computes nothing here

    def forward(self, *operands: Tensor) -> Tensor:
        """Computes what the step computes."""
        if any(type(operand) is STAND_IN for operand in operands):
            recorded: Tensor = as_step(self, *operands)
            return recorded
        (step,) = self._step
        numbers = _MEANINGS[type(step)](step, *operands)
        y = getattr(step, "y", None)
        return numbers if y is None else fake_quantize(numbers, y)

    def to_integer(self) -> ForcedBackend:
        """Returns the step in 8 bits."""
        return self._step[0]

    def extra_repr(self) -> str:
        """Says which step it is."""
        return repr(self._step[0])


def _averaged(step: Any, x: Tensor) -> Tensor:
    y = F.adaptive_avg_pool2d(x, step.size)
    return y if step.keepdim else y.flatten(1)


_MEANINGS: dict[type[nn.Module], Callable[..., Tensor]] = {
    Quantize: lambda step, x: x,
    Dequantize: lambda step, x: x,
    Requantize: lambda step, x: clamped(x, step.act),
    QuantizedAdd: lambda step, a, b: clamped(a + b, step.act),
    QuantizedMaxPool2d: lambda step, x: max_pooled(x, step.pool),
    QuantizedAvgPool2d: _averaged,
    QuantizedPad: lambda step, x: F.pad(x, step.pads),
}
