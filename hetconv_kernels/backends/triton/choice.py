# SPDX-License-Identifier: Apache-2.0
"""The choice of a tile and a lowering for a Problem, by the cost model. Imports no Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...plan import Block
from ...problem import Problem
from .dgrad import dgrad_classes
from .lowering import Lowering, wgrad_parts
from .tiles import (
    HALF_FUSED,
    HALF_ONE,
    HALF_TILES,
    LAUNCH,
    NEXT_LAUNCH,
    SINGLE_FUSED,
    SINGLE_ONE,
    SINGLE_TILES,
    Part,
    Tile,
    fprop_seconds,
    part_of,
    wgrad_seconds,
)


class GatherChoice(NamedTuple):
    """How fprop or dgrad is run.

    Attributes:
        tile: of the kernel.
        lowering: for that tile.
        seconds: predicted, for the whole call.
        efficiency: useful over executed multiply-accumulates.
    """

    tile: Tile
    lowering: Lowering
    seconds: float
    efficiency: float


class WgradChoice(NamedTuple):
    """How wgrad is run.

    Attributes:
        tiles: of the jobs of three taps, and of those of one.
        seconds: predicted, for the whole call.
        efficiency: useful over executed multiply-accumulates.
    """

    tiles: tuple[Tile, Tile]
    seconds: float
    efficiency: float


def best(problem: Problem) -> GatherChoice | WgradChoice:
    """Picks what is predicted to be fastest for a Problem."""
    return best_wgrad(problem) if problem.verb == "wgrad" else best_gather(problem)


def best_gather(problem: Problem) -> GatherChoice:
    """Picks tile and lowering of fprop or dgrad; the answer is kept with the Support."""
    key = ("triton choice", *_key(problem))
    found: GatherChoice | None = problem.support.derived.get(key)
    if found is None:
        tiles = HALF_TILES if problem.dtype.itemsize == 2 else SINGLE_TILES
        part = part_of(problem.device)
        choices = [
            _gather(problem, tile, reorder, part) for tile in tiles for reorder in (False, True)
        ]
        found = min((c for c in choices if c is not None), key=lambda c: c.seconds)
        problem.support.derived[key] = found
    return found


def lowering_of(problem: Problem, filters: int, channels: int, reorder: bool) -> Lowering:
    """Returns the lowering of fprop or dgrad for slabs of that size; kept with the Support."""
    classes = dgrad_classes(problem.geometry) if problem.verb == "dgrad" else None
    key = ("triton lowering", filters, channels, reorder, repr(classes))
    found: Lowering | None = problem.support.derived.get(key)
    if found is None:
        found = Lowering(problem.support, filters, channels, reorder, classes)
        problem.support.derived[key] = found
    return found


def _gather(problem: Problem, tile: Tile, reorder: bool, part: Part) -> GatherChoice | None:
    lowering = lowering_of(problem, tile.filters, tile.channels, reorder)
    if reorder and lowering.gather is None:
        return None  # the same as in the channels' own order
    n, c, h, w = problem.y_shape if problem.verb == "dgrad" else problem.x_shape
    shape = problem.x_shape if problem.verb == "dgrad" else problem.y_shape
    pixels = shape[0] * shape[2] * shape[3]
    item = problem.dtype.itemsize
    kernel = fprop_seconds(
        tile, pixels, lowering.steps, lowering.segments, item, part, lowering.classes
    )
    slabs = lowering.steps * tile.filters * tile.channels
    memory = problem.bytes_moved / part.bandwidth
    seconds = LAUNCH + NEXT_LAUNCH + max(kernel, memory)
    seconds += slabs * (2 * item + 4) / part.bandwidth
    if lowering.gather is not None:
        seconds += NEXT_LAUNCH + 2 * n * c * h * w * item / part.bandwidth
    if not problem.channels_last:
        seconds += kernel  # rows of single elements, not of vectors
    executed = slabs
    efficiency = problem.support.live / executed if executed else 1.0
    return GatherChoice(tile, lowering, seconds, min(1.0, efficiency))


def best_wgrad(problem: Problem) -> WgradChoice:
    """Picks the tiles of wgrad; the answer is kept with the Support."""
    key = ("triton choice", *_key(problem))
    found: WgradChoice | None = problem.support.derived.get(key)
    if found is None:
        half = problem.dtype.itemsize == 2
        part = part_of(problem.device)
        found = min(
            (
                _wgrad(problem, fused, one, part)
                for fused in (HALF_FUSED if half else SINGLE_FUSED)
                for one in (HALF_ONE if half else SINGLE_ONE)
            ),
            key=lambda c: c.seconds,
        )
        problem.support.derived[key] = found
    return found


def _wgrad(problem: Problem, fused: Tile, one: Tile, part: Part) -> WgradChoice:
    blocks = [Block(t.filters, t.channels, align=t.channels) for t in (fused, one)]
    key = ("triton wgrad", *blocks)
    support = problem.support
    if key not in support.derived:
        support.derived[key] = wgrad_parts(support, *blocks)
    oh, ow = problem.output_size
    pixels, item = problem.batch * oh * ow, problem.dtype.itemsize
    kernel, executed = 0.0, 0
    for p in support.derived[key]:
        tile = fused if p.taps == 3 else one
        kernel += wgrad_seconds(tile, len(p.words), p.taps, pixels, item, part) + NEXT_LAUNCH
        executed += p.positions.size
    seconds = LAUNCH + max(kernel, problem.bytes_moved / part.bandwidth)
    if not problem.channels_last:
        seconds += kernel
    return WgradChoice((fused, one), seconds, support.live / executed if executed else 1.0)


def _key(problem: Problem) -> tuple[object, ...]:
    geometry = problem.geometry
    device: torch.device = problem.device
    return (
        problem.verb,
        problem.batch,
        problem.height,
        problem.width,
        problem.dtype,
        problem.channels_last,
        device,
        geometry.tail,
    )
