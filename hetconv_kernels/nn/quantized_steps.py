# SPDX-License-Identifier: Apache-2.0
"""The steps between quantised layers: into 8 bits and out of them, sums, pooling, padding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, InputTypeError, mismatch
from ..pooling import Pool
from ..quantization import ops
from ..quantization.engine import operations
from ..quantization.scheme import Scale, output_of, ratio
from .base import STAND_IN, ForcedBackend, as_step


class QuantizedStep(ForcedBackend):
    """A step with Scales and no weights."""

    # Names of the constructor's arguments, which are attributes too.
    fields: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Returns what the constructor takes, as plain data."""
        return {name: _plain(getattr(self, name)) for name in self.fields}

    @classmethod
    def from_description(cls, data: dict[str, Any]) -> Any:
        """Builds the step that `describe` described.

        Raises:
            ArgumentError, InputTypeError, TypeError, KeyError: what is described makes no sense.
        """
        return cls(**{name: _whole(value) for name, value in data.items()})

    def extra_repr(self) -> str:
        """Says the Scales."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.fields)


def _plain(value: Any) -> Any:
    if isinstance(value, Scale):
        return value.to_dict()
    return [list(part) for part in value] if isinstance(value, Pool) else value


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return Scale.from_dict(value)
    return tuple(map(_whole, value)) if isinstance(value, list | tuple) else value


class Quantize(QuantizedStep):
    """float32 to 8 bits: clamp(rint(x / scale) + zero_point), of any shape.

    Infinities go to the ends of the range, NaN to the zero point.

    Args:
        y: Scale of the output.

    Raises:
        InputTypeError: (forward) the input is not float32.
    """

    fields = ("y",)

    def __init__(self, y: Scale) -> None:
        super().__init__()
        self.y = _scale("y", y)

    def forward(self, x: Tensor) -> Tensor:
        """Quantises.  # float32 [...] -> uint8 or int8 [...]"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        image, s, code = as_image(x), self.y, self._backend_code()
        if ops.by_operator(x):
            ops.refuse_derivatives(x)
            y = torch.ops.hetconv.quantize(image, s.scale, s.zero_point, s.dtype, code)
        else:
            y = operations(x.device, code).quantize_tensor(image, s.scale, s.zero_point, s.dtype)
        return y if x.dim() == 4 else y.reshape(x.shape)


class Dequantize(QuantizedStep):
    """8 bits to float32: (q − zero_point) · scale, of any shape.

    Args:
        x: Scale of the input.
    """

    fields = ("x",)

    def __init__(self, x: Scale) -> None:
        super().__init__()
        self.x = _scale("x", x)

    def forward(self, x: Tensor) -> Tensor:
        """Dequantises.  # uint8 or int8 [...] -> float32 [...]"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        check_dtype(x, self.x)
        image, s, code = as_image(x), self.x, self._backend_code()
        if ops.by_operator(x):
            y = torch.ops.hetconv.dequantize(image, s.scale, s.zero_point, code)
        else:
            y = operations(x.device, code).dequantize(image, s.scale, s.zero_point)
        return y if x.dim() == 4 else y.reshape(x.shape)


class Requantize(QuantizedStep):
    """From one Scale to another, with an activation on the way, of any shape.

    Args:
        x: Scale of the input.
        y: Scale of the output, None for float32.
        act: ``"none"``, ``"relu"`` or ``"relu6"``.
    """

    fields = ("x", "y", "act")

    def __init__(self, x: Scale, y: Scale | None, act: str = "none") -> None:
        super().__init__()
        self.x, self.y, self.act = _scale("x", x), y, act
        self._output = output_of(y, act)

    def forward(self, x: Tensor) -> Tensor:
        """Requantises.  # [...] -> [...]"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        check_dtype(x, self.x)
        y = run_step(self, "requantize", (as_image(x),), (ratio(self.x, self.y),), (self.x,))
        return y if x.dim() == 4 else y.reshape(x.shape)


class QuantizedAdd(QuantizedStep):
    """act(a + b) in 8 bits, of any shape.

    Args:
        a: Scale of the first operand.
        b: Scale of the second.
        y: Scale of the output, None for float32.
        act: ``"none"``, ``"relu"`` or ``"relu6"``.
    """

    fields = ("a", "b", "y", "act")

    def __init__(self, a: Scale, b: Scale, y: Scale | None, act: str = "none") -> None:
        super().__init__()
        self.a, self.b, self.y, self.act = _scale("a", a), _scale("b", b), y, act
        self._output = output_of(y, act)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Adds.  # [...], [...] -> [...]"""
        if type(a) is STAND_IN or type(b) is STAND_IN:
            recorded: Tensor = as_step(self, a, b)
            return recorded
        check_dtype(a, self.a)
        check_dtype(b, self.b)
        scales = (self.a, self.b)
        ratios = tuple(ratio(s, self.y) for s in scales)
        y = run_step(self, "add", (as_image(a), as_image(b)), ratios, scales)
        return y if a.dim() == 4 else y.reshape(a.shape)


class QuantizedMaxPool2d(QuantizedStep):
    """Max-pooling of 8-bit numbers, which keep their Scale.

    Args:
        pool: the windows.
    """

    fields = ("pool",)

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = Pool(*pool)

    def forward(self, x: Tensor) -> Tensor:
        """Pools.  # [N, C, H, W] -> [N, C, PH, PW]"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        code = self._backend_code()
        if ops.by_operator(x):
            y: Tensor = torch.ops.hetconv.qmax_pool(x, ops.pool_ints(self.pool), code)
            return y
        y = operations(x.device, code).max_pool(x, self.pool)
        return y


class QuantizedAvgPool2d(QuantizedStep):
    """Adaptive average pooling in 8 bits; to one pixel it is the mean over the image.

    To another size the output keeps the input's Scale: where the image has that size already it is
    returned as it is, otherwise it is averaged in float32 and quantised again.

    Args:
        x: Scale of the input.
        y: Scale of the output, None for float32; with another size than 1, that of the input.
        size: height and width of the output, in pixels.
        keepdim: whether the output of one pixel is still an image.
    """

    fields = ("x", "y", "size", "keepdim")

    def __init__(
        self, x: Scale, y: Scale | None, size: tuple[int, int] = (1, 1), keepdim: bool = True
    ) -> None:
        super().__init__()
        self.x, self.y, self.keepdim = _scale("x", x), y, keepdim
        height, width = size
        self.size = (height, width)
        self._output = output_of(y, "none")
        if self.size != (1, 1) and (y != x or not keepdim):
            raise ArgumentError(mismatch("y of a pooling to several pixels", y, f"x, {x}"))

    def forward(self, x: Tensor) -> Tensor:
        """Averages.  # [N, C, H, W] -> [N, C, *size] or [N, C]"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        check_dtype(x, self.x)
        if self.size != (1, 1):
            if tuple(x.shape[2:]) == self.size:
                return x
            numbers = Dequantize(self.x)(x)
            return Quantize(self.x)(F.adaptive_avg_pool2d(numbers, self.size))
        y = run_step(self, "mean", (x,), (ratio(self.x, self.y),), (self.x,))
        return y if self.keepdim else y.flatten(1)


class QuantizedPad(QuantizedStep):
    """Pads with the integer that stands for 0.

    Args:
        x: Scale of the input and of the output.
        pads: as ``torch.nn.functional.pad`` takes them: the last dimension first.
    """

    fields = ("x", "pads")

    def __init__(self, x: Scale, pads: tuple[int, ...]) -> None:
        super().__init__()
        self.x, self.pads = _scale("x", x), tuple(pads)

    def forward(self, x: Tensor) -> Tensor:
        """Pads.  # [N, C, H, W] -> [N, C', H', W']"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        check_dtype(x, self.x)
        return F.pad(x, self.pads, value=self.x.zero_point)


# What a file may hold.
STEP_CLASSES: tuple[type[QuantizedStep], ...] = (
    Quantize, Dequantize, Requantize, QuantizedAdd, QuantizedMaxPool2d, QuantizedAvgPool2d,
    QuantizedPad,
)  # fmt: skip


# Pieces -----------------------------------------------------------------------------------------


def _scale(name: str, value: Any) -> Scale:
    if not isinstance(value, Scale):
        raise InputTypeError(mismatch(name, type(value).__name__, "a Scale: calibrate first"))
    return value


def check_dtype(x: Tensor, scale: Scale) -> None:
    """Refuses integers of another dtype than their Scale's.

    Raises:
        InputTypeError: the dtypes differ.
    """
    if x.dtype != scale.dtype:
        raise InputTypeError(mismatch("input dtype", x.dtype, f"{scale.dtype}, as calibrated"))


def as_image(x: Tensor) -> Tensor:
    """Views any tensor as an image, for what treats every number alike.  # [N, C, H, W]"""
    return x if x.dim() == 4 else x.reshape(x.shape[0] if x.dim() > 1 else 1, -1, 1, 1)


_OPERATORS = {"requantize": "requantize", "add": "qadd", "mean": "qmean"}
_NAMES = {
    "requantize": ("multiplier", "x_zero_point"),
    "add": ("a_multiplier", "b_multiplier", "a_zero_point", "b_zero_point"),
    "mean": ("multiplier", "x_zero_point"),
}


def run_step(
    step: Any,
    name: str,
    operands: tuple[Tensor, ...],
    ratios: tuple[float, ...],
    scales: tuple[Scale, ...],
) -> Tensor:
    """Runs one operation, by the engine itself or, where a tracer looks on, by the operator."""
    code, x = step._backend_code(), operands[0]
    numbers = (*ratios, *(s.zero_point for s in scales))
    if ops.by_operator(x):
        operator = getattr(torch.ops.hetconv, _OPERATORS[name])
        y: Tensor = operator(*operands, *numbers, *step._output, code)
        return y
    named = dict(zip(_NAMES[name], numbers, strict=True))
    y = getattr(operations(x.device, code), name)(*operands, **named, output=step._output)
    return y
