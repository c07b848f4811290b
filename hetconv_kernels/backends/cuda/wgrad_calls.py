# SPDX-License-Identifier: Apache-2.0
"""Calls of wgrad: a Problem on its kernel and on ``narrow_reduce``, with tables on the device."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ...masks import Int32Array
from ...problem import Problem
from ...support import Support
from ..gpu.capture import DeviceTables, capturing, pin, refuse_capture, upload
from ..gpu.gradients import empty_gradient, gradient_form
from .calls import compiled_part, current, dtype_name, readable, strides_of
from .choice import NarrowWgradChoice, WideWgradChoice
from .narrow_tma import HALO, tma_readable

# Bytes that partial gradients may take, all blocks together.
_MOST_PARTIALS = 2**28


class _Targets(Protocol):
    def targets(self, support: Support, form: str) -> Int32Array: ...


class _WgradCall:
    """wgrad of a Problem: what the kernels for narrow and for wide groups share.

    Args:
        problem: what to run.
        tables: the lowering.
        arrays: what the kernel reads, by name.
    """

    def __init__(self, problem: Problem, tables: _Targets, arrays: dict[str, Int32Array]) -> None:
        self.problem, self._device = problem, problem.device
        self._tables = {name: upload(array, self._device) for name, array in arrays.items()}
        targets = tables.targets(problem.support, gradient_form(problem))
        self._targets = upload(targets, self._device)
        self._kept = DeviceTables(*self._tables.values(), self._targets)
        self._name, self._bound = dtype_name(problem.dtype), dict[Any, Any]()

    def run(self, dy: Tensor, x: Tensor) -> Tensor:
        """Computes dw in the problem's canonical form, dead entries zero."""
        dw = empty_gradient(self.problem, self._device)
        size = self._targets.numel()
        if not dy.numel() or not size:
            return dw.zero_()
        dy, x = readable(dy), self.seen(readable(x))
        key = (dy.stride(), x.stride())
        with current(self._device) as stream:
            bound = self._bound.get(key)
            if bound is None:
                bound = self._bound[key] = self._bind(dy, x)
            call, splits = bound
            partials = torch.empty((splits, size), dtype=torch.float32, device=self._device)
            self._kept.lend(self._device)
            if capturing(self._device):
                pin(self._device, self)
            call.launch(self._name, x.data_ptr(), dy.data_ptr(), partials.data_ptr(), stream)
            compiled_part().reduce(
                partials.data_ptr(),
                self._targets.data_ptr(),
                dw.data_ptr(),
                size,
                dw.numel(),
                splits,
                dtype_name(dw.dtype),
                stream,
            )
        return dw

    def seen(self, x: Tensor) -> Tensor:
        """Returns the pixels of x that the kernel reads."""
        return x

    def _bind(self, dy: Tensor, x: Tensor) -> tuple[Any, int]:
        """Fills the kernel's arguments, all but the operands' addresses; counts the partials."""
        raise NotImplementedError


class NarrowWgradCall(_WgradCall):
    """wgrad of a Problem by the kernel for narrow groups.

    Args:
        problem: what to run.
        choice: how.
    """

    def __init__(self, problem: Problem, choice: NarrowWgradChoice) -> None:
        names = ("geometry", "heads", "units", "chunks", "slots")
        super().__init__(problem, choice.tables, {n: getattr(choice.tables, n) for n in names})
        self.choice = choice

    def _bind(self, dy: Tensor, x: Tensor) -> tuple[Any, int]:
        refuse_capture(self._device, "A layout of operands")  # asks the device for its blocks
        problem, tables = self.problem, self.choice.tables
        call = compiled_part().NarrowWgrad()
        for name, table in self._tables.items():
            setattr(call, name, table.data_ptr())
        call.x_n, _, call.x_h, call.x_w = strides_of(x)
        call.y_n, _, call.y_h, call.y_w = strides_of(dy)
        call.batch, call.image_h, call.image_w = problem.batch, problem.height, problem.width
        call.parts, call.unit_count = len(tables.heads), len(tables.units)
        call.tile_h, call.tile_w, call.warps = tables.height, tables.width, tables.warps
        call.x_pitch, call.x_slot_pitch, call.dy_pitch, call.dy_slot_pitch = tables.pitches
        call.halo_pixels, call.buffers = tables.halo_pixels, self.choice.buffers
        if not self.choice.no_tma and tma_readable(x) and tma_readable(dy):
            call.tma, call.channels, call.filters = 1, x.shape[1], dy.shape[1]
            call.dy_h, call.dy_w = problem.output_size
            call.halo_h, call.halo_w = tables.geometry[HALO].tolist()
        rows, cols = problem.output_size
        tiles = problem.batch * -(-rows // tables.height) * -(-cols // tables.width)
        most = max(1, _MOST_PARTIALS // (4 * self._targets.numel()))
        call.blocks = min(max(call.max_resident_blocks(self._name), 1), tiles, most)
        return call, call.blocks


class WideWgradCall(_WgradCall):
    """wgrad of a Problem by the kernel for wide groups.

    Args:
        problem: what to run.
        choice: how.
    """

    def __init__(self, problem: Problem, choice: WideWgradChoice) -> None:
        how = choice.how
        names = ("jobs", "blocks", "places")
        arrays = {name: getattr(how.tables, name) for name in names} | {"classes": how.classes}
        super().__init__(problem, how.tables, arrays)
        self.choice = choice

    def seen(self, x: Tensor) -> Tensor:
        """Returns the pixels of x that the kernel reads: each n-th, as one image."""
        rows, cols = self.choice.every
        return x[:, :, ::rows, ::cols]

    def _bind(self, dy: Tensor, x: Tensor) -> tuple[Any, int]:
        plan, tables = self.choice.how.plan, self.choice.how.tables
        call = compiled_part().WideWgrad()
        for name, table in self._tables.items():
            setattr(call, name, table.data_ptr())
        call.x_n, _, call.x_h, call.x_w = strides_of(x)
        call.dy_n, _, call.dy_h, call.dy_w = strides_of(dy)
        call.batch = self.problem.batch
        call.image_h, call.image_w = x.shape[2:]
        call.out_h, call.out_w = self.problem.output_size
        call.job_count, call.products = len(plan.jobs), plan.products
        call.most_blocks, call.tile_rows = tables.most_blocks, plan.rows
        call.x_pitch, call.dy_pitch = plan.pitches
        call.stages, call.splits = plan.stages, plan.splits
        return call, plan.splits
