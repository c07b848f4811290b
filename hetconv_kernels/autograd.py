# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the three primitives: a closed cycle, so every order exists.

The formulas of `derivatives` are written once, against a *call* that knows how to run the
primitives: `EagerCall` runs the engines directly, `OpCall` goes through ``torch.ops.hetconv`` so
that tracing sees it. Each primitive has a ctx-style Function in `derivatives` for the fast path, a
setup_context-style twin in `transforms` (with jvp and vmap), and here the same formula on the ops'
Autograd key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad as _forward_ad

from . import ops
from .backends.common import epilogue
from .derivatives import (
    Dgrad,
    Fprop,
    Grads,
    WeightKind,
    Wgrad,
    dgrad_grads,
    wgrad_grads,
)
from .observers import functionalised, has_values, observed
from .observers import transforms_active as transforms_active
from .packing import bits_on
from .problem import Geometry


def through_operator(x: Tensor, *others: Tensor | None) -> bool:
    """Tells whether a call goes to ``torch.ops.hetconv`` here and now.

    A twin comes before an observer, for the operators know no levels; it asks again below them.
    """
    if not observed(x, *others):
        return False
    if torch.compiler.is_compiling() or not transforms_active():
        return True
    return functionalised(x, *others)


def _through_operator_now(first: Tensor, *others: Tensor | None) -> bool:
    """Tells whether a call that a gradient makes goes to the operators.

    It may come when a transform is over.

    The operands that it kept may then be wrappers of a level that is dead, without memory.
    """
    if through_operator(first, *others):
        return True
    return not transforms_active() and not has_values(first, *others)


class EagerCall(NamedTuple):
    """One call in eager mode: the layer, its input size in pixels, and the forced backend.

    A gradient can be computed before other eyes than its output: every primitive asks anew whether
    it is observed.
    """

    geometry: Geometry
    size: tuple[int, int]
    backend: int
    mixed: bool

    def fprop(self, x: Tensor, w: Tensor, shift: Tensor | None = None) -> Tensor:
        """Computes y = conv(x, w) + shift, recorded for differentiation where needed."""
        if _through_operator_now(x, w, shift):
            return self.through_ops(x).fprop(x, w, shift)
        return self.eager_fprop(x, w, shift)

    def eager_fprop(self, x: Tensor, w: Tensor, shift: Tensor | None = None) -> Tensor:
        """Does what `fprop` does, where it is known that the call is not observed."""
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
        if _through_operator_now(dy, w):
            return self.through_ops(dy).dgrad(dy, w)
        if transforms_active():
            from . import transforms  # rarely needed

            return transforms.DgradTwin.apply(dy, w, self)
        if torch.is_grad_enabled() and (dy.requires_grad or w.requires_grad):
            return Dgrad.apply(dy, w, self)
        return ops.run_dgrad(dy, w, self.geometry, self.size, self.backend)

    def wgrad(self, dy: Tensor, x: Tensor, like: WeightKind) -> Tensor:
        """Computes dw, recorded for differentiation where needed."""
        if _through_operator_now(dy, x):
            return self.through_ops(dy).wgrad(dy, x, like)
        if transforms_active():
            from . import transforms  # rarely needed

            return transforms.WgradTwin.apply(dy, x, like, self)
        if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
            return Wgrad.apply(dy, x, like, self)
        return ops.run_wgrad(dy, x, self.geometry, like.shape, like.dtype, self.backend)

    def through_ops(self, first: Tensor) -> OpCall:
        """Returns this call through the operators, for a first operand's device."""
        bits = bits_on(self.geometry.support, first.device)
        return OpCall(bits, self.geometry.ints(*self.size), self.backend)


class OpCall(NamedTuple):
    """One call through ``torch.ops.hetconv``: mask bits, `Geometry.ints`, forced backend."""

    bits: Tensor
    ints: Sequence[int]
    backend: int

    def fprop(self, x: Tensor, w: Tensor, shift: Tensor | None = None) -> Tensor:
        """Computes y = conv(x, w) + shift."""
        return torch.ops.hetconv.fprop(
            x, w, self.bits, None, shift, None, "none", self.ints, self.backend
        )

    def dgrad(self, dy: Tensor, w: Tensor) -> Tensor:
        """Computes dx."""
        return torch.ops.hetconv.dgrad(dy, w, self.bits, self.ints, self.backend)

    def wgrad(self, dy: Tensor, x: Tensor, like: WeightKind) -> Tensor:
        """Computes dw."""
        return torch.ops.hetconv.wgrad(
            dy, x, self.bits, like.shape, like.dtype, self.ints, self.backend
        )


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
    # The integers of a JIT trace are constants: the size of the image is that of this call.
    ctx.call = OpCall(bits, (*x.shape[2:], *ints[2:]), backend)
    ctx.weight, ctx.act = WeightKind(w.shape, w.dtype), act
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


def _op_dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, w, bits, ints, backend = inputs
    ctx.call, ctx.weight = OpCall(bits, ints, backend), WeightKind(w.shape, w.dtype)
    ctx.save_for_backward(dy, w)


def _op_dgrad_backward(ctx: Any, g: Tensor) -> Grads:
    return *dgrad_grads(ctx, g, ctx.needs_input_grad), None, None, None


def _op_wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, x, bits, shape, dtype, ints, backend = inputs
    ctx.call, ctx.weight = OpCall(bits, ints, backend), WeightKind(tuple(shape), dtype)
    ctx.save_for_backward(dy, x)


def _op_wgrad_backward(ctx: Any, g: Tensor) -> Grads:
    return *wgrad_grads(ctx, g, ctx.needs_input_grad), None, None, None, None, None


# Forward mode through the ops: torch.library knows none, and would drop the tangents silently ---


def _dual(run: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Runs a bilinear operator on dual tensors."""
    (pa, ta), (pb, tb) = _unpacked(a), _unpacked(b)
    y = run(pa, pb)
    parts = [run(ta, pb)] if ta is not None else []
    parts += [run(pa, tb)] if tb is not None else []
    return y if not parts else _forward_ad.make_dual(y, sum(parts[1:], parts[0]), level=0)


def _unpacked(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    primal, tangent = _forward_ad.unpack_dual(tensor, level=0)
    return primal, tangent


def _dual_fprop(
    x: Tensor,
    w: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    ints: Sequence[int],
    backend: int,
) -> Tensor:
    y = _dual(OpCall(bits, ints, backend).fprop, x, w)
    return epilogue(y, scale, shift, residual, act)


def _dual_dgrad(dy: Tensor, w: Tensor, bits: Tensor, ints: Sequence[int], backend: int) -> Tensor:
    return _dual(OpCall(bits, ints, backend).dgrad, dy, w)


def _dual_wgrad(
    dy: Tensor,
    x: Tensor,
    bits: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    ints: Sequence[int],
    backend: int,
) -> Tensor:
    call, like = OpCall(bits, ints, backend), WeightKind(tuple(shape), dtype)
    return _dual(partial(call.wgrad, like=like), dy, x)


def _with_tangents(reverse: Callable[..., Any], dual: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the kernel of an Autograd key of the one for reverse mode and the one for dual tensors.

    Args:
        reverse: called with the key set and the operator's arguments.
        dual: called with the operator's arguments where one of them has a tangent.
    """

    def kernel(keyset: Any, *args: Any) -> Any:
        if transforms_active() and any(
            isinstance(a, Tensor) and a.is_floating_point() and _unpacked(a)[1] is not None
            for a in args
        ):
            return dual(*args)
        return reverse(keyset, *args)

    return kernel


for _name, _setup, _backward, _dual_form in (
    ("fprop", _op_fprop_setup, _op_fprop_backward, _dual_fprop),
    ("dgrad", _op_dgrad_setup, _op_dgrad_backward, _dual_dgrad),
    ("wgrad", _op_wgrad_setup, _op_wgrad_backward, _dual_wgrad),
):
    # What torch.library.register_autograd does, but for the tangents.
    _reverse = make_autograd_impl(
        getattr(torch.ops.hetconv, _name).default, Info(_backward, _setup)
    )
    ops._LIBRARY.impl(_name, _with_tangents(_reverse, _dual_form), "Autograd", with_keyset=True)
