# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the three primitives: a closed cycle, so every order exists.

fprop(x, w), dgrad(dy, w) and wgrad(dy, x) are bilinear, and the gradient of each is made of the
other two:

    fprop:  dx = dgrad(dy, w)      dw = wgrad(dy, x)
    dgrad:  d(dy) = fprop(g, w)    dw = wgrad(dy, g)         g: the cotangent of dx
    wgrad:  d(dy) = fprop(x, g)    dx = dgrad(dy, g)         g: the cotangent of dw

The formulas are written once, against a *call* that knows how to run the primitives: `EagerCall`
runs the engines directly, `OpCall` goes through ``torch.ops.hetconv`` so that tracing sees it.
Each primitive has a ctx-style Function here for the fast path, a setup_context-style twin in
`transforms` (with jvp and vmap), and the same formula on the ops' Autograd key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd import forward_ad as _forward_ad

from . import ops
from .backends.common import epilogue
from .problem import Geometry

Grads = tuple[Tensor | None, ...]


def transforms_active() -> bool:
    """Tells whether a functorch transform or forward-mode differentiation is running."""
    return torch._C._are_functorch_transforms_active() or _forward_ad._current_level >= 0


class EagerCall(NamedTuple):
    """One call in eager mode: the layer, its input size in pixels, and the forced backend."""

    geometry: Geometry
    size: tuple[int, int]
    backend: int
    mixed: bool

    def fprop(self, x: Tensor, w: Tensor, shift: Tensor | None = None) -> Tensor:
        """Computes y = conv(x, w) + shift, recorded for differentiation where needed."""
        if transforms_active():
            from . import transforms  # rarely needed

            return transforms.FpropTwin.apply(x, w, shift, self)
        if torch.is_grad_enabled() and (
            x.requires_grad or w.requires_grad or (shift is not None and shift.requires_grad)
        ):
            return Fprop.apply(x, w, shift, self)
        return ops.run_fprop(x, w, self.geometry, shift, self.backend, self.mixed)

    def dgrad(self, dy: Tensor, w: Tensor) -> Tensor:
        """Computes dx, recorded for differentiation where needed."""
        if transforms_active():
            from . import transforms  # rarely needed

            return transforms.DgradTwin.apply(dy, w, self)
        if torch.is_grad_enabled() and (dy.requires_grad or w.requires_grad):
            return Dgrad.apply(dy, w, self)
        return ops.run_dgrad(dy, w, self.geometry, self.size, self.backend)

    def wgrad(self, dy: Tensor, x: Tensor, like: WeightKind) -> Tensor:
        """Computes dw, recorded for differentiation where needed."""
        if transforms_active():
            from . import transforms  # rarely needed

            return transforms.WgradTwin.apply(dy, x, like, self)
        if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
            return Wgrad.apply(dy, x, like, self)
        return ops.run_wgrad(dy, x, self.geometry, like.shape, like.dtype, self.backend)


class OpCall(NamedTuple):
    """One call through ``torch.ops.hetconv``: mask bits, `Geometry.ints`, forced backend."""

    bits: Tensor
    ints: Sequence[int]
    backend: int

    def fprop(self, x: Tensor, w: Tensor) -> Tensor:
        """Computes y = conv(x, w)."""
        return torch.ops.hetconv.fprop(
            x, w, self.bits, None, None, None, "none", self.ints, self.backend
        )

    def dgrad(self, dy: Tensor, w: Tensor) -> Tensor:
        """Computes dx."""
        return torch.ops.hetconv.dgrad(dy, w, self.bits, self.ints, self.backend)

    def wgrad(self, dy: Tensor, x: Tensor, like: WeightKind) -> Tensor:
        """Computes dw."""
        return torch.ops.hetconv.wgrad(
            dy, x, self.bits, like.shape, like.dtype, self.ints, self.backend
        )


class WeightKind(NamedTuple):
    """The shape and dtype that a weight gradient has."""

    shape: tuple[int, ...]
    dtype: torch.dtype


# Formulas ---------------------------------------------------------------------------------------


def _fprop_grads(ctx: Any, dy: Tensor, needs: Sequence[bool]) -> Grads:
    x, w = ctx.saved_tensors
    call = ctx.call
    dx = call.dgrad(dy, w) if needs[0] else None
    dw = call.wgrad(dy, x, ctx.weight) if needs[1] else None
    shift = dy.sum((0, 2, 3), dtype=ctx.shift_dtype) if needs[2] else None
    return dx, dw, shift


def _dgrad_grads(ctx: Any, g: Tensor, needs: Sequence[bool]) -> Grads:
    dy, w = ctx.saved_tensors
    ddy = ctx.call.fprop(g, w) if needs[0] else None
    dw = ctx.call.wgrad(dy, g, ctx.weight) if needs[1] else None
    return ddy, dw


def _wgrad_grads(ctx: Any, g: Tensor, needs: Sequence[bool]) -> Grads:
    dy, x = ctx.saved_tensors
    ddy = ctx.call.fprop(x, g) if needs[0] else None
    dx = ctx.call.dgrad(dy, g) if needs[1] else None
    return ddy, dx


def keep_fprop(ctx: Any, x: Tensor, w: Tensor, shift: Tensor | None, call: Any) -> None:
    """Keeps on ctx what the gradients of fprop need, and no more."""
    needs = ctx.needs_input_grad
    ctx.call, ctx.weight = call, WeightKind(w.shape, w.dtype)
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if needs[1] else None, w if needs[0] else None)


def keep_pair(ctx: Any, first: Tensor, second: Tensor, call: Any, weight: WeightKind) -> None:
    """Keeps on ctx what the gradients of dgrad or wgrad need, and no more."""
    needs = ctx.needs_input_grad
    ctx.call, ctx.weight = call, weight
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(first if needs[1] else None, second if needs[0] else None)


# The fast path: ctx-style Functions ---------------------------------------------------------------


class Fprop(Function):
    """y = conv(x, w) + shift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, shift: Tensor | None, call: EagerCall) -> Tensor:
        """Runs the engine."""
        keep_fprop(ctx, x, w, shift, call)
        return ops.run_fprop(x, w, call.geometry, shift, call.backend, call.mixed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Grads:
        """Runs dgrad and wgrad, as far as they are needed."""
        if dy is None:
            return None, None, None, None
        return *_fprop_grads(ctx, dy, ctx.needs_input_grad), None


class Dgrad(Function):
    """dx of conv(x, w)."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, w: Tensor, call: EagerCall) -> Tensor:
        """Runs the engine."""
        keep_pair(ctx, dy, w, call, WeightKind(w.shape, w.dtype))
        return ops.run_dgrad(dy, w, call.geometry, call.size, call.backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Grads:
        """Runs fprop and wgrad, as far as they are needed."""
        if g is None:
            return None, None, None
        return *_dgrad_grads(ctx, g, ctx.needs_input_grad), None


class Wgrad(Function):
    """dw of conv(x, w)."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, like: WeightKind, call: EagerCall) -> Tensor:
        """Runs the engine."""
        keep_pair(ctx, dy, x, call, like)
        return ops.run_wgrad(dy, x, call.geometry, like.shape, like.dtype, call.backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Grads:
        """Runs fprop and dgrad, as far as they are needed."""
        if g is None:
            return None, None, None, None
        return *_wgrad_grads(ctx, g, ctx.needs_input_grad), None, None


# The ops' Autograd key ------------------------------------------------------------------------


def _act_backward(dy: Tensor, z: Tensor, act: str) -> Tensor:
    """Returns the gradient by the pre-activation z, in differentiable PyTorch."""
    if act == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if act == "relu6":
        return torch.ops.aten.hardtanh_backward(dy, z, 0, 6)
    if act == "silu":
        return torch.ops.aten.silu_backward(dy, z)
    if act == "gelu":
        return torch.ops.aten.gelu_backward(dy, z)
    return dy


def _op_fprop_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, w, bits, scale, shift, residual, act, ints, backend = inputs
    ctx.call, ctx.weight, ctx.act = OpCall(bits, ints, backend), WeightKind(w.shape, w.dtype), act
    ctx.save_for_backward(x, w, scale, shift, residual)


def _op_fprop_backward(ctx: Any, dy: Tensor) -> Grads:
    x, w, scale, shift, residual = ctx.saved_tensors
    call, needs = ctx.call, ctx.needs_input_grad
    if scale is not None or ctx.act != "none":
        # The pre-activation is not kept; with a fused epilogue it is computed again.
        conv = call.fprop(x, w)
        dz = _act_backward(dy, epilogue(conv, scale, shift, residual, "none"), ctx.act)
    else:
        conv, dz = None, dy
    du = dz if scale is None else dz * scale.to(dz.dtype)[:, None, None]
    dx = call.dgrad(du, w) if needs[0] else None
    dw = call.wgrad(du, x, ctx.weight) if needs[1] else None
    dscale = (dz * conv).sum((0, 2, 3), dtype=scale.dtype) if needs[3] else None
    dshift = dz.sum((0, 2, 3), dtype=shift.dtype) if needs[4] else None
    dresidual = dz if needs[5] else None
    return dx, dw, None, dscale, dshift, dresidual, None, None, None


def _op_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, w, bits, shift, ints, backend = inputs
    ctx.call, ctx.weight = OpCall(bits, ints, backend), WeightKind(w.shape, w.dtype)
    ctx.save_for_backward(x, w, shift, output[0])


def _op_stats_backward(ctx: Any, dy: Tensor, dsum: Tensor, dsquares: Tensor) -> Grads:
    x, w, shift, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    spread = dsum[:, None, None] + 2 * dsquares[:, None, None] * y
    dz = dy + spread.to(dy.dtype)
    dx = ctx.call.dgrad(dz, w) if needs[0] else None
    dw = ctx.call.wgrad(dz, x, ctx.weight) if needs[1] else None
    dshift = dz.sum((0, 2, 3), dtype=shift.dtype) if needs[3] else None
    return dx, dw, None, dshift, None, None


def _op_dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, w, bits, ints, backend = inputs
    ctx.call, ctx.weight = OpCall(bits, ints, backend), WeightKind(w.shape, w.dtype)
    ctx.save_for_backward(dy, w)


def _op_dgrad_backward(ctx: Any, g: Tensor) -> Grads:
    return *_dgrad_grads(ctx, g, ctx.needs_input_grad), None, None, None


def _op_wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, x, bits, shape, dtype, ints, backend = inputs
    ctx.call, ctx.weight = OpCall(bits, ints, backend), WeightKind(tuple(shape), dtype)
    ctx.save_for_backward(dy, x)


def _op_wgrad_backward(ctx: Any, g: Tensor) -> Grads:
    return *_wgrad_grads(ctx, g, ctx.needs_input_grad), None, None, None, None, None


for _name, _setup, _backward in (
    ("fprop", _op_fprop_setup, _op_fprop_backward),
    ("fprop_stats", _op_stats_setup, _op_stats_backward),
    ("dgrad", _op_dgrad_setup, _op_dgrad_backward),
    ("wgrad", _op_wgrad_setup, _op_wgrad_backward),
):
    torch.library.register_autograd(
        f"hetconv::{_name}", _backward, setup_context=_setup, lib=ops._LIBRARY
    )
