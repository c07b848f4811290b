# SPDX-License-Identifier: Apache-2.0
"""The primitives under functorch transforms and forward mode: the twins of the fast Functions.

functorch needs ``setup_context``-style Functions, which cost three times as much to call as the
ctx-style ones of `derivatives`; so these run only while a transform is active. The formulas are the
same objects; jvp and vmap are added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops
from .derivatives import Dgrad, Fprop, WeightKind, Wgrad, keep_fprop, keep_pair
from .observers import has_values, observed

if TYPE_CHECKING:
    from .autograd import EagerCall


def _add(*terms: Tensor | None) -> Tensor | None:
    total = None
    for term in terms:
        total = term if total is None else total if term is None else total + term
    return total


def _vmap_bilinear(
    info: Any,
    in_dims: tuple[Any, ...],
    tensors: tuple[Tensor, ...],
    run: Callable[..., Tensor],
    folds: bool,
) -> tuple[Tensor, int]:
    """Batches a primitive: images join the batch where only they are mapped, else one by one."""
    dims = in_dims[: len(tensors)]
    if folds and dims[0] is not None and all(d is None for d in dims[1:]):
        images = tensors[0].movedim(dims[0], 0)
        result = run(images.flatten(0, 1), *tensors[1:])
        return result.unflatten(0, images.shape[:2]), 0
    each = [
        run(*(t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return torch.stack(each), 0


class FpropTwin(Function):
    """`Fprop` for functorch transforms and forward mode."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, shift: Tensor | None, call: EagerCall) -> Tensor:
        """Runs the engine."""
        if observed(x, w, shift) or not has_values(x, w, shift):
            return call.through_ops(x).fprop(x, w, shift)
        return ops.run_fprop(x, w, call.geometry, shift, call.backend, call.mixed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps the operands."""
        x, w, shift, call = inputs
        keep_fprop(ctx, x, w, shift, call)
        ctx.save_for_forward(x, w)

    backward = Fprop.backward

    @staticmethod
    def jvp(ctx: Any, tx: Any, tw: Any, tshift: Any, _call: None) -> Tensor | None:
        """Adds the tangents' contributions."""
        x, w = ctx.saved_tensors
        return _add(
            None if tx is None else ctx.call.fprop(tx, w, tshift),
            None if tw is None else ctx.call.fprop(x, tw, tshift if tx is None else None),
            _only_shift(ctx, x, w, tshift) if tx is None and tw is None else None,
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, w: Tensor, shift: Tensor | None, call: EagerCall
    ) -> tuple[Tensor, int]:
        """Batches over a mapped dimension."""
        tensors = (x, w) if shift is None else (x, w, shift)
        return _vmap_bilinear(info, in_dims, tensors, call.fprop, folds=True)


def _only_shift(ctx: Any, x: Tensor, w: Tensor, tshift: Tensor | None) -> Tensor | None:
    if tshift is None:
        return None
    return torch.zeros_like(ctx.call.fprop(x, w)) + tshift.to(x.dtype)[:, None, None]


class DgradTwin(Function):
    """`Dgrad` for functorch transforms and forward mode."""

    @staticmethod
    def forward(dy: Tensor, w: Tensor, call: EagerCall) -> Tensor:
        """Runs the engine."""
        if observed(dy, w) or not has_values(dy, w):
            return call.through_ops(dy).dgrad(dy, w)
        return ops.run_dgrad(dy, w, call.geometry, call.size, call.backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps the operands."""
        dy, w, call = inputs
        keep_pair(ctx, dy, w, call, WeightKind(w.shape, w.dtype))
        ctx.save_for_forward(dy, w)

    backward = Dgrad.backward

    @staticmethod
    def jvp(ctx: Any, tdy: Any, tw: Any, _call: None) -> Tensor | None:
        """Adds the tangents' contributions."""
        dy, w = ctx.saved_tensors
        return _add(
            None if tdy is None else ctx.call.dgrad(tdy, w),
            None if tw is None else ctx.call.dgrad(dy, tw),
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, dy: Tensor, w: Tensor, call: EagerCall) -> tuple[Tensor, int]:
        """Batches over a mapped dimension."""
        return _vmap_bilinear(info, in_dims, (dy, w), call.dgrad, folds=True)


class WgradTwin(Function):
    """`Wgrad` for functorch transforms and forward mode."""

    @staticmethod
    def forward(dy: Tensor, x: Tensor, like: WeightKind, call: EagerCall) -> Tensor:
        """Runs the engine."""
        if observed(dy, x) or not has_values(dy, x):
            return call.through_ops(dy).wgrad(dy, x, like)
        return ops.run_wgrad(dy, x, call.geometry, like.shape, like.dtype, call.backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps the operands."""
        dy, x, like, call = inputs
        keep_pair(ctx, dy, x, call, like)
        ctx.save_for_forward(dy, x)

    backward = Wgrad.backward

    @staticmethod
    def jvp(ctx: Any, tdy: Any, tx: Any, _like: None, _call: None) -> Tensor | None:
        """Adds the tangents' contributions."""
        dy, x = ctx.saved_tensors
        return _add(
            None if tdy is None else ctx.call.wgrad(tdy, x, ctx.weight),
            None if tx is None else ctx.call.wgrad(dy, tx, ctx.weight),
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, dy: Tensor, x: Tensor, like: WeightKind, call: EagerCall
    ) -> tuple[Tensor, int]:
        """Batches over a mapped dimension, one by one: each has its own weight gradient."""

        def run(dy: Tensor, x: Tensor) -> Tensor:
            return call.wgrad(dy, x, like)

        return _vmap_bilinear(info, in_dims, (dy, x), run, folds=False)
