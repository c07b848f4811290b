# SPDX-License-Identifier: Apache-2.0
"""`cpu`: the native engine of csrc/cpu, for float32, float64, bfloat16 and float16.

The extension sees addresses, sizes and strides. It reads both memory formats in place, packs bands
of the image as it goes, and writes the result's format; nothing is converted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _cpu
from ..arena import allocate
from ..packing import FrozenCache, Pack, dense_weight
from ..pooling import max_pooled
from ..problem import Problem
from ..support import Support
from . import winograd
from .common import empty, is_linear, is_pointwise, to_format
from .cpu_plans import (
    MOST_RESIDUES,
    chosen_plan,
    dgrad_plan,
    dgrad_stride,
    direct_plan,
    is_measured,
    name_of_dtype,
    plan_seconds,
    wgrad_plan,
    wgrad_plan_seconds,
)
from .protocol import Runner

_MAX_INT = 2**31 - 1
_MAX_PADDED = 2**30  # along one axis: the engine counts pixels in 32 bits, beyond the edge too
_NO_RESIDUAL = (0, 0, 0, 0)


class Cpu:
    """The native engine; its plans are kept with the Support they were made from."""

    name = "cpu"

    @property
    def grain(self) -> tuple[int, int]:
        """Two vectors of float32 filters, and the four channels that are read together."""
        lanes = {"avx512bf16": 16, "avx512": 16, "avx2": 8}.get(_cpu.isas()[0], 4)
        return 2 * lanes, 4

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Refuses what does not lie in main memory, and sizes beyond the engine's integers."""
        reasons = []
        if problem.device.type != "cpu":
            reasons.append(f"The tensors are on {problem.device}, not on the CPU.")
        oh, ow = problem.output_size
        if (
            max(problem.x_shape[1:] + problem.y_shape[1:]) > _MAX_INT
            or max(problem.height * problem.width, oh * ow) > _MAX_INT
        ):
            reasons.append("One channel of the image has more than 2**31 - 1 pixels.")
        top, bottom, left, right = problem.geometry.pads
        if max(problem.height + top + bottom, problem.width + left + right) > _MAX_PADDED:
            reasons.append("The padded image has more than 2**30 pixels along one axis.")
        if max(problem.support.kernel) > 64:
            reasons.append("The kernel has more than 64 taps along one axis.")
        if problem.verb == "dgrad" and math.prod(dgrad_stride(problem)) > MOST_RESIDUES:
            reasons.append(f"The strides multiply to more than {MOST_RESIDUES}.")
        return reasons

    def estimate(self, problem: Problem) -> float:
        """Predicts the time from what the plan executes, in seconds."""
        if problem.verb == "wgrad":
            return wgrad_plan_seconds(problem, wgrad_plan(problem))
        return plan_seconds(problem, chosen_plan(problem))

    def estimate_in_program(self, problem: Problem) -> float:
        """Predicts the time of fprop as a step of a network's program, without a layer's Python."""
        return plan_seconds(problem, chosen_plan(problem), around=False)

    def measured(self, problem: Problem) -> bool:
        """The seconds were fitted in float32 with AVX-512; elsewhere they are a guess."""
        return is_measured(problem)

    def efficiency(self, problem: Problem) -> float:
        """Useful over weighted vector operations; moving data and slower forms count as work.

        Of the direct form, where a call is transformed too: less is executed then than is useful.
        """
        plan = direct_plan(problem)
        return min(1.0, plan.useful / plan.cost) if plan.cost else 1.0

    def notes(self, problem: Problem) -> tuple[str, ...]:
        """Says where a call is transformed, and how that errs."""
        direct, plan = direct_plan(problem), chosen_plan(problem)
        if plan is direct:
            return ()
        gain = plan_seconds(problem, direct) / plan_seconds(problem, plan)
        return (winograd.note(problem, winograd.tile_of(plan.form), gain),)

    def pools(self, problem: Problem) -> bool:
        """Whether max-pooling happens while a band of the output is in the cache."""
        # The rows of pixels of a pointwise layer are not the image's.
        return problem.channels_last and not is_pointwise(problem)

    def fprop(self, problem: Problem) -> Runner:
        """Prepares y = act(scale · conv(x, w) + shift + residual), and its pooling."""
        geometry, plan = problem.geometry, chosen_plan(problem)
        packed = self._packer("fprop", plan, problem)
        wide = torch.promote_types(problem.dtype, torch.float32)
        padding = (geometry.pads[0], geometry.pads[2])
        sizes = _sizes(problem)
        act, run_engine, threads = problem.act, plan.fprop, torch.get_num_threads
        pool, shape, pooling = problem.pool, problem.y_shape, None
        if pool is not None:
            pooled_size = pool.output_size(*problem.output_size)
            shape = (*shape[:2], *pooled_size)
            pooling = _cpu.Pool(*pool, pooled_size)
            # Direct sums, pooled as they are computed or, where those were it, afterwards.
            direct = plan is direct_plan(problem)
            other = self.fprop(replace(problem, pool=None if direct else pool, strict=True))

        def run(
            x: Tensor,
            w: Tensor,
            scale: Tensor | None,
            shift: Tensor | None,
            residual: Tensor | None,
        ) -> Tensor:
            y = empty(shape, x, problem)
            x = x.resolve_neg()  # the engine reads memory, where a lazy sign does not show
            # The per-filter vectors are the only operands that are ever converted.
            if scale is not None:
                scale = scale.to(wide).contiguous()
            if shift is not None:
                shift = shift.to(wide).contiguous()
            if residual is not None:
                residual = residual.resolve_neg()
            size, out_size, strides = sizes(x, y, residual)
            done = run_engine(
                packed(w),
                x.data_ptr(),
                strides(x),
                size,
                y.data_ptr(),
                strides(y),
                out_size,
                geometry.stride,
                padding,
                geometry.dilation,
                0 if scale is None else scale.data_ptr(),
                0 if shift is None else shift.data_ptr(),
                0 if residual is None else residual.data_ptr(),
                _NO_RESIDUAL if residual is None else strides(residual),
                act,
                threads(),
                pooling,
            )
            if done or pool is None:
                return y
            # Not even one row of the pooled image fits in the cache.
            sums = other(x, w, scale, shift, residual)
            return max_pooled(sums, pool) if direct else sums

        return run

    def product(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
        """Prepares a fully-connected layer on contiguous rows of features: no image is made.

        Returns:
            A callable (x, w, bias) -> y, None where it is none.  # [..., C] -> [..., F]
        """
        rows, (f, c) = problem.batch, problem.support.shape[:2]
        if not is_linear(problem) or not 0 < rows <= _MAX_PADDED:
            return None
        plan = direct_plan(problem)
        packed, run_engine = self._packer("fprop", plan, problem), plan.fprop
        dtype, wide = problem.dtype, torch.promote_types(problem.dtype, torch.float32)
        size, out_size, one, none = (1, 1, rows), (1, rows), (1, 1), (0, 0)
        x_strides, y_strides = (rows * c, 1, rows * c, c), (rows * f, 1, rows * f, f)
        device, layout, threads = problem.device, torch.contiguous_format, torch.get_num_threads

        def run(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
            y = allocate(problem, (*x.shape[:-1], f), dtype, device, layout)
            if bias is not None:
                bias = bias.to(wide).contiguous()
            run_engine(
                packed(w),
                x.data_ptr(),
                x_strides,
                size,
                y.data_ptr(),
                y_strides,
                out_size,
                one,
                none,
                one,
                0,
                0 if bias is None else bias.data_ptr(),
                0,
                _NO_RESIDUAL,
                "none",
                threads(),
                None,
            )
            return y

        return run

    def dgrad(self, problem: Problem) -> Runner:
        """Prepares dx."""
        plan = dgrad_plan(problem)
        packed = self._packer("dgrad", plan, problem)
        sizes = _sizes(problem)

        def run(dy: Tensor, w: Tensor) -> Tensor:
            dx = empty(problem.x_shape, dy, problem)
            dy = dy.resolve_neg()
            size, out_size, strides = sizes(dx, dy)
            plan.dgrad(
                packed(w),
                dy.data_ptr(),
                strides(dy),
                (size[0], *out_size),
                dx.data_ptr(),
                strides(dx),
                size[1:],
                torch.get_num_threads(),
            )
            return dx

        return run

    def wgrad(self, problem: Problem) -> Runner:
        """Prepares dw."""
        geometry, plan = problem.geometry, wgrad_plan(problem)
        sizes = _sizes(problem)
        live = _live_index(problem.support) if problem.live_weight else None
        # The engine writes the live entries only, in any layout.
        layout = torch.contiguous_format if problem.live_weight else problem.format

        def run(dy: Tensor, x: Tensor) -> Tensor:
            dw = torch.empty(problem.support.shape, dtype=problem.dtype, memory_format=layout)
            dw.zero_()
            dy, x = dy.resolve_neg(), x.resolve_neg()
            size, out_size, strides = sizes(x, dy)
            plan.wgrad(
                x.data_ptr(),
                strides(x),
                size,
                dy.data_ptr(),
                strides(dy),
                out_size,
                dw.data_ptr(),
                dw.stride(),
                geometry.stride,
                (geometry.pads[0], geometry.pads[2]),
                geometry.dilation,
                torch.get_num_threads(),
            )
            dw = dw.to(problem.weight_dtype)
            if live is not None:
                return dw.view(-1).index_select(0, live).view(problem.weight_shape)
            return to_format(problem, dw)

        return run

    @staticmethod
    def _packer(verb: str, plan: Any, problem: Problem) -> Pack:
        """Returns what packs a canonical weight for a plan, and keeps the form of a frozen one."""
        support, dtype = problem.support, problem.weight_dtype

        def build(w: Tensor) -> Any:
            dense = dense_weight(support, w, dtype) if problem.live_weight else w
            dense = dense.view(support.shape).resolve_neg()
            return plan.pack(
                dense.data_ptr(), dense.stride(), name_of_dtype(dtype), torch.get_num_threads()
            )

        if not problem.frozen_weight:
            return Pack(build, "cpu")
        key = ("cpu packed", verb, id(plan), dtype)
        # Where the plan is kept: one must not outlive the other.
        store = support.derived if verb == "fprop" else problem.geometry.derived
        cache: FrozenCache = store.setdefault(key, FrozenCache(build, "cpu"))
        return cache


# The input's images, height and width; the output's height and width; what gives strides for them.
_Sizes = tuple[tuple[int, int, int], tuple[int, int], Callable[[Tensor], tuple[int, ...]]]


def _sizes(problem: Problem) -> Callable[..., _Sizes]:
    """Returns what tells how the engine is to read the operands of a call.

    A pointwise layer has nothing to do with images: where memory allows, all are one row of pixels.
    """
    images = (problem.batch, problem.height, problem.width), problem.output_size, _strides
    pixels = problem.batch * problem.height * problem.width
    if not is_pointwise(problem) or not 0 < pixels <= _MAX_PADDED:
        return lambda *_: images
    row = (1, 1, pixels), (1, pixels), _row_strides

    def sizes(*operands: Tensor | None) -> _Sizes:
        for tensor in operands:
            if tensor is not None and not tensor.is_contiguous(memory_format=torch.channels_last):
                return images
        return row

    return sizes


def _strides(image: Tensor) -> tuple[int, ...]:
    return image.stride()


def _row_strides(image: Tensor) -> tuple[int, ...]:
    row = image.numel()
    return row, 1, row, image.shape[1]


def _live_index(support: Support) -> Tensor:
    """Returns where the live weights stand in a dense one, row by row, made once.  # [live]"""
    index = support.derived.get("cpu live index")
    if index is None:
        # Outside inference mode, so that the tensor can be used anywhere later.
        with torch.inference_mode(False):
            index = torch.from_numpy(np.flatnonzero(support.mask))
        support.derived["cpu live index"] = index
    return index
