# SPDX-License-Identifier: Apache-2.0
"""Calls of wgrad: a Problem on its kernels, with its tables on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...masks import Int32Array
from ...problem import Problem
from ..common import unit
from ..gpu.capture import capturing, pin, upload
from ..gpu.devices import GpuSpec, spec_of
from ..gpu.gradients import empty_gradient, gradient_form
from ..gpu.precision import precision
from .calls import in_order, refuse_left_out, tma_aligned
from .choice import tensor_reasons
from .geometry import wgrad_table
from .launch import Launch, interpreted
from .tiles import SPLIT_FUSED, Tile, splits, wgrad_stages
from .wgrad import reduce_kernel_splits, wgrad_kernel_gather
from .wgrad_choice import WgradChoice
from .wgrad_lowering import Jobs

_REDUCE_BLOCK = 1024
WgradLaunch = Callable[[Tensor, Tensor, Tensor], None]


class WgradCall:
    """wgrad of a Problem, on pointers or on boxes.

    Args:
        problem: what to run.
        choice: tiles, lowering and box.
    """

    def __init__(self, problem: Problem, choice: WgradChoice) -> None:
        self.problem, self.choice, self._device = problem, choice, problem.device
        self._spec: GpuSpec = spec_of(problem.device)
        support, lowering = problem.support, choice.lowering
        self._tiles = {3: choice.tiles[0], 1: choice.tiles[1]}
        form = gradient_form(problem)
        places_key = ("triton places", form, self._device, id(lowering))
        if places_key not in support.derived:
            support.derived[places_key] = upload(lowering.places(form), self._device)
        self._places = support.derived[places_key]
        orders = lowering.filters, lowering.channels
        self._orders = [None if o is None else upload(o, self._device) for o in orders]
        self._bound: dict[Any, list[WgradLaunch]] = {}
        oh, ow = problem.output_size
        self._pixels = problem.batch * oh * ow
        # All parts share one number of splits: that of the one with the most jobs.
        self._splits = max(
            [
                splits(len(p.words), self._pixels, self._tiles[p.taps].pixels, self._spec)
                for p in lowering.parts
            ],
            default=1,
        )
        self._size = lowering.size
        grid = (-(-self._places.numel() // _REDUCE_BLOCK),)
        fixed = {1: self._places, 3: prod(problem.weight_shape), 4: self._size, 5: self._splits}
        self._reduce = Launch(
            reduce_kernel_splits, grid, (_REDUCE_BLOCK,), 4, 1, self._device, fixed
        )

    def run(self, dy: Tensor, x: Tensor) -> Tensor:
        """Computes dw in the problem's canonical form, dead entries zero."""
        dw = empty_gradient(self.problem, x.device)
        if not self._pixels or not self._size:
            return dw.zero_()
        dy, x = map(in_order, (dy.resolve_neg(), x.resolve_neg()), self._orders)
        key = (dy.stride(), x.stride(), precision(x.dtype), tma_aligned(dy, x))
        bound = self._bound.get(key)
        if bound is None:
            boxed = (
                self.choice.box is not None
                and key[3]
                and not tensor_reasons(x.shape, x.stride(), x.dtype)
            )
            bound = self._bound[key] = self._bind(dy, x, boxed)
        shape = (self._splits, self._size)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
        if capturing(self._device):
            pin(self._device, self)
        for start in bound:
            start(dy, x, partials)
        self._reduce(partials, dw)
        return dw

    def _bind(self, dy: Tensor, x: Tensor, boxed: bool) -> list[WgradLaunch]:
        """Makes what depends on the strides of dy and x, for each launch."""
        bound: list[WgradLaunch] = []
        before = 0
        for jobs in self.choice.lowering.parts:
            if boxed and jobs.adjacent(16 // x.element_size()):
                from .tma_calls import bind_wgrad_tma  # host descriptors are for Hopper only

                bound.append(bind_wgrad_tma(self, jobs, dy, x, before))
            else:
                refuse_left_out("triton-wgrad")
                bound.append(self._bind_pointers(jobs, dy, x, before))
            before += jobs.size
        return bound

    def _bind_pointers(self, jobs: Jobs, dy: Tensor, x: Tensor, before: int) -> WgradLaunch:
        tile, widest = self._tiles[jobs.taps], 16 // x.element_size()
        if precision(x.dtype) == "tf32x3" and jobs.taps == 3:
            tile = SPLIT_FUSED.get(tile, tile)
        last_x = x.stride(1) == 1 or x.shape[1] == 1
        last_y = dy.stride(1) == 1 or dy.shape[1] == 1
        x_unit = unit(widest, x) if last_x else 1
        heads = [] if jobs.rows is not None else jobs.plan.segments.tolist()
        y_unit = unit(widest, dy, heads) if last_y else 1
        block = -(-self._pixels // self._splits)
        split = -(-block // tile.pixels) * tile.pixels
        constants = (
            tile.pixels,
            tile.filters,
            tile.channels,
            jobs.taps,
            x_unit,
            y_unit,
            last_x,
            last_y,
            jobs.rows is not None,
            precision(x.dtype),
            interpreted(),
        )
        tables = self.tables(jobs, dy, x, (x_unit, y_unit), split, before)
        return self.launch(wgrad_kernel_gather, jobs, tile, constants, tables)

    def launch(
        self,
        kernel: Any,
        jobs: Jobs,
        tile: Tile,
        constants: tuple[Any, ...],
        tables: tuple[Tensor, ...],
        described: Mapping[int, Any] | None = None,
    ) -> Launch:
        """Makes the launch of some jobs, for dy, x and partials."""
        depth = wgrad_stages(tile, jobs.taps, self.problem.dtype.itemsize, self._spec)
        grid, fixed = (len(jobs.words), self._splits), dict(enumerate(tables, 3))
        return Launch(kernel, grid, constants, tile.warps, depth, self._device, fixed, described)

    def tables(
        self, jobs: Jobs, dy: Tensor, x: Tensor, units: tuple[int, int], split: int, before: int
    ) -> tuple[Tensor, ...]:
        """Makes the tables that a kernel reads: words, owners, rows and `geometry.WGRAD_LINE`.

        Args:
            jobs: of the launch.
            dy: an example.
            x: an example.
            units: what strides are divided by, of x and of dy; the latter also divides filters.
            split: pixels of one split; boxes are split by the kernel.
            before: float32 values of a split that stand before those of these jobs.
        """
        rows: Int32Array | None = jobs.rows
        if rows is None:
            rows = (jobs.plan.segments // units[1]).astype(np.int32)
        problem = self.problem
        table = wgrad_table(
            problem.geometry,
            (problem.height, problem.width),
            problem.output_size,
            problem.batch,
            (x.stride(), dy.stride()),
            (x.shape[1], dy.shape[1]),
            units,
            split,
            (self._size, before),
        )
        return tuple(
            upload(array, self._device) for array in (jobs.words, jobs.owners, rows, table)
        )
