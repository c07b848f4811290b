# SPDX-License-Identifier: Apache-2.0
"""Pieces that several engines share."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arena import allocate
from ..packing import mask_, mask_on
from ..problem import Pads, Problem

__all__ = ["epilogue", "weight_gradient"]

_ACTS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
}
_IN_PLACE = {
    "none": lambda y: y,
    "relu": torch.relu_,
    "relu6": lambda y: F.relu6(y, inplace=True),
    "silu": lambda y: F.silu(y, inplace=True),
    "gelu": F.gelu,
}


def epilogue(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, act: str
) -> Tensor:
    """Computes act(scale · y + shift + residual), per filter, in the dtype of y.

    16-bit results are rounded once, after the activation, as a fused kernel does.
    """
    if scale is None and shift is None and residual is None:
        return _ACTS[act](y)
    dtype = y.dtype
    if dtype.itemsize == 2:
        y = y.float()
    if scale is not None:
        y = y * scale.to(y.dtype)[:, None, None]
    if shift is not None:
        y = y + shift.to(y.dtype)[:, None, None]
    if residual is not None:
        y = y + residual
    return _ACTS[act](y).to(dtype)


def finish_in_place(y: Tensor, act: str) -> Tensor:
    """Applies an activation to a tensor that nobody else holds."""
    finished: Tensor = _IN_PLACE[act](y)
    return finished


def empty(shape: tuple[int, ...], like: Tensor, problem: Problem) -> Tensor:
    """Allocates a result in the problem's memory format, with the dtype and device of `like`.

    In a call with a plan of memory (see `arena`) it lies where that says.
    """
    return allocate(problem, shape, like.dtype, like.device, problem.format)


def pad_image(x: Tensor, pads: Pads) -> Tensor:
    """Adds the zeros of `pads` around the image."""
    top, bottom, left, right = pads
    return F.pad(x, (left, right, top, bottom))


def crop_image(x: Tensor, pads: Pads) -> Tensor:
    """Takes off what `pad_image` added."""
    top, bottom, left, right = pads
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


def is_pointwise(problem: Problem) -> bool:
    """Tells whether y is x times a matrix, pixel by pixel: a 1×1 kernel, no stride, no padding."""
    geometry = problem.geometry
    return geometry.support.kernel == geometry.stride == (1, 1) and not any(geometry.pads)


def is_linear(problem: Problem) -> bool:
    """Tells whether y is x times a matrix on images of one pixel, as in a fully-connected layer."""
    return is_pointwise(problem) and problem.height == problem.width == 1


def has_idle_taps(problem: Problem) -> bool:
    """Tells whether some tap meets nothing but padding, along one axis, at every output.

    Example: of three taps at stride 2 and padding 2 on four pixels, whose outputs start at -2, 0
    and 2, the middle one meets -1, 1 and 3; on one pixel it meets -1 and 1, so never the image.
    """
    geometry = problem.geometry
    axes = zip(
        (problem.height, problem.width),
        problem.output_size,
        geometry.support.kernel,
        geometry.stride,
        geometry.pads[::2],
        geometry.dilation,
        strict=True,
    )
    for size, outputs, taps, stride, pad, dilation in axes:
        for tap in range(taps):
            start = tap * dilation - pad
            first = max(0, -(start // stride))  # the first output whose tap is not left of it
            if first >= outputs or start + first * stride >= size:
                return True
    return False


def weight_gradient(problem: Problem, dense: Tensor) -> Tensor:
    """Brings a dense weight gradient to the canonical form: dead entries zero, or live only.

    It is changed in place: nobody else holds it.
    """
    dense = dense.to(problem.weight_dtype)
    if problem.live_weight:
        return dense[mask_on(problem.support, dense.device)].view(problem.weight_shape)
    return to_format(problem, mask_(problem.support, dense))


def to_format(problem: Problem, dense: Tensor) -> Tensor:
    """Brings a dense 4-D weight gradient to the shape and memory format that the problem asks."""
    if len(problem.weight_shape) == 2:
        return dense.view(problem.weight_shape)
    return dense.contiguous(memory_format=problem.format)


def unit(widest: int, tensor: Tensor, more: Sequence[int] = ()) -> int:
    """Returns what divides a channels_last tensor's channels and strides, at most `widest`."""
    n, _, h, w = tensor.stride()
    sizes = tensor.shape
    strides = [s for s, size in ((n, sizes[0]), (h, sizes[2]), (w, sizes[3])) if size > 1]
    return gcd(widest, sizes[1], *strides, *(int(value) for value in more))
