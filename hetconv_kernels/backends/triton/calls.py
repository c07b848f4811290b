# SPDX-License-Identifier: Apache-2.0
"""Calls: a Problem on the gather kernels, with its tables on the device."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...packing import FrozenCache
from ...plan import Block
from ...problem import Problem, is_dense_shape
from ..common import empty
from .dgrad import dgrad_axes, fprop_axes, geometry_table
from .fprop import fprop_kernel_gather, pack_kernel_gather
from .launch import CONVERSIONS, Launch, capturing, interpreted, pin, upload
from .lowering import Int32Array, Lowering, gradient_places, padded_rows, wgrad_parts
from .tiles import Part, Tile, part_of, splits, stages, wgrad_stages
from .wgrad import reduce_kernel_splits, wgrad_kernel_gather

_PACK_BLOCK = _REDUCE_BLOCK = 1024


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are made: TF32 where PyTorch's convolutions may, else three TF32s."""
    if dtype != torch.float32 or torch.backends.cudnn.allow_tf32:
        return "tf32"
    return "tf32x3"


class Packer:
    """Packs canonical weights into the slabs of a lowering; keeps those of a frozen weight.

    Args:
        lowering: whose slabs.
        device: where the weights are.
        dtype: of the slabs.
    """

    def __init__(self, lowering: Lowering, device: torch.device, dtype: torch.dtype) -> None:
        self._lowering, self._device, self._dtype = lowering, device, dtype
        self._sources: dict[str, Tensor] = {}
        size = lowering.steps * lowering.plan.block.filters * lowering.plan.block.channels
        grid = (-(-size // _PACK_BLOCK),)
        self._launch = Launch(pack_kernel_gather, grid, (_PACK_BLOCK,), warps=4, stages=1)
        self._frozen = FrozenCache(self._pack)

    def __call__(self, w: Tensor) -> Tensor:
        """Returns the slabs.  # [steps, filters, channels]"""
        return self._frozen(w)

    def _pack(self, w: Tensor) -> Tensor:
        lowering = self._lowering
        if not is_dense_shape(lowering.support, w.shape):
            form, w = "live", w.contiguous()
        elif w.dim() == 4 and not w.is_contiguous() and _is_channels_last(w):
            form = "channels_last"
        else:
            form, w = "contiguous", w.contiguous()
        w = w.resolve_neg()
        source = self._sources.get(form)
        if source is None:
            source = self._sources[form] = upload(lowering.source(form), self._device)
        pin(self._device, source)
        # One slab more than there are, so that an empty list of steps has an address.
        shape = (max(lowering.steps, 1), *source.shape[1:])
        slabs = torch.empty(shape, dtype=self._dtype, device=self._device)
        if source.numel():
            self._launch(w, source, slabs, source.numel())
        return slabs


class GatherCall:
    """fprop or dgrad of a Problem on `fprop_kernel_gather`.

    Args:
        problem: what to run.
        lowering: its Support, lowered.
        tile: the tile that it was lowered for.
    """

    def __init__(self, problem: Problem, lowering: Lowering, tile: Tile) -> None:
        self.problem, self.lowering, self.tile = problem, lowering, tile
        self._back = problem.verb == "dgrad"
        device = problem.device
        self._device, self._part = device, part_of(device)
        self.shape = problem.x_shape if self._back else problem.y_shape
        self._words = upload(lowering.words, device)
        self._starts = upload(lowering.starts, device)
        gather = lowering.gather
        self._gather = None if gather is None else upload(gather, device)
        key = ("triton packer", device, problem.dtype, id(lowering))
        packers = problem.support.derived
        self._packer = packers.setdefault(key, Packer(lowering, device, problem.dtype))
        self._bound: dict[Any, tuple[Launch, Tensor, Tensor]] = {}
        self._rows: dict[int, Tensor] = {}

    def run(
        self,
        x: Tensor,
        w: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        sums: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the kernel.

        Returns:
            The result, and Σ and Σ² of each filter when asked for.  # [N, F, OH, OW], [2, F]
        """
        y = empty(self.shape, x, self.problem)
        filters = self.shape[1]
        if not y.numel():
            return y, y.new_zeros((2, filters), dtype=torch.float32) if sums else None
        x = x.resolve_neg()
        if self._gather is not None:
            CONVERSIONS["channels gathered into order"] += 1
            x = x.permute(0, 2, 3, 1).index_select(3, self._gather).permute(0, 3, 1, 2)
        key = (x.stride(), precision(x.dtype))
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(x, y)
        launch, rows, geometry = bound
        if residual is not None:
            residual = self._like(residual, y)
        partial = None
        if sums:
            tiles = -(-self._pixels // self.tile.pixels)
            partial = torch.empty((tiles, 2, filters), dtype=torch.float32, device=x.device)
        slabs = self._packer(w)
        if capturing(x.device):
            pin(x.device, self, slabs if w.dim() == 1 else None)
        launch(
            x,
            slabs,
            y,
            self._words,
            self._starts,
            rows,
            geometry,
            None if scale is None else scale.resolve_neg().contiguous(),
            None if shift is None else shift.resolve_neg().contiguous(),
            residual,
            partial,
        )
        return y, None if partial is None else partial.sum(0)

    @property
    def _pixels(self) -> int:
        return self.shape[0] * self.shape[2] * self.shape[3]

    def _like(self, residual: Tensor, y: Tensor) -> Tensor:
        """Returns the residual in the memory format of y, which the kernel reads it in."""
        same = residual.resolve_neg().contiguous(memory_format=self.problem.format)
        if same.data_ptr() != residual.data_ptr():
            CONVERSIONS["residual brought to the format of y"] += 1
        return same

    def _bind(self, x: Tensor, y: Tensor) -> tuple[Launch, Tensor, Tensor]:
        """Makes what depends on the strides of x: the geometry table and the kernel's constants."""
        problem, lowering, tile, device = self.problem, self.lowering, self.tile, self._device
        geometry, size = problem.geometry, (problem.height, problem.width)
        axes = (dgrad_axes if self._back else fprop_axes)(geometry, size)
        image = problem.output_size if self._back else size
        widest = 16 // x.element_size()
        # Channels last also where there is one channel and its stride means nothing.
        last = (x.stride(1) == 1 or x.shape[1] == 1) and (y.stride(1) == 1 or y.shape[1] == 1)
        units = 1, 1
        if last:
            heads = lowering.plan.segments if lowering.rows is None else []
            units = unit(widest, x), unit(widest, y, heads)
        rows = self._rows.get(units[1])
        if rows is None:
            table = lowering.rows
            if table is None:
                table = (lowering.plan.segments // units[1]).astype(np.int32)
            rows = self._rows[units[1]] = upload(table, device)
        table = geometry_table(
            axes,
            problem.batch,
            image,
            lowering.segments,
            x.stride(),
            y.stride(),
            units,
            x.shape[1],
            y.shape[1],
        )
        outside = any(
            axis.leaves(extent) for pair in axes for axis, extent in zip(pair, image, strict=True)
        )
        most = max(problem.batch * rows.pixels * cols.pixels for rows, cols in axes)
        constants = (
            tile.pixels,
            tile.filters,
            tile.channels,
            *units,
            last,
            outside,
            x.shape[1] % tile.channels != 0,
            lowering.rows is not None,
            problem.act,
            precision(x.dtype),
            interpreted(),
        )
        grid = (-(-most // tile.pixels) * lowering.segments, len(axes))
        launch = Launch(
            fprop_kernel_gather,
            grid,
            constants,
            tile.warps,
            stages(tile, x.element_size(), self._part),
        )
        return launch, rows, upload(table, device)


class WgradCall:
    """wgrad of a Problem on `wgrad_kernel_gather`.

    Args:
        problem: what to run.
        fused: tile of the jobs of three taps.
        single: tile of the jobs of one tap.
    """

    def __init__(self, problem: Problem, fused: Tile, single: Tile) -> None:
        self.problem, self._device = problem, problem.device
        self._part: Part = part_of(problem.device)
        blocks = [Block(t.filters, t.channels, align=t.channels) for t in (fused, single)]
        key = ("triton wgrad", *blocks)
        support = problem.support
        if key not in support.derived:
            support.derived[key] = wgrad_parts(support, *blocks)
        self.parts = support.derived[key]
        self._tiles = {3: fused, 1: single}
        form = "live" if problem.live_weight else "contiguous"
        if form == "contiguous" and problem.channels_last and len(problem.weight_shape) == 4:
            form = "channels_last"
        places_key = (*key, form, self._device)
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
        self._reduce = Launch(reduce_kernel_splits, grid, (_REDUCE_BLOCK,), warps=4, stages=1)

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
            heads = [] if scattered else part.plan.segments
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
            )
            arrays = (part.words, part.owners, rows, np.array(table, np.int64))
            bound.append((launch, tuple(upload(array, device) for array in arrays)))
            before += prod(part.positions.shape)
        return bound


def unit(widest: int, tensor: Tensor, more: Sequence[int] = ()) -> int:
    """Returns what divides a channels_last tensor's channels and strides, at most `widest`."""
    n, c, h, w = tensor.stride()
    sizes = tensor.shape
    strides = [s for s, size in ((n, sizes[0]), (h, sizes[2]), (w, sizes[3])) if size > 1]
    return gcd(widest, sizes[1], *strides, *(int(value) for value in more))


def _is_channels_last(w: Tensor) -> bool:
    return w.is_contiguous(memory_format=torch.channels_last)
