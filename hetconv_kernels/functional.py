# SPDX-License-Identifier: Apache-2.0
"""The functional face: checks, autocast, and the way to the primitives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler as _profiler

from . import backends, ops
from .autograd import EagerCall, transforms_active
from .backends.common import channel_statistics, epilogue
from .geometries import GeometryCache
from .packing import bits_on
from .pooling import Pool, max_pooled
from .problem import Geometry, check_call, check_kinds, make_geometry
from .support import Support

_PLAIN = (Tensor, torch.nn.Parameter)
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
    cached = isinstance(support, Support) and not torch.compiler.is_compiling()
    build = _geometry if cached else make_geometry
    geometry = build(support, _key(stride), _key(padding), _key(dilation))
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
    if _traced(x, weight):
        check_kinds(x, weight, bias, mixed)
        bits, ints, code = _op_arguments(geometry, x, backend)
        return torch.ops.hetconv.fprop(x, weight, bits, None, bias, None, "none", ints, code)
    if torch.is_grad_enabled() or transforms_active():
        # A wrong rank is refused by the checks in the call.
        height, width = x.shape[2:] if x.dim() == 4 else (0, 0)
        return EagerCall(geometry, (height, width), backend, mixed).fprop(x, weight, bias)
    return ops.run_fprop(x, weight, geometry, bias, backend, mixed)


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
        ops.check_epilogue(geometry, x, scale, residual, act)
        bare = scale is None and residual is None
        y = conv2d(x, weight, shift if bare else None, geometry, backend)
        y = epilogue(y, scale, None if bare else shift, residual, act)
        return y if pool is None else max_pooled(y, pool)
    if _traced(x, weight):
        check_kinds(x, weight, shift, mixed)
        bits, ints, code = _op_arguments(geometry, x, backend)
        y = torch.ops.hetconv.fprop(x, weight, bits, scale, shift, residual, act, ints, code)
        return y if pool is None else max_pooled(y, pool)
    return ops.run_fprop(x, weight, geometry, shift, backend, mixed, scale, residual, act, pool)


def conv2d_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, backend: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolves and sums y and y² per filter, what batch normalisation needs in training.

    Args and errors as `support_conv2d`.

    Returns:
        y [N, F, OH, OW], Σ y [F] and Σ y² [F], the sums in float32 (float64 for float64).
    """
    if _traced(x, weight):
        bits, ints, code = _op_arguments(geometry, x, backend)
        return torch.ops.hetconv.fprop_stats(x, weight, bits, bias, ints, code)
    if torch.is_grad_enabled() or transforms_active():
        y = conv2d(x, weight, bias, geometry, backend)
        return y, *channel_statistics(y)
    return ops.run_fprop_stats(x, weight, geometry, bias, backend)


def _traced(x: Tensor, weight: Tensor) -> bool:
    """Tells whether the call has to be seen by a tracer, a dispatch mode or a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        or x.is_meta
        or _profiler._is_profiler_enabled
    )


def _op_arguments(geometry: Geometry, x: Tensor, backend: int) -> tuple[Tensor, list[int], int]:
    """Returns what stands for a Geometry and a backend's code in an operator's arguments."""
    code = backend + backends.FROZEN if geometry.frozen else backend
    return bits_on(geometry.support, x.device), geometry.ints(x.shape[2], x.shape[3]), code


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
