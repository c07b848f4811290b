# SPDX-License-Identifier: Apache-2.0
"""The formulas of the three primitives' gradients, and the Functions of the fast path.

fprop(x, w), dgrad(dy, w) and wgrad(dy, x) are bilinear, and the gradient of each is made of the
other two:

    fprop:  dx = dgrad(dy, w)      dw = wgrad(dy, x)
    dgrad:  d(dy) = fprop(g, w)    dw = wgrad(dy, g)         g: the cotangent of dx
    wgrad:  d(dy) = fprop(x, g)    dx = dgrad(dy, g)         g: the cotangent of dw

They are written once, against a *call* that knows how to run the primitives (see `autograd`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops

if TYPE_CHECKING:
    from .autograd import EagerCall

Grads = tuple[Tensor | None, ...]


class WeightKind(NamedTuple):
    """The shape and dtype that a weight gradient has."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def fprop_grads(ctx: Any, dy: Tensor, needs: Sequence[bool]) -> Grads:
    """Returns the gradients of x, w and shift, those that are needed."""
    x, w = ctx.saved_tensors
    call = ctx.call
    dx = call.dgrad(dy, w) if needs[0] else None
    dw = call.wgrad(dy, x, ctx.weight) if needs[1] else None
    shift = dy.sum((0, 2, 3), dtype=ctx.shift_dtype) if needs[2] else None
    return dx, dw, shift


def dgrad_grads(ctx: Any, g: Tensor, needs: Sequence[bool]) -> Grads:
    """Returns the gradients of dy and w, those that are needed."""
    dy, w = ctx.saved_tensors
    ddy = ctx.call.fprop(g, w) if needs[0] else None
    dw = ctx.call.wgrad(dy, g, ctx.weight) if needs[1] else None
    return ddy, dw


def wgrad_grads(ctx: Any, g: Tensor, needs: Sequence[bool]) -> Grads:
    """Returns the gradients of dy and x, those that are needed."""
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
        return *fprop_grads(ctx, dy, ctx.needs_input_grad), None


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
        return *dgrad_grads(ctx, g, ctx.needs_input_grad), None


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
        return *wgrad_grads(ctx, g, ctx.needs_input_grad), None, None
