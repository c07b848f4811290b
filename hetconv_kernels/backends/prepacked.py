# SPDX-License-Identifier: Apache-2.0
"""oneDNN on a frozen weight: laid out for it once, and a ReLU applied as it writes.

PyTorch's ``conv2d`` lays the weight out anew at each call, and its ``linear`` does not go to oneDNN
at all. The operators that its compiler uses for frozen weights are called here directly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..packing import FrozenCache
from ..problem import Problem
from .common import finish_in_place, is_linear

_OPS = ("_reorder_convolution_weight", "_reorder_linear_weight", "_convolution_pointwise",
        "_linear_pointwise")  # fmt: skip
# Rows of a matrix product that a weight is laid out for; other numbers work, and as fast.
_ROWS = 32

# Below so many multiply-accumulates these operators take longer to start than they save.
_LEAST_MACS = 2**22

Finish = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def takes(problem: Problem) -> bool:
    """Tells whether a frozen weight of this problem can be laid out for oneDNN in advance."""
    return (
        problem.verb == "fprop"
        and problem.frozen_weight
        and problem.device.type == "cpu"
        and problem.dtype == problem.weight_dtype == torch.float32
        and problem.geometry.symmetric_padding is not None
        and not {"scale", "stats"} & set(problem.epilogue)
        and (problem.channels_last or is_linear(problem))
        and problem.dense_macs >= _LEAST_MACS
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and all(hasattr(torch.ops.mkldnn, name) for name in _OPS)
    )


def convolution(problem: Problem, dense: Callable[[Tensor], Tensor]) -> Finish:
    """Prepares y = act(conv(x, w) + shift + residual) on a frozen weight.

    Args:
        problem: what runs; `takes` it.
        dense: makes the weight that ``torch.conv2d`` takes from the canonical one.

    Returns:
        A callable (x, w, shift, residual) -> y.  # [N, F, OH, OW]
    """
    geometry = problem.geometry
    groups = geometry.support.uniform_groups or 1
    stride, padding, dilation = geometry.stride, geometry.symmetric_padding, geometry.dilation

    def pack(w: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(
            dense(w), padding, stride, dilation, groups, list(problem.x_shape)
        )

    packed = _kept(problem, "conv", pack)
    convolve, fused = torch.ops.mkldnn._convolution_pointwise, _fused_act(problem)

    def run(x: Tensor, w: Tensor, shift: Tensor | None, residual: Tensor | None) -> Tensor:
        y = convolve(x, packed(w), shift, padding, stride, dilation, groups, fused, [], "")
        return _finish(problem, y, residual).contiguous(memory_format=problem.format)

    return run


def prepare_linear(problem: Problem, dense: Callable[[Tensor], Tensor]) -> Finish:
    """Prepares the same where it is a matrix product: images and kernel of one pixel."""
    packed = _kept_rows(problem, dense)
    multiply, fused = torch.ops.mkldnn._linear_pointwise, _fused_act(problem)

    def run(x: Tensor, w: Tensor, shift: Tensor | None, residual: Tensor | None) -> Tensor:
        y = multiply(x.flatten(1), packed(w), shift, fused, [], "")
        return _finish(problem, y[:, :, None, None], residual)

    return run


def prepare_product(
    problem: Problem, dense: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Prepares y = x · wᵀ + bias on rows of features.  # [..., C] -> [..., F]"""
    packed, multiply = _kept_rows(problem, dense), torch.ops.mkldnn._linear_pointwise
    dtype = problem.dtype

    def run(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None and bias.dtype is not dtype:
            bias = bias.to(dtype)
        return multiply(x, packed(w), bias, "none", [], "")

    return run


def _kept_rows(problem: Problem, dense: Callable[[Tensor], Tensor]) -> FrozenCache:
    """Returns what lays a weight out for oneDNN's product of matrices, and keeps it."""

    def pack(w: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(dense(w).flatten(1), _ROWS)

    return _kept(problem, "linear", pack)


def _kept(problem: Problem, key: object, pack: Callable[[Tensor], Tensor]) -> FrozenCache:
    cache: FrozenCache = problem.geometry.derived.setdefault(
        ("onednn", key, problem.channels_last), FrozenCache(pack, "vendor")
    )
    return cache


def _fused_act(problem: Problem) -> str:
    return "relu" if problem.act == "relu" and "residual" not in problem.epilogue else "none"


def _finish(problem: Problem, y: Tensor, residual: Tensor | None) -> Tensor:
    if residual is not None:
        y += residual
    elif problem.act == "relu":
        return y
    return finish_in_place(y, problem.act)
