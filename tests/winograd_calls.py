# SPDX-License-Identifier: Apache-2.0
"""Calls of the native engine in one of Winograd's forms, and which one it would choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F_
from torch import Tensor

import hetconv_kernels as hk
from hetconv_kernels.backends import cpu_plans, winograd
from hetconv_kernels.ops import describe
from hetconv_kernels.problem import Problem, make_geometry
from hetconv_kernels.testing import error_bound

if "cpu" in hk.available_backends():
    from hetconv_kernels import _cpu

pairs = pytest.mark.skipif(
    "cpu" not in hk.available_backends() or _cpu.isas()[0] != "avx512bf16",
    reason="this processor has no products of bfloat16",
)
wide_vectors = pytest.mark.skipif(
    "cpu" in hk.available_backends() and not _cpu.isas()[0].startswith("avx512"),
    reason="what is chosen was measured with AVX-512",
)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
ACTS = {
    "none": lambda y: y,
    "relu": F_.relu,
    "relu6": F_.relu6,
    "silu": F_.silu,
    "gelu": F_.gelu,
}


def call(
    support: hk.Support,
    x: Tensor,
    w: Tensor,
    *,
    padding: tuple[int, int] = (1, 1),
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    threads: int = 2,
    isa: str = "",
    form: str = "winograd 2x2",
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    out: Tensor | None = None,
    pool: tuple[int, ...] | None = None,
) -> Tensor | None:
    """Returns what the engine computes in this form; None of what it does not pool.

    In the precision of the image, which the weights and the residual have too. Dead weights are
    NaN, and so is the output before.

    Args:
        support: of the layer.
        x: the image.  # [N, C, H, W]
        w: dense, in any layout.  # [F, C, KH, KW]
        padding: of both sides, rows and columns.
        scale: by filter, as ``shift``.  # [F]
        shift: see above.
        residual: added before the activation.
        act: the activation's name.
        threads: of the engine.
        isa: the instruction set; "" is the best one.
        form: the plan's.
        stride: by rows and columns.
        dilation: by rows and columns.
        out: where the result goes.
        pool: kernel, stride, padding and pooled size, two numbers each; with ``out``.
    """
    dtype = cpu_plans.name_of_dtype(x.dtype)
    plan = _cpu.Plan(support.mask.view(np.uint8).copy(), dtype, isa, form)
    assert plan.form == form
    poisoned = torch.where(torch.tensor(support.mask), w, float("nan"))
    packed = plan.pack(poisoned.data_ptr(), poisoned.stride(), dtype, threads)
    size = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, p, d, s in zip(
            x.shape[2:], support.kernel, padding, dilation, stride, strict=True
        )
    )
    y = out
    if y is None:
        y = torch.full((len(x), support.filters, *size), float("nan"), dtype=x.dtype)
        if x.is_contiguous(memory_format=torch.channels_last):
            y = y.contiguous(memory_format=torch.channels_last)
    done = plan.fprop(
        packed, x.data_ptr(), x.stride(), (len(x), *x.shape[2:]), y.data_ptr(), y.stride(), size,
        stride, padding, dilation,
        scale=0 if scale is None else scale.data_ptr(),
        shift=0 if shift is None else shift.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        residual_strides=(0, 0, 0, 0) if residual is None else residual.stride(),
        act=act, threads=threads,
        pool=None if pool is None else _cpu.Pool(pool[:2], pool[2:4], pool[4:6], pool[6:]),
    )  # fmt: skip
    return y if done else None


def assert_near_conv2d(
    y: Tensor | None,
    support: hk.Support,
    x: Tensor,
    w: Tensor,
    *,
    reach: int,
    times: int,
    padding: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    act: str = "none",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    **_: Any,
) -> None:
    """Compares what `call` gave for these arguments with float64.

    An error of a tile is as large as its largest inputs make it, wherever they lie in it. In
    bfloat16, whose bound no random numbers come near, eight times what is expected is taken for
    wrong.

    Args:
        y: the result.
        support: of the layer.
        x: the image.
        w: dense.
        reach: how many pixels of the input the other inputs of a tile are away at most.
        times: the bound of a direct sum that the result may err by.
        padding: as `call` has all that follow.
        stride: see above.
        act: see above.
        scale: see above.
        shift: see above.
        residual: see above.
    """
    assert y is not None

    def finished(z: Tensor, plus: bool) -> Tensor:
        """With what is to be added to it; of magnitudes where `plus`."""
        sign = torch.abs if plus else (lambda t: t)
        if scale is not None:
            z = z * sign(scale.double())[:, None, None]
        if shift is not None:
            z = z + sign(shift.double())[:, None, None]
        return z if residual is None else z + sign(residual.double())

    live = torch.where(torch.tensor(support.mask), w, 0.0).double()
    exact = finished(F_.conv2d(x.double(), live, stride=stride, padding=padding), False)
    assert y.shape == exact.shape
    padded = F_.pad(x.abs().double(), (padding[1],) * 2 + (padding[0],) * 2)
    spread = F_.max_pool2d(padded, 2 * reach + 1, 1, reach)
    size = finished(F_.conv2d(spread, live.abs(), stride=stride), True)
    depth = int(support.mask.sum((1, 2, 3)).max())
    bound = times * error_bound(size, depth, torch.float32) + 1e-6
    if x.dtype == torch.bfloat16:
        squares = F_.conv2d(spread.square(), live.square(), stride=stride)
        by = 1.0 if scale is None else scale.double().abs()[:, None, None]
        expected = winograd.errors(support, 2, torch.bfloat16).expected
        bound = 2**-9 * (8 * expected * by * squares.sqrt() + exact.abs()) + 1e-6
    assert torch.all((y - ACTS[act](exact)).abs() <= 1.2 * bound)


def problem(support: hk.Support, size: tuple[int, int, int], **changes: Any) -> Problem:
    """Describes a frozen layer's call on channels_last images (N, H, W).

    Not strict, whatever the environment says.
    """
    changes.setdefault("strict", False)
    steps = {key: changes.pop(key) for key in ("stride", "dilation") if key in changes}
    geometry = make_geometry(support, padding=1, frozen=changes.pop("frozen", True), **steps)
    dtype = changes.pop("dtype", torch.float32)
    layout = changes.pop("layout", torch.channels_last)
    x = torch.empty(size[0], support.channels, *size[1:], dtype=dtype)
    x = x.contiguous(memory_format=layout)
    w = torch.empty(support.live, dtype=dtype)
    return replace(describe("fprop", geometry, x, x, w, size[1:]), **changes)


def chosen_form(made: Problem) -> str:
    """Returns the form that the engine would run a call by."""
    return str(cpu_plans.chosen_plan(made).form)
