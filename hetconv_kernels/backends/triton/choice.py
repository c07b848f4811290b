# SPDX-License-Identifier: Apache-2.0
"""The choice of a tile and a lowering for a Problem, by the cost model. Imports no Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ...plan import Block
from ...problem import Problem
from ...support import Support
from ..parts import Part, part_of
from . import table
from .dgrad import dgrad_classes
from .lowering import Lowering, wgrad_parts
from .lowering import Part as WgradPart
from .tiles import (
    BOX_TILES,
    HALF_FUSED,
    HALF_ONE,
    HALF_TILES,
    LAUNCH,
    NEXT_LAUNCH,
    SINGLE_FUSED,
    SINGLE_ONE,
    SINGLE_TILES,
    Box,
    Tile,
    fprop_seconds,
    wgrad_seconds,
)

# "gather" or "boxes" leaves only that kernel to choose from; for tests and for tuning.
ONLY: str | None = None
# Ways to lower: whether channels are reordered, and whether all filters read all channels.
FORMS = ((False, False), (True, False), (False, True))
# Choices that tuning measures, of those that are predicted to be best.
MOST_TUNED = 8


class GatherChoice(NamedTuple):
    """How fprop or dgrad is run.

    Attributes:
        tile: of the kernel.
        box: of the box kernel; None for the one that reads through pointers.
        lowering: for that tile.
        seconds: predicted, for the whole call.
        efficiency: useful over executed multiply-accumulates.
    """

    tile: Tile
    box: Box | None
    lowering: Lowering
    seconds: float
    efficiency: float

    @property
    def name(self) -> str:
        """Its name in tables and measurements."""
        reordered = self.lowering.gather is not None
        return table.name_of(self.tile, self.box, reordered, self.lowering.coarse)


class WgradChoice(NamedTuple):
    """How wgrad is run.

    Attributes:
        tiles: of the jobs of three taps, and of those of one.
        coarse: whether every filter is given all channels.
        seconds: predicted, for the whole call.
        efficiency: useful over executed multiply-accumulates.
    """

    tiles: tuple[Tile, Tile]
    coarse: bool
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
        choices = sorted(gather_choices(problem), key=lambda c: c.seconds)
        named = {c.name: c for c in reversed(choices)}
        picked = _tuned(problem, choices[:MOST_TUNED]) or table.look_up(problem)
        found = named.get(picked or "", choices[0])
        problem.support.derived[key] = found
    return found


def _tuned(problem: Problem, choices: Sequence[GatherChoice]) -> str | None:
    """Returns the choice that this user's tuning found best, measuring it where that is on."""
    if problem.device.type != "cuda" or not problem.batch:
        return None
    from ... import tuning  # not needed without a GPU

    key = " ".join(map(str, _key(problem)))
    candidates = {c.name: functools.partial(_try, problem, c, []) for c in choices}
    return tuning.pick(key, candidates, problem.device)


def _try(problem: Problem, choice: GatherChoice, ready: list[Callable[[], object]]) -> None:
    """Runs a choice once on random operands, which are made at its first run."""
    if not ready:
        from .calls import GatherCall

        call = GatherCall(problem, choice)
        shape = problem.y_shape if problem.verb == "dgrad" else problem.x_shape
        dtype, device = problem.dtype, problem.device
        x = torch.empty_strided(shape, problem.strides, dtype=dtype, device=device).normal_()
        w = torch.randn(problem.support.shape, dtype=dtype, device=device)
        ready.append(lambda: call.run(x, w))
    ready[0]()


def gather_choices(problem: Problem) -> list[GatherChoice]:
    """Lists all ways to run fprop or dgrad, with their predictions."""
    tiles = HALF_TILES if problem.dtype.itemsize == 2 else SINGLE_TILES
    part = part_of(problem.device)
    found = []
    forms = [FORMS[0]] if len(problem.support.groups) == 1 else FORMS
    for form in forms:
        for tile in tiles if ONLY != "boxes" else ():
            found.append(_gather(problem, tile, None, form, part))
        for tile in BOX_TILES if ONLY != "gather" and has_boxes(problem.device) else ():
            lowering = lowering_of(problem, tile.filters, tile.channels, *form)
            for box in boxes_of(problem, tile, lowering.gather is not None):
                found.append(_gather(problem, tile, box, form, part))
    return [c for c in found if c is not None] or [
        c for t in tiles if (c := _gather(problem, t, None, FORMS[0], part)) is not None
    ]


def has_boxes(device: torch.device) -> bool:
    """Tells whether the box kernel is for this device: Hopper, or the interpreter when asked."""
    if device.type != "cuda":
        return ONLY == "boxes"
    return torch.cuda.get_device_capability(device)[0] == 9


def box_reasons(problem: Problem, gathered: bool = False) -> list[str]:
    """Lists why TMA cannot fetch the boxes of a Problem; the pointer kernel then runs it.

    Args:
        problem: fprop or dgrad.
        gathered: whether the operand is copied into another order of channels first.
    """
    reasons = []
    item = problem.dtype.itemsize
    back = problem.verb == "dgrad"
    shape = problem.y_shape if back else problem.x_shape
    if item != 2:
        reasons.append(f"{problem.dtype} is not a 16-bit type.")
    if shape[1] * item % 16:
        reasons.append(f"{shape[1]} channels are not a multiple of 16 bytes.")
    if not problem.channels_last:
        reasons.append("The result is not channels_last.")
    n, c, h, w = problem.strides
    far = [s for s, size in ((n, shape[0]), (h, shape[2]), (w, shape[3])) if size > 1]
    if not gathered and ((c != 1 and shape[1] > 1) or any(s * item % 16 or s <= 0 for s in far)):
        reasons.append(f"The operand's strides {problem.strides} are not those of channels_last.")
    if any(s * item >= 2**40 for s in far) or max(shape) >= 2**31:
        reasons.append("The operand is beyond the sizes of a descriptor.")
    return reasons


def folds(problem: Problem, tile: Tile, strides: Sequence[int]) -> bool:
    """Tells whether stride 2 may read through the parity fold.

    It needs an even image, so that a row's parity is a row of the same image; whole blocks of
    channels, since a tail would read the other parity and not zero; and adjacent pixels.
    """
    return (
        problem.verb == "fprop"
        and problem.geometry.stride == (2, 2)
        and problem.height % 2 == problem.width % 2 == 0
        and problem.support.channels % tile.channels == 0
        and (strides[3] == problem.support.channels)
        and (strides[2] == problem.width * problem.support.channels)
    )


def boxes_of(problem: Problem, tile: Tile, gathered: bool = False) -> list[Box]:
    """Lists the boxes that may be used: the best of each kind, by the pixels that they waste."""
    if box_reasons(problem, gathered):
        return []
    back = problem.verb == "dgrad"
    n, _, h, w = problem.x_shape if back else problem.y_shape
    if back:
        h, w = (-(-size // s) for size, s in zip((h, w), problem.geometry.stride, strict=True))
    _, c, height, width = problem.x_shape
    strides = (c * height * width, 1, width * c, c) if gathered else problem.strides
    steps_one = back or problem.geometry.stride == (1, 1) or folds(problem, tile, strides)
    edges = [2**k for k in range(9) if 2**k <= tile.pixels]
    found: list[tuple[int, int, Box]] = []
    for rows in edges if steps_one else (1,):
        for cols in edges if steps_one else (1,):
            images = tile.pixels // (rows * cols)
            if images < 1 or images > 256:
                continue
            box = Box(images, rows, cols)
            count = -(-n // images) * -(-h // rows) * -(-w // cols)
            # Among equals the squarest, whose taps share most of what they read.
            found.append((count, abs(rows - cols), box))
    return [min(found)[2]] if found else []


def lowering_of(
    problem: Problem, filters: int, channels: int, reorder: bool, coarse: bool = False
) -> Lowering:
    """Returns the lowering of fprop or dgrad for slabs of that size; kept with the Support."""
    classes = dgrad_classes(problem.geometry) if problem.verb == "dgrad" else None
    key = ("triton lowering", filters, channels, reorder, coarse, repr(classes))
    found: Lowering | None = problem.support.derived.get(key)
    if found is None:
        found = Lowering(problem.support, filters, channels, reorder, classes, coarse)
        problem.support.derived[key] = found
    return found


def _gather(
    problem: Problem, tile: Tile, box: Box | None, form: tuple[bool, bool], part: Part
) -> GatherChoice | None:
    lowering = lowering_of(problem, tile.filters, tile.channels, *form)
    if form[0] and lowering.gather is None:
        return None  # the same as in the channels' own order
    n, c, h, w = problem.y_shape if problem.verb == "dgrad" else problem.x_shape
    shape = problem.x_shape if problem.verb == "dgrad" else problem.y_shape
    pixels = shape[0] * shape[2] * shape[3]
    if box is not None:  # those that its tiles cover
        pixels = tile.pixels * -(-shape[0] // box.images)
        pixels *= -(-shape[2] // box.rows) * -(-shape[3] // box.cols)
    item = problem.dtype.itemsize
    kernel = fprop_seconds(
        tile, pixels, lowering.steps, lowering.segments, item, part, lowering.classes
    )
    if box is None and has_boxes(problem.device):
        kernel *= 1.13  # what descriptors gained on an H100: triton-lang/triton pull 5461
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
    return GatherChoice(tile, box, lowering, seconds, min(1.0, efficiency))


def best_wgrad(problem: Problem) -> WgradChoice:
    """Picks the tiles of wgrad; the answer is kept with the Support."""
    key = ("triton choice", *_key(problem))
    found: WgradChoice | None = problem.support.derived.get(key)
    if found is None:
        half = problem.dtype.itemsize == 2
        part = part_of(problem.device)
        found = min(
            (
                _wgrad(problem, fused, one, coarse, part)
                for coarse in (False, True)
                for fused in (HALF_FUSED if half else SINGLE_FUSED)
                for one in (HALF_ONE if half else SINGLE_ONE)
            ),
            key=lambda c: c.seconds,
        )
        problem.support.derived[key] = found
    return found


def parts_of(support: Support, tiles: tuple[Tile, Tile], coarse: bool) -> list[WgradPart]:
    """Returns the lowering of wgrad for these tiles; kept with the Support."""
    blocks = [Block(t.filters, t.channels, align=t.channels) for t in tiles]
    key = ("triton wgrad", coarse, *blocks)
    if key not in support.derived:
        support.derived[key] = wgrad_parts(support, blocks[0], blocks[1], coarse)
    found: list[WgradPart] = support.derived[key]
    return found


def _wgrad(problem: Problem, fused: Tile, one: Tile, coarse: bool, part: Part) -> WgradChoice:
    support = problem.support
    oh, ow = problem.output_size
    pixels, item = problem.batch * oh * ow, problem.dtype.itemsize
    kernel, executed = 0.0, 0
    for p in parts_of(support, (fused, one), coarse):
        tile = fused if p.taps == 3 else one
        kernel += wgrad_seconds(tile, len(p.words), p.taps, pixels, item, part) + NEXT_LAUNCH
        executed += p.positions.size
    seconds = LAUNCH + max(kernel, problem.bytes_moved / part.bandwidth)
    if not problem.channels_last:
        seconds += kernel
    efficiency = support.live / executed if executed else 1.0
    return WgradChoice((fused, one), coarse, seconds, efficiency)


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
        problem.strides,
        device,
        ONLY,
        geometry.tail,
    )
