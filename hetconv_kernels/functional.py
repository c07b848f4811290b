# SPDX-License-Identifier: Apache-2.0
"""The functional face: checks, autocast, and the way to the primitives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import backends, ops, ranges
from .autograd import EagerCall, through_operator, transforms_active
from .backends.common import epilogue, pad_image
from .geometries import GeometryCache
from .observers import observed, sizes
from .operands import check_epilogue
from .packing import bits_on, mask_on
from .pooling import Pool, max_pooled
from .problem import Geometry, Problem, check_call, check_kinds, is_dense_shape, make_geometry
from .support import Support

__all__ = ["support_conv2d"]

_geometries = GeometryCache(max_bytes=64 * 2**20)


def support_conv2d(
    x: Tensor,
    weight: Tensor,
    support: Support,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolves with the weights that exist: ``F.conv2d(x, weight * mask, bias, ...)``.

    Dead entries of a dense weight are ignored, whatever they hold, and get zero gradients.
    Derivatives of every order exist; the memory format of the result follows ``nn.Conv2d``.

    Args:
        x: activations.  # [N, C, H, W] or [C, H, W]
        weight: dense, or the live vector in Support order.  # [F, C, KH, KW] or [live]
        support: which weights exist.
        bias: added per filter.  # [F]
        stride: one number or a pair, in pixels.
        padding: one number, a pair, four numbers (top, bottom, left, right), ``"same"`` or
            ``"valid"``.
        dilation: one number or a pair, in pixels.
        backend: forces an engine; None follows `use_backend`, then ``auto``.

    Returns:
        The output.  # [N, F, OH, OW] or [F, OH, OW]

    Raises:
        ArgumentError: shapes, devices or geometry that do not fit.
        InputTypeError: a dtype that is not supported, or a mix of dtypes without autocast.
        BackendError: the forced backend cannot run this call.
    """
    if torch.compiler.is_compiling() or not isinstance(support, Support):
        geometry = make_geometry(support, stride, padding, dilation)
    else:
        try:
            geometry = _geometry(support, _key(stride), _key(padding), _key(dilation))
        except TypeError:  # what cannot be hashed is no valid argument either, and is refused here
            geometry = make_geometry(support, stride, padding, dilation)
    return conv2d(x, weight, bias, geometry, backends.backend_code(backend))


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, backend: int
) -> Tensor:
    """Convolves with a ready Geometry and a backend's code: what the layers call.

    Args and errors as `support_conv2d`.
    """
    if x.dim() == 3:
        return conv2d(x.unsqueeze(0), weight, bias, geometry, backend).squeeze(0)
    mixed = _autocasting(x)
    if mixed:
        x = _autocast(x)
    if through_operator(x, weight, bias):
        check_kinds(x, weight, bias, mixed)
        return _operator(x, weight, geometry, backend, None, bias, None, "none")
    if torch.is_grad_enabled() or transforms_active():
        # A wrong rank is refused by the checks in the call.
        height, width = x.shape[2:] if x.dim() == 4 else (0, 0)
        return EagerCall(geometry, (height, width), backend, mixed).eager_fprop(x, weight, bias)
    return ops.run_fprop(x, weight, geometry, bias, backend, mixed)


def fprop_problem(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    pool: Pool | None = None,
) -> Problem:
    """Describes what `conv2d` or `fused_conv2d` asks of an engine, autocast included.

    Args:
        x: activations.  # [N, C, H, W]
        weight: canonical weight.  # [F, C, KH, KW] or [live]
        geometry: the layer.
        shift: per filter, or the bias.  # [F]
        residual: added before the activation.  # [N, F, OH, OW]
        act: the activation.
        pool: max-pooling of that, or None.

    Raises:
        ArgumentError, InputTypeError: what the call would refuse before an engine is asked.
    """
    mixed = _autocasting(x)
    if mixed:
        x = _autocast(x)
    check_call(geometry, x, weight, shift, mixed)
    extras = {"shift": shift, "residual": residual}
    size = (x.shape[2], x.shape[3])
    found = ops.describe("fprop", geometry, x, x, weight, size, extras, act)
    if pool is None:
        return found
    pool.check(*found.output_size)
    return replace(found, pool=pool)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, backend: int
) -> Tensor:
    """Multiplies rows of features: the convolution of one-pixel images.  # [..., C] -> [..., F]

    A plain call without gradients goes to an engine's product of matrices without any image,
    which would cost a small layer more than its arithmetic.

    Args and errors as `support_conv2d`; the Geometry is that of a 1×1 kernel.
    """
    support = geometry.support
    if (
        not torch.is_grad_enabled()
        and not observed(x, weight, bias)
        and not (transforms_active() or _autocasting(x) or ranges.active)
    ):
        return ops.product(x, weight, bias, geometry, backend)(x, weight, bias)
    pixels = x.reshape(-1, support.channels, 1, 1)
    y = conv2d(pixels, weight, bias, geometry, backend)
    return y.reshape(*x.shape[:-1], support.filters)


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    backend: int = 0,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    pool: Pool | None = None,
) -> Tensor:
    """Computes act(scale · conv(x, weight) + shift + residual) in one pass over the output.

    Where a gradient is wanted the extras are ordinary PyTorch operations after the convolution, so
    that nothing has to be computed twice.

    Args:
        x: activations.  # [N, C, H, W]
        weight: canonical weight.  # [F, C, KH, KW] or [live]
        geometry: the layer.
        backend: a backend's code, 0 for auto.
        scale: per filter (folded batch normalisation).  # [F]
        shift: per filter (folded batch normalisation, bias).  # [F]
        residual: added before the activation.  # [N, F, OH, OW]
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"gelu"``.
        pool: max-pooling of that, or None.

    Returns:
        y, pooled where asked for.  # [N, F, OH, OW]

    Raises:
        ArgumentError, InputTypeError, BackendError: as `support_conv2d`.
    """
    extras = [t for t in (scale, shift, residual) if t is not None]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, *extras))
    mixed = _autocasting(x)
    if mixed:
        x = _autocast(x)
        residual = None if residual is None else residual.to(x.dtype)
    if wanted or transforms_active():
        if not torch.compiler.is_compiling():
            check_call(geometry, x, weight, shift, mixed)
        check_epilogue(geometry, x, scale, residual, act)
        bare = scale is None and residual is None
        y = conv2d(x, weight, shift if bare else None, geometry, backend)
        y = epilogue(y, scale, None if bare else shift, residual, act)
        return y if pool is None else max_pooled(y, pool)
    if through_operator(x, weight, *extras):
        check_kinds(x, weight, shift, mixed)
        y = _operator(x, weight, geometry, backend, scale, shift, residual, act)
        return y if pool is None else max_pooled(y, pool)
    return ops.run_fprop(x, weight, geometry, shift, backend, mixed, scale, residual, act, pool)


def _operator(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    backend: int,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> Tensor:
    """Calls the operator; for the ONNX exporter that traces, PyTorch's own, all that it knows."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        dense = _gathered(geometry.support, weight.to(x.dtype))
        padding = geometry.symmetric_padding
        image = pad_image(x, geometry.pads) if padding is None else x
        y = torch.conv2d(image, dense, None, geometry.stride, padding or 0, geometry.dilation)
        return epilogue(y, scale, shift, residual, act)
    bits, ints, code = _op_arguments(geometry, x, backend)
    return torch.ops.hetconv.fprop(x, weight, bits, scale, shift, residual, act, ints, code)


def _gathered(support: Support, weight: Tensor) -> Tensor:
    """Expands a canonical weight by one gather, which every ONNX host has.  # [F, C, KH, KW]"""
    mask = mask_on(support, weight.device)
    if is_dense_shape(support, weight.shape):
        return torch.where(
            mask, weight.reshape(support.shape), torch.zeros_like(mask, dtype=weight.dtype)
        )
    places = mask.flatten().cumsum(0).masked_fill(~mask.flatten(), 0)
    return torch.nn.functional.pad(weight.flatten(), (1, 0))[places].reshape(support.shape)


def _op_arguments(geometry: Geometry, x: Tensor, backend: int) -> tuple[Tensor, list[int], int]:
    """Returns what stands for a Geometry and a backend's code in an operator's arguments."""
    code = backend + backends.FROZEN if geometry.frozen else backend
    return bits_on(geometry.support, x.device), geometry.ints(*sizes(x)[2:]), code


def _autocasting(x: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():
        return False
    return x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def _autocast(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype(x.device.type))


def _geometry(support: Support, stride: Any, padding: Any, dilation: Any) -> Geometry:
    # 1, 1.0 and True are equal and not all allowed.
    kinds = type(stride), type(padding), type(dilation)
    key = (support, stride, padding, dilation, kinds)
    geometry = _geometries.get(key)
    if geometry is None:
        geometry = make_geometry(support, stride, padding, dilation)
        _geometries.add(key, geometry)
    return geometry


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
