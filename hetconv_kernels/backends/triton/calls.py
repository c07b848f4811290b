# SPDX-License-Identifier: Apache-2.0
"""Calls of fprop and dgrad: a Problem on its kernel, with its tables on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BackendError, mismatch
from ...problem import Problem
from ..common import empty, unit
from ..gpu import parts
from ..gpu.axes import axes_of
from ..gpu.capture import CONVERSIONS, capturing, pin, upload
from ..gpu.devices import spec_of
from ..gpu.packer import Packer
from ..gpu.precision import precision
from .choice import GatherChoice
from .fprop import fprop_kernel_gather, pack_kernel_gather
from .geometry import geometry_table
from .launch import Launch, interpreted
from .lowering import Lowering
from .tiles import stages

_PACK_BLOCK = 1024


def triton_packer(lowering: Lowering, device: torch.device, dtype: torch.dtype) -> Packer:
    """Makes what packs canonical weights into the slabs of a lowering.

    # [steps, filters, channels]
    """
    size = lowering.steps * lowering.plan.block.filters * lowering.plan.block.channels
    grid = (-(-size // _PACK_BLOCK),)
    launch = Launch(pack_kernel_gather, grid, (_PACK_BLOCK,), 4, 1, device, {3: size})
    return Packer(lowering.support, lowering.source, launch, device, dtype, "triton")


class GatherCall:
    """fprop or dgrad of a Problem, on pointers or on boxes.

    Args:
        problem: what to run.
        choice: tile, lowering and box.
    """

    def __init__(self, problem: Problem, choice: GatherChoice) -> None:
        self.problem, self.choice = problem, choice
        self.lowering = lowering = choice.lowering
        self.back = problem.verb == "dgrad"
        self.device = device = problem.device
        self.spec = spec_of(device)
        self.shape = problem.x_shape if self.back else problem.y_shape
        self._nothing = 0 in self.shape
        self.axes, self.image = axes_of(problem)
        self.words = upload(lowering.words, device)
        self.starts = upload(lowering.starts, device)
        gather = lowering.gather
        self._gather = None if gather is None else upload(gather, device)
        key = ("triton packer", device, problem.dtype, id(lowering))
        packers = problem.support.derived
        self._packer = packers.setdefault(key, triton_packer(lowering, device, problem.dtype))
        self._bound: dict[Any, Callable[..., None]] = {}
        self._rows: dict[int, Tensor] = {}

    def run(
        self,
        x: Tensor,
        w: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Runs the kernel.  # [N, F, OH, OW]"""
        y = empty(self.shape, x, self.problem)
        if self._nothing:
            return y
        x = in_order(x.resolve_neg(), self._gather)
        if residual is not None:
            residual = self._like(residual)
        aligned = self.choice.box is None or tma_aligned(x, y, residual)
        key = (x.stride(), precision(x.dtype), aligned)
        start = self._bound.get(key)
        if start is None:
            start = self._bound[key] = self._bind(x, y, aligned)
        frozen = self.problem.frozen_weight
        slabs = self._packer(w, frozen)
        if capturing(self.device):
            pin(self.device, self, slabs if frozen else None)
        scale = None if scale is None else scale.resolve_neg().contiguous()
        shift = None if shift is None else shift.resolve_neg().contiguous()
        start(x, slabs, y, scale, shift, residual)
        return y

    def rows(self, unit: int) -> Tensor:
        """Returns the table of the segments' filters, the first ones divided by `unit`."""
        table = self._rows.get(unit)
        if table is None:
            rows = self.lowering.rows
            if rows is None:
                rows = (self.lowering.plan.segments // unit).astype(np.int32)
            table = self._rows[unit] = upload(rows, self.device)
        return table

    def table(
        self, x: Tensor, y: Tensor, units: tuple[int, int], lists: Sequence[int] | None = None
    ) -> Tensor:
        """Makes the geometry table for operands of these strides."""
        table = geometry_table(
            self.axes,
            self.problem.batch,
            self.image,
            self.lowering.segments,
            x.stride(),
            y.stride(),
            units,
            x.shape[1],
            lists,
        )
        return upload(table, self.device)

    def _like(self, residual: Tensor) -> Tensor:
        """Returns the residual in the memory format of y, which the kernel reads it in."""
        same = residual.resolve_neg().contiguous(memory_format=self.problem.format)
        if same.data_ptr() != residual.data_ptr():
            CONVERSIONS["residual brought to the format of y"] += 1
        return same

    def _bind(self, x: Tensor, y: Tensor, aligned: bool) -> Callable[..., None]:
        """Returns what launches the kernel; takes x, slabs, y, scale, shift and residual."""
        if self.choice.box is not None and aligned:
            from .tma_calls import bind_tma  # host descriptors are for Hopper only

            return bind_tma(self, x, y)
        refuse_left_out("triton-gather")
        return self._bind_pointers(x, y)

    def _bind_pointers(self, x: Tensor, y: Tensor) -> Callable[..., None]:
        """Makes what depends on the strides of x: the geometry table and the kernel's constants."""
        lowering, tile = self.lowering, self.choice.tile
        widest = 16 // x.element_size()
        # Channels last also where there is one channel and its stride means nothing.
        last = (x.stride(1) == 1 or x.shape[1] == 1) and (y.stride(1) == 1 or y.shape[1] == 1)
        units = 1, 1
        if last:
            heads = lowering.plan.segments.tolist() if lowering.rows is None else []
            units = unit(widest, x), unit(widest, y, heads)
        axes = self.axes
        outside = any(
            axis.leaves(extent)
            for pair in axes
            for axis, extent in zip(pair, self.image, strict=True)
        )
        constants = (
            tile.pixels,
            tile.filters,
            tile.channels,
            *units,
            last,
            outside,
            x.shape[1] % tile.channels != 0,
            lowering.rows is not None,
            self.problem.act,
            precision(x.dtype),
            interpreted(),
        )
        most = max(self.problem.batch * rows.pixels * cols.pixels for rows, cols in axes)
        grid = (-(-most // tile.pixels) * lowering.segments, len(axes))
        depth = stages(tile, x.element_size(), self.spec)
        tables = self.words, self.starts, self.rows(units[1]), self.table(x, y, units)
        return Launch(
            fprop_kernel_gather,
            grid,
            constants,
            tile.warps,
            depth,
            self.device,
            dict(enumerate(tables, 3)),
        )


def refuse_left_out(name: str) -> None:
    """Refuses to read operands through pointers by a kernel that is left out.

    Raises:
        BackendError: it is, and boxes cannot be fetched from these addresses.
    """
    if absent := parts.left_out(name):
        raise BackendError(
            mismatch("operand", "one that TMA cannot fetch", "16-byte aligned addresses", absent)
        )


def in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """Returns an operand with its channels in another order, channels_last; counts the copy."""
    if order is None:
        return x
    CONVERSIONS["channels gathered into order"] += 1
    return x.permute(0, 2, 3, 1).index_select(3, order).permute(0, 3, 1, 2)


def tma_aligned(*tensors: Tensor | None) -> bool:
    """Tells whether all begin at a multiple of 16 bytes, as descriptors want it."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
