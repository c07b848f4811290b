# SPDX-License-Identifier: Apache-2.0
"""Calls of the Triton kernels in the interpreter, with tiles of choice."""

from __future__ import annotations

from typing import Any

import torch

from hetconv_kernels import ops
from hetconv_kernels.backends.triton import choice, wgrad_choice
from hetconv_kernels.backends.triton.calls import GatherCall
from hetconv_kernels.backends.triton.choice import GatherChoice
from hetconv_kernels.backends.triton.tiles import Box, Tile
from hetconv_kernels.backends.triton.wgrad_calls import WgradCall
from hetconv_kernels.backends.triton.wgrad_choice import WgradChoice
from hetconv_kernels.problem import Geometry, Problem
from hetconv_kernels.testing import error_bound

TILE = Tile(32, 16, 16, 4)


def problem(verb: str, geometry: Geometry, first: Any, second: Any, w: Any, size: Any) -> Problem:
    return ops.describe(verb, geometry, first, second, w, size)


def near(found: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, depth: int) -> None:
    error = (found.double() - exact).abs()
    assert (error <= error_bound(size, depth, found.dtype)).all(), error.max()


def gather_call(p: Problem, tile: Tile, reorder: bool = True, box: Box | None = None) -> GatherCall:
    lowering = choice.lowering_of(p, tile.filters, tile.channels, reorder)
    return GatherCall(p, GatherChoice(tile, box, lowering, 0.0, 1.0))


def wgrad_call(
    p: Problem,
    tiles: tuple[Tile, Tile] = (TILE, TILE),
    reorder: bool = False,
    coarse: bool = False,
    box: Box | None = None,
) -> WgradCall:
    lowering = wgrad_choice.wgrad_lowering_of(p.support, tiles, reorder, coarse)
    return WgradCall(p, WgradChoice(tiles, box, lowering, 0.0, 1.0))
