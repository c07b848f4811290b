# SPDX-License-Identifier: Apache-2.0
"""What the operands of gradients and epilogues must be like before a kernel indexes them.

The operators can be called by anybody, and exported programs hold them: what a kernel takes for
granted is checked here once for each signature. `problem.check_call` does the same for fprop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ArgumentError, InputTypeError, mismatch
from .problem import (
    ACTIVATIONS,
    DTYPES,
    Geometry,
    Ints,
    check_image,
    check_kinds,
    read_ints,
    weight_shapes,
)

_INT32_MAX = 2**31 - 1


def check_dgrad(geometry: Geometry, dy: Tensor, w: Tensor, size: Sequence[int]) -> None:
    """Refuses what dgrad could not read: dy or w of another layer, dtype or device.

    Args:
        geometry: the layer.
        dy: gradient of y.  # [N, F, OH, OW]
        w: canonical weight, perhaps wider than dy (autocast).  # [F, C, KH, KW] or [live]
        size: input height and width, in pixels.

    Raises:
        InputTypeError: a dtype or layout that is not supported.
        ArgumentError: a shape or device that does not fit.
    """
    check_kinds(dy, w, None, mixed=True)
    check_weight_shape(geometry, w.shape)
    _check_dy(geometry, dy, size)


def check_wgrad(
    geometry: Geometry,
    dy: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Refuses what wgrad could not read or write: dy and x of two calls, another layer's weight.

    Args:
        geometry: the layer.
        dy: gradient of y.  # [N, F, OH, OW]
        x: activations, of dy's batch and dtype.  # [N, C, H, W]
        weight_shape: of dw, one of `weight_shapes`.
        dtype: of dw.

    Raises:
        InputTypeError: a dtype or layout that is not supported, or x and dy of two dtypes.
        ArgumentError: a shape or device that does not fit.
    """
    check_kinds(x, dy, None, mixed=True)
    if x.dtype != dy.dtype:
        raise InputTypeError(
            mismatch("x dtype", x.dtype, f"dy's, {dy.dtype}", "Cast one of them with .to().")
        )
    if dtype not in DTYPES:
        raise InputTypeError(
            mismatch("dtype of dw", dtype, "float32, float64, bfloat16 or float16")
        )
    channels = geometry.support.channels
    if x.dim() != 4 or x.shape[1] != channels:
        raise ArgumentError(mismatch("x shape", tuple(x.shape), f"[N, {channels}, H, W]"))
    check_weight_shape(geometry, weight_shape)
    _check_dy(geometry, dy, x.shape[2:])
    if dy.shape[0] != x.shape[0]:
        raise ArgumentError(mismatch("batch of dy", dy.shape[0], f"x's, {x.shape[0]}"))


def check_weight_shape(geometry: Geometry, shape: Sequence[int]) -> None:
    """Refuses a weight that is not one of this Support.

    Raises:
        ArgumentError: neither dense nor the live entries.
    """
    shapes = weight_shapes(geometry.support)
    if tuple(shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ArgumentError(
            mismatch("weight shape", tuple(shape), f"{expected} for {geometry.support}")
        )


def check_ints(ints: Sequence[int]) -> Ints:
    """Names an operator's integers (see `Geometry.ints`), once they are known to be in range.

    Raises:
        ArgumentError: not that many, or a stride, padding or dilation that no layer has.
    """
    if len(ints) != 14:
        raise ArgumentError(mismatch("geometry", f"{len(ints)} integers", "14, see Geometry.ints"))
    named = read_ints(ints)
    ranges = (
        ("channels and kernel", named.columns, 1),
        ("stride", named.stride, 1),
        ("padding", named.pads, 0),
        ("dilation", named.dilation, 1),
    )
    for name, values, least in ranges:
        if not all(least <= value <= _INT32_MAX for value in values):
            raise ArgumentError(
                mismatch(f"{name} in geometry", values, f"integers from {least} to {_INT32_MAX}")
            )
    return named


def _check_dy(geometry: Geometry, dy: Tensor, size: Sequence[int]) -> None:
    height, width = size
    check_image(geometry, height, width, dy.shape[0] if dy.dim() else 1)
    expected = (geometry.support.filters, *geometry.output_size(height, width))
    if dy.dim() != 4 or tuple(dy.shape[1:]) != expected:
        raise ArgumentError(mismatch("dy shape", tuple(dy.shape), f"[N, {expected}]"))


def check_epilogue(
    geometry: Geometry, x: Tensor, scale: Tensor | None, residual: Tensor | None, act: str
) -> None:
    """Refuses an epilogue that does not fit the output of conv(x, w).

    Raises:
        ArgumentError: an unknown activation, or a shape, dtype or device that does not fit.
        InputTypeError: a scale of another kind of numbers.
    """
    if act not in ACTIVATIONS:
        raise ArgumentError(mismatch("activation", repr(act), f"one of {', '.join(ACTIVATIONS)}"))
    f = geometry.support.filters
    if scale is not None and (tuple(scale.shape) != (f,) or scale.device != x.device):
        raise ArgumentError(
            mismatch(
                "scale shape and device",
                f"{tuple(scale.shape)} {scale.device}",
                f"({f},) {x.device}",
            )
        )
    if scale is not None and scale.dtype not in DTYPES:
        raise InputTypeError(
            mismatch("scale dtype", scale.dtype, "float32, float64, bfloat16 or float16")
        )
    if residual is not None:
        received = tuple(residual.shape), residual.dtype, residual.device
        shape = (x.shape[0], f, *geometry.output_size(*x.shape[2:]))
        expected = shape, x.dtype, x.device
        if received != expected:
            raise ArgumentError(
                mismatch(
                    "residual",
                    " ".join(map(str, received)),
                    f"the output's {' '.join(map(str, expected))}",
                )
            )
