# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.hetconv``: schemas, fakes, and the bodies that pick a backend.

``fprop``, ``dgrad`` and ``wgrad`` are the three primitives. A Support crosses as one tensor, its
bit-packed mask; the integers of `Geometry.ints` carry everything else. The mask is read only when
the process does not know the digest yet, as in a freshly loaded exported program.

Plain eager calls go to the ``run_*`` functions below without the dispatcher (it costs more than
the rest of the call together); tracing, dispatch modes and exported programs go through the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ranges
from .accuracy import is_strict
from .backends import FROZEN, choose
from .backends.protocol import Choice
from .errors import ArgumentError, mismatch
from .flops import register_flop_formulas
from .geometries import geometry_of
from .operands import check_dgrad, check_epilogue, check_wgrad
from .pooling import Pool
from .problem import (
    Geometry,
    Problem,
    check_call,
    memory_format,
    output_size,
)

_LIBRARY = torch.library.Library("hetconv", "DEF")
_SCHEMAS = (
    "fprop(Tensor x, Tensor w, Tensor support, Tensor? scale, Tensor? shift, Tensor? residual, "
    "str act, SymInt[] geometry, int backend) -> Tensor",
    "dgrad(Tensor dy, Tensor w, Tensor support, SymInt[] geometry, int backend) -> Tensor",
    "wgrad(Tensor dy, Tensor x, Tensor support, SymInt[] weight_shape, ScalarType dtype, "
    "SymInt[] geometry, int backend) -> Tensor",
)

# Signatures kept for one layer, the latest ones: each takes about 3 KiB.
_MAX_SIGNATURES = 128


# Eager bodies -----------------------------------------------------------------------------------


def run_fprop(
    x: Tensor,
    w: Tensor,
    geometry: Geometry,
    shift: Tensor | None = None,
    backend: int = 0,
    mixed: bool = True,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    pool: Pool | None = None,
) -> Tensor:
    """Computes y = act(scale · conv(x, w) + shift + residual) with the backend of choice.

    Args:
        x: activations.  # [N, C, H, W]
        w: canonical weight.  # [F, C, KH, KW] or [live]
        geometry: the layer.
        shift: per filter, the bias.  # [F]
        backend: a forced backend's code, 0 for auto.
        mixed: whether w may be wider than x (autocast).
        scale: per filter.  # [F]
        residual: of y's shape and dtype.  # [N, F, OH, OW]
        act: one of `ACTIVATIONS`.
        pool: max-pooling of that, or None.

    Returns:
        y.  # [N, F, OH, OW]
    """
    key = (
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        w.shape,
        w.stride(),
        w.dtype,
        w.device,
        backend,
        mixed,
        act,
        pool,
        is_strict(),
        None if shift is None else (shift.shape, shift.dtype, shift.device),
        None if scale is None else (scale.shape, scale.dtype, scale.device),
        None if residual is None else (residual.shape, residual.dtype, residual.device),
    )
    choice = geometry.choices.get(key)
    if choice is None:
        check_call(geometry, x, w, shift, mixed)
        check_epilogue(geometry, x, scale, residual, act)
        extras = {"scale": scale, "shift": shift, "residual": residual}
        problem = describe("fprop", geometry, x, x, w, tuple(x.shape[2:]), extras, act)
        if pool is not None:
            pool.check(*problem.output_size)
            problem = replace(problem, pool=pool)
        choice = _remember(geometry, key, problem, backend)
    if ranges.active:
        return ranges.run_in_range(choice, x, w, scale, shift, residual)
    return choice.run(x, w, scale, shift, residual)


def product(
    x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, backend: int = 0
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Returns what multiplies such rows of features by a weight.

    Where the engine has no product of matrices for them, they go by the convolution.

    Args:
        x: rows of features.  # [..., C]
        w: canonical weight.  # [F, C], [F, C, 1, 1] or [live]
        bias: added per filter.  # [F]
        geometry: of a 1×1 kernel.
        backend: a forced backend's code, 0 for auto.

    Returns:
        A callable (x, w, bias) -> y for operands of these shapes and kinds.  # [..., F]
    """
    key = (
        "product",
        x.shape,
        x.is_contiguous(),
        x.dtype,
        x.device,
        w.shape,
        w.stride(),
        w.dtype,
        w.device,
        backend,
        None if bias is None else (bias.shape, bias.dtype, bias.device),
    )
    choice = geometry.choices.get(key)
    if choice is not None:
        return choice.run
    pixels = x.reshape(-1, geometry.support.channels, 1, 1)
    check_call(geometry, pixels, w, bias, False)
    problem = describe("fprop", geometry, pixels, pixels, w, (1, 1), {"shift": bias})
    engine = choose(problem, backend).backend
    offered = getattr(engine, "product", None)
    run: Callable[..., Tensor] | None = None
    # Other layouts, and rows that are none, go by the convolution.
    if x.is_contiguous() and w.is_contiguous() and x.numel() and offered is not None:
        run = offered(problem)
    _make_room(geometry)
    choice = Choice(engine, problem, run or partial(_by_convolution, geometry, backend))
    geometry.choices[key] = choice
    return choice.run


def _by_convolution(
    geometry: Geometry, backend: int, x: Tensor, w: Tensor, bias: Tensor | None
) -> Tensor:
    pixels = x.reshape(-1, geometry.support.channels, 1, 1)
    y = run_fprop(pixels, w, geometry, bias, backend, False)
    return y.reshape(*x.shape[:-1], geometry.support.filters)


def run_dgrad(
    dy: Tensor, w: Tensor, geometry: Geometry, size: Sequence[int], backend: int = 0
) -> Tensor:
    """Computes dx, the gradient of conv(x, w) by x, for an input of `size` pixels.

    Args:
        dy: gradient of y.  # [N, F, OH, OW]
        w: canonical weight.  # [F, C, KH, KW] or [live]
        geometry: the layer.
        size: input height and width.
        backend: a forced backend's code, 0 for auto.

    Returns:
        dx.  # [N, C, H, W]
    """
    size = tuple(size)
    key = (
        "dgrad",
        size,
        dy.shape,
        dy.stride(),
        dy.dtype,
        dy.device,
        w.shape,
        w.stride(),
        w.dtype,
        w.device,
        backend,
    )
    choice = geometry.choices.get(key)
    if choice is None:
        check_dgrad(geometry, dy, w, size)
        problem = describe("dgrad", geometry, dy, dy, w, size)
        choice = _remember(geometry, key, problem, backend)
    if ranges.active:
        return ranges.run_in_range(choice, dy, w)
    return choice.run(dy, w)


def run_wgrad(
    dy: Tensor,
    x: Tensor,
    geometry: Geometry,
    weight_shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: int = 0,
) -> Tensor:
    """Computes dw, the gradient of conv(x, w) by w; dead entries are zero.

    Args:
        dy: gradient of y.  # [N, F, OH, OW]
        x: activations.  # [N, C, H, W]
        geometry: the layer.
        weight_shape: of dw, one of `weight_shapes`.
        dtype: of dw.
        backend: a forced backend's code, 0 for auto.

    Returns:
        dw.  # [F, C, KH, KW] or [live]
    """
    key = (
        "wgrad",
        dy.shape,
        dy.stride(),
        dy.dtype,
        dy.device,
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        weight_shape,
        dtype,
        backend,
    )
    choice = geometry.choices.get(key)
    if choice is None:
        check_wgrad(geometry, dy, x, weight_shape, dtype)
        like = torch.empty(weight_shape, dtype=dtype, device="meta")
        problem = describe("wgrad", geometry, dy, x, like, tuple(x.shape[2:]))
        choice = _remember(geometry, key, problem, backend)
    if ranges.active:
        return ranges.run_in_range(choice, dy, x)
    return choice.run(dy, x)


def describe(
    verb: str,
    geometry: Geometry,
    first: Tensor,
    second: Tensor,
    w: Tensor,
    size: Sequence[int],
    extras: Mapping[str, Tensor | None] | None = None,
    act: str = "none",
) -> Problem:
    """Describes a call by its operands: what the result's format follows is `second` and `w`."""
    other = first if verb == "wgrad" else w
    return Problem(
        verb=verb,
        geometry=geometry,
        batch=first.shape[0],
        height=size[0],
        width=size[1],
        dtype=first.dtype,
        weight_shape=tuple(w.shape),
        weight_dtype=w.dtype,
        device=first.device,
        strides=first.stride(),
        channels_last=memory_format(second, other) == torch.channels_last,
        epilogue=tuple(name for name, value in (extras or {}).items() if value is not None),
        act=act,
    )


def _remember(geometry: Geometry, key: Any, problem: Problem, backend: int) -> Choice:
    _make_room(geometry)
    choice = geometry.choices[key] = choose(problem, backend)
    return choice


def _make_room(geometry: Geometry) -> None:
    choices = geometry.choices
    while len(choices) >= _MAX_SIGNATURES:
        try:
            choices.pop(next(iter(choices)), None)  # the oldest
        except (StopIteration, RuntimeError):  # another thread made room meanwhile
            return


# Operators --------------------------------------------------------------------------------------


def _fprop(
    x: Tensor,
    w: Tensor,
    support: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    geometry: Sequence[int],
    backend: int,
) -> Tensor:
    frozen, backend = divmod(backend, FROZEN)
    layer = geometry_of(support, geometry, bool(frozen))
    return run_fprop(x, w, layer, shift, backend, True, scale, residual, act)


def _dgrad(dy: Tensor, w: Tensor, support: Tensor, geometry: Sequence[int], backend: int) -> Tensor:
    frozen, backend = divmod(backend, FROZEN)
    return run_dgrad(dy, w, geometry_of(support, geometry, bool(frozen)), geometry[:2], backend)


def _wgrad(
    dy: Tensor,
    x: Tensor,
    support: Tensor,
    weight_shape: Sequence[int],
    dtype: torch.dtype,
    geometry: Sequence[int],
    backend: int,
) -> Tensor:
    layer = geometry_of(support, geometry)
    return run_wgrad(dy, x, layer, tuple(weight_shape), dtype, backend % FROZEN)


def _check_traced(name: str, x: Tensor, channels: int, geometry: Sequence[int]) -> None:
    """Refuses while tracing what shapes alone can refuse; the bodies check the rest."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ArgumentError(mismatch(f"{name} shape", tuple(x.shape), f"[N, {channels}, H, W]"))
    if any(size < 1 for size in output_size(geometry)):
        raise ArgumentError(
            mismatch("output size", output_size(geometry), "at least one pixel", "Pad the input.")
        )


def _fake_fprop(
    x: Tensor,
    w: Tensor,
    support: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    geometry: Sequence[int],
    backend: int,
) -> Tensor:
    _check_traced("input", x, geometry[2], geometry)
    shape = (x.shape[0], support.shape[0], *output_size(geometry))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x, w))


def _fake_dgrad(
    dy: Tensor, w: Tensor, support: Tensor, geometry: Sequence[int], backend: int
) -> Tensor:
    _check_traced("dy", dy, support.shape[0], geometry)
    shape = (dy.shape[0], geometry[2], *geometry[:2])
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=memory_format(dy, w))


def _fake_wgrad(
    dy: Tensor,
    x: Tensor,
    support: Tensor,
    weight_shape: Sequence[int],
    dtype: torch.dtype,
    geometry: Sequence[int],
    backend: int,
) -> Tensor:
    _check_traced("x", x, geometry[2], geometry)
    _check_traced("dy", dy, support.shape[0], geometry)
    dense = len(weight_shape) == 4
    layout = memory_format(x, dy) if dense else torch.contiguous_format
    return torch.empty(weight_shape, dtype=dtype, device=x.device, memory_format=layout)


for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _body, _fake in (
    ("fprop", _fprop, _fake_fprop),
    ("dgrad", _dgrad, _fake_dgrad),
    ("wgrad", _wgrad, _fake_wgrad),
):
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hetconv::{_name}", _fake, lib=_LIBRARY)

register_flop_formulas()
