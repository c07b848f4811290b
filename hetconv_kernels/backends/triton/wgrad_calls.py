# SPDX-License-Identifier: Apache-2.0
"""Calls of wgrad: a Problem on its kernels, with its tables on the device."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...problem import Problem
from ..capture import capturing, pin, upload
from ..common import unit
from ..parts import Part, part_of
from .calls import precision
from .choice import parts_of
from .launch import Launch, interpreted
from .lowering import Int32Array, gradient_places, padded_rows
from .tiles import Tile, splits, wgrad_stages
from .wgrad import reduce_kernel_splits, wgrad_kernel_gather

_REDUCE_BLOCK = 1024


class WgradCall:
    """wgrad of a Problem on `wgrad_kernel_gather`.

    Args:
        problem: what to run.
        fused: tile of the jobs of three taps.
        single: tile of the jobs of one tap.
        coarse: whether every filter is given all channels.
    """

    def __init__(self, problem: Problem, fused: Tile, single: Tile, coarse: bool = False) -> None:
        self.problem, self._device = problem, problem.device
        self._part: Part = part_of(problem.device)
        support = problem.support
        self.parts = parts_of(support, (fused, single), coarse)
        self._tiles = {3: fused, 1: single}
        form = "live" if problem.live_weight else "contiguous"
        if form == "contiguous" and problem.channels_last and len(problem.weight_shape) == 4:
            form = "channels_last"
        places_key = ("triton places", fused, single, coarse, form, self._device)
        if places_key not in support.derived:
            places = gradient_places(self.parts, support, form)
            support.derived[places_key] = upload(places, self._device)
        self._places = support.derived[places_key]
        self._bound: dict[Any, list[tuple[Launch, tuple[Tensor, ...]]]] = {}
        oh, ow = problem.output_size
        self._pixels = problem.batch * oh * ow
        # All parts share one number of splits: that of the one with the most jobs.
        self._splits = max(
            [
                splits(len(p.words), self._pixels, self._tiles[p.taps].pixels, self._part)
                for p in self.parts
            ],
            default=1,
        )
        self._size = sum(p.positions.size for p in self.parts)
        grid = (-(-self._places.numel() // _REDUCE_BLOCK),)
        self._reduce = Launch(reduce_kernel_splits, grid, (_REDUCE_BLOCK,), 4, 1, self._device)

    def run(self, dy: Tensor, x: Tensor) -> Tensor:
        """Computes dw in the problem's canonical form, dead entries zero."""
        problem = self.problem
        layout = torch.contiguous_format
        if not problem.live_weight and len(problem.weight_shape) == 4:
            layout = problem.format
        dw = torch.empty(
            problem.weight_shape,
            dtype=problem.weight_dtype,
            device=self._device,
            memory_format=layout,
        )
        if not self._pixels or not self.parts:
            return dw.zero_()
        dy, x = dy.resolve_neg(), x.resolve_neg()
        key = (dy.stride(), x.stride(), precision(x.dtype))
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(dy, x)
        shape = (self._splits, self._size)
        partials = torch.empty(shape, dtype=torch.float32, device=self._device)
        if capturing(self._device):
            pin(self._device, self)
        for launch, tables in bound:
            launch(dy, x, partials, *tables)
        self._reduce(partials, self._places, dw, dw.numel(), self._size, self._splits)
        return dw

    def _bind(self, dy: Tensor, x: Tensor) -> list[tuple[Launch, tuple[Tensor, ...]]]:
        problem, device = self.problem, self._device
        geometry = problem.geometry
        widest = 16 // x.element_size()
        last_x = x.stride(1) == 1 or x.shape[1] == 1
        last_y = dy.stride(1) == 1 or dy.shape[1] == 1
        bound, before = [], 0
        for part in self.parts:
            tile = self._tiles[part.taps]
            scattered = not np.array_equal(part.plan.rows, np.arange(len(part.plan.rows)))
            x_unit = unit(widest, x) if last_x else 1
            heads = [] if scattered else part.plan.segments.tolist()
            y_unit = unit(widest, dy, heads) if last_y else 1
            rows: Int32Array = (
                padded_rows(part.plan)
                if scattered
                else (part.plan.segments // y_unit).astype(np.int32)
            )
            block = -(-self._pixels // self._splits)
            (x_n, x_c, x_h, x_w), (y_n, y_c, y_h, y_w) = x.stride(), dy.stride()
            table = [
                *problem.output_size,
                self._pixels,
                -(-block // tile.pixels) * tile.pixels,
                *geometry.stride,
                geometry.pads[0],
                geometry.pads[2],
                *geometry.dilation,
                problem.height,
                problem.width,
                *(stride // x_unit for stride in (x_n, x_h, x_w)),
                x_c,
                *(stride // y_unit for stride in (y_n, y_h, y_w)),
                y_c,
                x.shape[1] // x_unit,
                dy.shape[1] // y_unit,
                self._size,
                before,
            ]
            constants = (
                tile.pixels,
                tile.filters,
                tile.channels,
                part.taps,
                x_unit,
                y_unit,
                last_x,
                last_y,
                scattered,
                precision(x.dtype),
                interpreted(),
            )
            depth = wgrad_stages(tile, part.taps, x.element_size(), self._part)
            launch = Launch(
                wgrad_kernel_gather,
                (len(part.words), self._splits),
                constants,
                tile.warps,
                depth,
                device,
            )
            arrays = (part.words, part.owners, rows, np.array(table, np.int64))
            bound.append((launch, tuple(upload(array, device) for array in arrays)))
            before += prod(part.positions.shape)
        return bound
