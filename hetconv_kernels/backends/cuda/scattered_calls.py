# SPDX-License-Identifier: Apache-2.0
"""Calls of fprop and dgrad on ``scattered_fprop``: what differs from those of other groups."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...problem import Problem
from ..gpu.capture import DeviceTables
from .calls import compiled_part, strides_of, uploaded
from .choice import ScatteredChoice
from .wide_calls import AlignedCall


class ScatteredCall(AlignedCall):
    """fprop or dgrad of a Problem by the kernel for scattered groups.

    Args:
        problem: what to run.
        choice: how.
    """

    def __init__(self, problem: Problem, choice: ScatteredChoice) -> None:
        tables = choice.how.tables
        super().__init__(problem, tables)
        self.choice = choice
        names = ("parts", "blocks", "segments", "begins", "jobs", "spans", "steps", "columns")
        self._tables = uploaded(problem, tables, names)
        self._kept = DeviceTables(*self._tables.values())

    def bind(self, x: Tensor, y: Tensor, aligned: bool) -> Callable[..., None]:
        """Fills the kernel's arguments, all but the operands' addresses."""
        problem, tables, shape = self.problem, self.choice.how.tables, self.choice.how.shape
        call = compiled_part().Scattered()
        for name, table in self._tables.items():
            setattr(call, name, table.data_ptr())
        call.x_n, _, call.x_h, call.x_w = strides_of(x)
        call.y_n, _, call.y_h, call.y_w = strides_of(y)
        call.batch, call.channels = problem.batch, x.shape[1]
        call.image_h, call.image_w = self._image
        call.out_h, call.out_w = y.shape[2:]
        pads = problem.geometry.pads
        call.base_h, call.base_w = -pads[0], -pads[2]
        if tables.back:  # whose first tap is the last one
            call.base_h, call.base_w = pads[0] - shape.side + 1, pads[2] - shape.side + 1
        call.part_count, call.most_blocks = len(tables.parts), tables.spans.shape[1] - 1
        call.side, call.warps = shape.side, shape.warps
        call.pixel_bytes, call.width = shape.slots * 16, shape.columns
        call.act = problem.act
        launch: Callable[..., None] = call.launch
        return launch
