# SPDX-License-Identifier: Apache-2.0
"""The choice of tiles and a lowering for wgrad, by the cost model. Imports no Triton."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from ...problem import Problem
from ...support import Support
from ..gpu import parts
from ..gpu.devices import GpuSpec, spec_of
from . import choice
from .choice import GROUPINGS, best_box, has_tma, tensor_reasons
from .plan import Block
from .tiles import (
    BOX_FUSED,
    BOX_GAIN,
    BOX_ONE,
    HALF_FUSED,
    HALF_ONE,
    LAUNCH,
    NEXT_LAUNCH,
    SCATTERED,
    SINGLE_FUSED,
    SINGLE_ONE,
    Box,
    Tile,
    wgrad_seconds,
)
from .wgrad_lowering import WgradLowering


class WgradChoice(NamedTuple):
    """How wgrad is run.

    Attributes:
        tiles: of the jobs of three taps, and of those of one.
        box: of pixels, of the box kernel; None for the one that reads through pointers.
        lowering: for those tiles.
        seconds: predicted, for the whole call.
        efficiency: useful over executed multiply-accumulates.
    """

    tiles: tuple[Tile, Tile]
    box: Box | None
    lowering: WgradLowering
    seconds: float
    efficiency: float

    @property
    def name(self) -> str:
        """What tables and measurements call the choice."""
        sizes = ["x".join(map(str, tile[:3])) for tile in self.tiles]
        text = " and ".join(sizes)
        if self.box is not None:
            text += " box " + "x".join(map(str, self.box))
        return text + " reordered" * self.reordered + " coarse" * self.lowering.coarse

    @property
    def reordered(self) -> bool:
        """Whether filters of dy or channels of x are gathered into another order."""
        return self.lowering.filters is not None or self.lowering.channels is not None


def wgrad_choices(problem: Problem) -> list[WgradChoice]:
    """Lists all ways to run wgrad, with their predictions."""
    half, spec = problem.dtype.itemsize == 2, spec_of(problem.device)
    pointers = list(product(*((HALF_FUSED, HALF_ONE) if half else (SINGLE_FUSED, SINGLE_ONE))))
    boxed = [] if choice.ONLY_LAUNCH == "gather" else list(product(BOX_FUSED, BOX_ONE))
    if parts.left_out("triton-wgrad"):
        pointers = []
    if parts.left_out("triton-wgrad-tma"):
        boxed = []
    found = []
    for reorder, coarse in [GROUPINGS[0]] if len(problem.support.groups) == 1 else GROUPINGS:
        for tiles in boxed:
            box = wgrad_box(problem, tiles[0].pixels, reorder)
            if box is not None:
                found.append(_wgrad(problem, tiles, box, (reorder, coarse), spec))
        for tiles in pointers if choice.ONLY_LAUNCH != "tma" else ():
            found.append(_wgrad(problem, tiles, None, (reorder, coarse), spec))
    kept = [c for c in found if c is not None]
    return kept or [
        c
        for tiles in pointers
        if (c := _wgrad(problem, tiles, None, GROUPINGS[0], spec)) is not None
    ]


def wgrad_box(problem: Problem, pixels: int, reorder: bool) -> Box | None:
    """Returns the box in which wgrad reads dy and x; None where TMA cannot.

    It divides the rows and columns of y: a pixel beyond them would multiply the zeros that dy reads
    there with whatever x holds, and a zero times infinity is NaN. At a stride it is one pixel of
    several images.
    """
    if not has_tma(problem.device) or tensor_reasons(problem.x_shape, None, problem.dtype):
        return None
    if tensor_reasons(problem.y_shape, None if reorder else problem.strides, problem.dtype):
        return None
    n, _, h, w = problem.y_shape
    return best_box((n, h, w), pixels, problem.geometry.stride == (1, 1), exact=True)


def wgrad_lowering_of(
    support: Support, tiles: tuple[Tile, Tile], reorder: bool, coarse: bool
) -> WgradLowering:
    """Returns the lowering of wgrad for these tiles; kept with the Support."""
    fused, single = (Block(t.filters, t.channels, align=t.channels) for t in tiles)
    key = ("triton wgrad", reorder, coarse, fused, single)
    found: WgradLowering | None = support.derived.get(key)
    if found is None:
        found = support.derived[key] = WgradLowering(support, fused, single, reorder, coarse)
    return found


def _wgrad(
    problem: Problem,
    tiles: tuple[Tile, Tile],
    box: Box | None,
    form: tuple[bool, bool],
    spec: GpuSpec,
) -> WgradChoice | None:
    lowering = wgrad_lowering_of(problem.support, tiles, *form)
    moved = [order is not None for order in (lowering.filters, lowering.channels)]
    if form[0] and not any(moved):
        return None  # the same as in their own order
    item = problem.dtype.itemsize
    if box is not None and not all(jobs.adjacent(16 // item) for jobs in lowering.parts):
        return None
    oh, ow = problem.output_size
    pixels = problem.batch * oh * ow
    covered = pixels if box is None else -(-problem.batch // box.images) * box.images * oh * ow
    kernel, executed = 0.0, 0
    for jobs in lowering.parts:
        tile = tiles[jobs.taps != 3]
        seconds = wgrad_seconds(tile, len(jobs.words), jobs.taps, covered, item, spec)
        kernel += seconds * (1.0 if jobs.rows is None else SCATTERED) + NEXT_LAUNCH
        executed += jobs.size
    if box is None and has_tma(problem.device):
        kernel *= BOX_GAIN
    seconds = LAUNCH + max(kernel, problem.bytes_moved / spec.bandwidth)
    for gathered, shape in zip(moved, (problem.y_shape, problem.x_shape), strict=True):
        n, c, h, w = shape
        seconds += gathered * (NEXT_LAUNCH + 2 * n * c * h * w * item / spec.bandwidth)
    if not problem.channels_last:
        seconds += kernel
    efficiency = problem.support.live / executed if executed else 1.0
    return WgradChoice(tiles, box, lowering, seconds, min(1.0, efficiency))
