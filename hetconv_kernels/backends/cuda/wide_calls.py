# SPDX-License-Identifier: Apache-2.0
"""Calls of fprop and dgrad on ``wide_fprop``: what differs from those of narrow groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...problem import Problem
from ..gpu.capture import CONVERSIONS, DeviceTables, upload
from .calls import CudaCall, compiled_part, strides_of, uploaded
from .choice import WideChoice


class AlignedCall(CudaCall):
    """A call whose residual is read by 16-byte accesses at the places of y."""

    def like(self, residual: Tensor, y: Tensor) -> Tensor:
        """Returns the residual with the strides of y, and at an address for 16-byte accesses."""
        same = super().like(residual, y)
        if same.data_ptr() % 16:
            CONVERSIONS["residual brought to an aligned address"] += 1
            same = same.clone(memory_format=torch.preserve_format)
        return same


class WideCall(AlignedCall):
    """fprop or dgrad of a Problem by the kernel for wide groups.

    Args:
        problem: what to run.
        choice: how.
    """

    def __init__(self, problem: Problem, choice: WideChoice) -> None:
        how, tables = choice.how, choice.how.tables
        super().__init__(problem, tables)
        self.choice = choice
        self._tables = uploaded(problem, tables, ("heads", "blocks", "rows"))
        # Of this size of images alone.
        self._own = {
            name: upload(getattr(how, name), problem.device) for name in ("classes", "steps")
        }
        self._kept = DeviceTables(*self._tables.values(), *self._own.values())

    def seen(self, x: Tensor) -> Tensor:
        """Returns the pixels of an operand that the kernel reads: each n-th, as one image."""
        rows, cols = self.choice.every
        return x[:, :, ::rows, ::cols]

    def bind(self, x: Tensor, y: Tensor, aligned: bool) -> Callable[..., None]:
        """Fills the kernel's arguments, all but the operands' addresses."""
        how = self.choice.how
        call = compiled_part().Wide()
        for name, table in (self._tables | self._own).items():
            setattr(call, name, table.data_ptr())
        call.x_n, _, call.x_h, call.x_w = strides_of(x)
        call.y_n, _, call.y_h, call.y_w = strides_of(y)
        call.batch = self.problem.batch
        call.image_h, call.image_w = x.shape[2:]
        call.class_count, call.pairs = how.tables.heads.shape[:2]
        shape = how.shape
        call.pixels, call.flat_pitch = shape.pixels, shape.flat_pitch
        call.plane_pitch = shape.plane_pitch
        call.stages, call.slots, call.cluster = shape.stages, shape.slots, shape.cluster
        call.act = self.problem.act
        call.grid = call.max_resident_blocks(self._name)
        launch: Callable[..., None] = call.launch
        return launch
