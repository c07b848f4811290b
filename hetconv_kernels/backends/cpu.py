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
from . import UNMEASURED_MARGIN, Runner, winograd
from .common import empty, is_linear, is_pointwise, to_format
from .cost_model import (
    DOUBT,
    ENGINE,
    EXPAND,
    FAR_COMPUTE,
    FAR_WEIGHT,
    GRADIENT,
    OVERHEAD,
    PACK,
    PACK_ALONE,
    PIXELS_OF_ROWS,
    VERB,
    WGRAD,
)

_MAX_INT = 2**31 - 1
_MAX_PADDED = 2**30  # along one axis: the engine counts pixels in 32 bits, beyond the edge too
_MAX_RESIDUES = 4096  # dgrad has a plan for each residue of the stride
# Bytes: of packed weights that stay in a processor's cache from one band of pixels to the next, and
# of a band, at most.
_NEAR, _BAND = 2**24, 2**21
# The instruction set; "" takes the best one here, or what HETCONV_ISA says.
_ISA = ""
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
        if problem.verb == "dgrad" and math.prod(_dgrad_stride(problem)) > _MAX_RESIDUES:
            reasons.append(f"The strides multiply to more than {_MAX_RESIDUES}.")
        return reasons

    def estimate(self, problem: Problem) -> float:
        """Predicts the time from what the plan executes, in seconds."""
        if problem.verb == "wgrad":
            threads = torch.get_num_threads()
            wgrad = self._wgrad_plan(problem)
            pixels = problem.batch * math.prod(problem.output_size)
            fixed = math.prod(problem.support.shape) * GRADIENT + ENGINE["pixels"].call
            return pixels * wgrad.cost * WGRAD[wgrad.form] / threads + fixed
        return self._seconds(problem, self._chosen(problem))

    def _seconds(self, problem: Problem, plan: Any) -> float:
        """Predicts the time of one call of fprop or dgrad by a plan."""
        threads = torch.get_num_threads()
        transformed = winograd.tile_of(plan.form) > 0
        name = "pixels" if plan.form in ("pixels", "columns") else "filters"
        cost = winograd.executed(plan, problem) if transformed else plan.cost
        form, rows = ENGINE[name], is_linear(problem)
        around = OVERHEAD[f"{name} rows" if rows else name]
        image = form.image * (PIXELS_OF_ROWS if rows and name == "pixels" else 1.0)
        pixels = problem.batch * math.prod(problem.output_size)
        one_row = rows or (is_pointwise(problem) and problem.channels_last)
        images = 1 if one_row else problem.batch
        pairs = self._pairs(problem)
        compute = (
            pixels * cost * form.operation
            + pixels * _tile_columns(problem) / (32 if pairs else 16) * form.load
            + images * cost * image
        )
        packing = 0.0
        if not problem.frozen_weight:
            expanded = math.prod(problem.support.shape) if problem.live_weight else 0
            hands = threads if plan.packed_elements > PACK_ALONE else 1
            packing = plan.packed_elements * PACK / hands + expanded * EXPAND
        weights = plan.packed_elements * form.packed
        if plan.packed_elements * 4 > _NEAR:
            band = pixels * problem.support.channels * (2 if pairs else 4)
            bands = math.ceil(band / _BAND)
            weights = plan.packed_elements * bands * FAR_WEIGHT
            compute *= FAR_COMPUTE
        seconds = compute * VERB[problem.verb] / threads + weights + packing + form.call + around
        whole = self._plan(problem).packed_elements >= math.prod(problem.support.shape)
        return seconds * (DOUBT if whole else 1.0)

    def measured(self, problem: Problem) -> bool:
        """The seconds were fitted in float32 with AVX-512; elsewhere they are a guess.

        A vector instruction of bfloat16 pairs was seen to take as long as one of float32.
        """
        if problem.dtype == torch.float32:
            return bool(self._plan(problem).isa.startswith("avx512"))
        return problem.verb != "wgrad" and self._pairs(problem)

    def efficiency(self, problem: Problem) -> float:
        """Useful over weighted vector operations; moving data and slower forms count as work.

        Of the direct form, where a call is transformed too: less is executed then than is useful.
        """
        plan = self._plan(problem)
        return min(1.0, plan.useful / plan.cost) if plan.cost else 1.0

    def notes(self, problem: Problem) -> tuple[str, ...]:
        """Says where a call is transformed, and how that errs."""
        direct, plan = self._plan(problem), self._chosen(problem)
        if plan is direct:
            return ()
        gain = self._seconds(problem, direct) / self._seconds(problem, plan)
        return (winograd.note(problem, winograd.tile_of(plan.form), gain),)

    def pools(self, problem: Problem) -> bool:
        """Whether max-pooling happens while a band of the output is in the cache."""
        # The rows of pixels of a pointwise layer are not the image's.
        return problem.channels_last and not is_pointwise(problem)

    def fprop(self, problem: Problem) -> Runner:
        """Prepares y = act(scale · conv(x, w) + shift + residual), and its pooling."""
        geometry, plan = problem.geometry, self._chosen(problem)
        packed = self._packer("fprop", plan, problem)
        wide = torch.promote_types(problem.dtype, torch.float32)
        padding = (geometry.pads[0], geometry.pads[2])
        sizes = _sizes(problem)
        act, run_engine, threads = problem.act, plan.fprop, torch.get_num_threads
        pool, shape, pooling = problem.pool, problem.y_shape, None
        if pool is not None:
            pooled_size = pool.output_size(*problem.output_size)
            shape = (*shape[:2], *pooled_size)
            pooling = (*pool.kernel, *pool.stride, *pool.padding, *pooled_size)
            # Direct sums, pooled as they are computed or, where those were it, afterwards.
            direct = plan is self._plan(problem)
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
        plan = self._plan(problem)
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
        geometry = problem.geometry
        padding = (geometry.pads[0], geometry.pads[2])
        stride = _dgrad_stride(problem)
        key = ("cpu dgrad", _ISA, problem.dtype, problem.channels_last, stride)
        plan = geometry.derived.get(key)
        if plan is None:
            plan = geometry.derived[key] = _cpu.Dgrad(
                _mask(problem),
                stride,
                padding,
                geometry.dilation,
                _name(problem.dtype),
                _ISA,
                channels_last=problem.channels_last,
            )
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
        geometry, plan = problem.geometry, self._wgrad_plan(problem)
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

    def _pairs(self, problem: Problem) -> bool:
        """Whether two channels of bfloat16 are multiplied by one instruction."""
        plan = self._plan(problem)
        bf16 = problem.dtype == torch.bfloat16
        return bf16 and plan.form in ("filters", "pixel pairs") and bool(plan.isa == "avx512bf16")

    @staticmethod
    def _wgrad_plan(problem: Problem, form: str = "auto") -> Any:
        return _kept(_cpu.Wgrad, problem, form)

    @staticmethod
    def _plan(problem: Problem, form: str = "auto") -> Any:
        return _kept(_cpu.Plan, problem, form)

    def _chosen(self, problem: Problem) -> Any:
        """Returns the plan that a call is run by: Winograd's where that is predicted to win."""
        direct = self._plan(problem)
        forms = winograd.forms(problem)
        if not forms:
            return direct
        try:
            transformed = [self._plan(problem, form) for form in forms]
        except ValueError:  # fewer channels or filters than a vector has
            return direct
        fastest = min(transformed, key=lambda plan: self._seconds(problem, plan))
        margin = winograd.WINOGRAD_MARGIN * (1.0 if self.measured(problem) else UNMEASURED_MARGIN)
        seconds = self._seconds(problem, fastest) * margin
        return fastest if seconds <= self._seconds(problem, direct) else direct

    @staticmethod
    def _packer(verb: str, plan: Any, problem: Problem) -> Pack:
        """Returns what packs a canonical weight for a plan, and keeps the form of a frozen one."""
        support, dtype = problem.support, problem.weight_dtype

        def build(w: Tensor) -> Any:
            dense = dense_weight(support, w, dtype) if problem.live_weight else w
            dense = dense.view(support.shape).resolve_neg()
            return plan.pack(
                dense.data_ptr(), dense.stride(), _name(dtype), torch.get_num_threads()
            )

        if not problem.frozen_weight:
            return Pack(build, "cpu")
        key = ("cpu packed", verb, id(plan), dtype)
        # Where the plan is kept: one must not outlive the other.
        store = support.derived if verb == "fprop" else problem.geometry.derived
        cache: FrozenCache = store.setdefault(key, FrozenCache(build, "cpu"))
        return cache


def _kept(make: Any, problem: Problem, form: str) -> Any:
    """Returns the engine's lowering of a Support, made by its class once and kept with it."""
    key = (make, _ISA, problem.dtype, form, problem.channels_last)
    plan = problem.support.derived.get(key)
    if plan is None:
        plan = problem.support.derived[key] = make(
            _mask(problem),
            _name(problem.dtype),
            _ISA,
            form,
            channels_last=problem.channels_last,
        )
    return plan


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


def _dgrad_stride(problem: Problem) -> tuple[int, int]:
    """Returns the stride whose residues dgrad has plans for.

    Where there is one output a stride has no meaning: one that has too many residues is left out.
    """
    stride = problem.geometry.stride
    if math.prod(stride) <= _MAX_RESIDUES:
        return stride
    vertical, horizontal = (
        1 if count == 1 else step for count, step in zip(problem.output_size, stride, strict=True)
    )
    return vertical, horizontal


def _strides(image: Tensor) -> tuple[int, ...]:
    return image.stride()


def _row_strides(image: Tensor) -> tuple[int, ...]:
    row = image.numel()
    return row, 1, row, image.shape[1]


def _mask(problem: Problem) -> Any:
    return np.ascontiguousarray(problem.support.mask).view(np.uint8)


def _live_index(support: Support) -> Tensor:
    """Returns where the live weights stand in a dense one, row by row, made once.  # [live]"""
    index = support.derived.get("cpu live index")
    if index is None:
        # Outside inference mode, so that the tensor can be used anywhere later.
        with torch.inference_mode(False):
            index = torch.from_numpy(np.flatnonzero(support.mask))
        support.derived["cpu live index"] = index
    return index


def _tile_columns(problem: Problem) -> int:
    """Counts the columns that the tiles of at most eight filters read, one after the other."""
    return sum(-(-len(g.filters) // 8) * int(g.mask.sum()) for g in problem.support.groups)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
