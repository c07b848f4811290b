# SPDX-License-Identifier: Apache-2.0
"""The choice of a tile and a lowering for fprop and dgrad, by the cost model. Imports no Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ...problem import Problem
from ..gpu import parts
from ..gpu.axes import axes_of, dgrad_classes
from ..gpu.devices import GpuSpec, spec_of
from . import table
from .borders import steps_run
from .lowering import Lowering
from .tiles import (
    BOX_GAIN,
    BOX_TILES,
    HALF_TILES,
    LAUNCH,
    NEXT_LAUNCH,
    SINGLE_TILES,
    Box,
    Tile,
    fprop_seconds,
)

# "gather" or "tma" leaves only that kernel to choose from; for tests and for tuning.
ONLY_LAUNCH: str | None = None
# Ways to lower: whether channels are reordered, and whether all filters read all channels.
GROUPINGS = ((False, False), (True, False), (False, True))
# A box that is nearer to a square is taken for at most so many times the steps.
NEAR = 1.05


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
        """What tables and measurements call the choice."""
        return table.choice_name(self.tile, self.box, self.reordered, self.lowering.coarse)

    @property
    def reordered(self) -> bool:
        """Whether the operand's channels are gathered into another order."""
        return self.lowering.gather is not None


def gather_choices(problem: Problem) -> list[GatherChoice]:
    """Lists all ways to run fprop or dgrad, with their predictions."""
    tiles: Sequence[Tile] = HALF_TILES if problem.dtype.itemsize == 2 else SINGLE_TILES
    spec = spec_of(problem.device)
    found = []
    if parts.left_out("triton-gather"):
        tiles = ()
    forms = [GROUPINGS[0]] if len(problem.support.groups) == 1 else GROUPINGS
    for form in forms:
        for tile in tiles if ONLY_LAUNCH != "tma" else ():
            found.append(_gather(problem, tile, None, form, spec))
        for tile in BOX_TILES if _tma_wanted(problem.device) else ():
            if parts.left_out("triton-tma"):
                continue
            lowering = lowering_of(problem, tile.filters, tile.channels, *form)
            work = steps_run(lowering, *axes_of(problem))
            for box in boxes_of(problem, tile, lowering.gather is not None, work):
                found.append(_gather(problem, tile, box, form, spec, work(box)))
    return [c for c in found if c is not None] or [
        c for t in tiles if (c := _gather(problem, t, None, GROUPINGS[0], spec)) is not None
    ]


def _tma_wanted(device: torch.device) -> bool:
    """Tells whether fprop and dgrad may run on boxes: where the CUDA engine has no kernel for it.

    Each tap fetches a box of its own through L2; by prediction the CUDA engine's kernel for wide
    groups, which keeps the halo, is faster on every layer (docs/backends/cuda.md).
    """
    if ONLY_LAUNCH is not None or not has_tma(device):
        return ONLY_LAUNCH != "gather" and has_tma(device)
    if parts.left_out("cuda-wide"):
        return True
    try:
        from ... import _cuda
    except ImportError:
        return True
    return "90a" not in _cuda.architectures().split("_")


def has_tma(device: torch.device) -> bool:
    """Tells whether the box kernel is for this device: Hopper, or the interpreter when asked."""
    if device.type != "cuda":
        return ONLY_LAUNCH == "tma"
    return torch.cuda.get_device_capability(device)[0] == 9


def tma_reasons(problem: Problem, gathered: bool = False) -> list[str]:
    """Lists why TMA cannot fetch the boxes of a Problem; the pointer kernel then runs it.

    Args:
        problem: fprop or dgrad.
        gathered: whether the operand is copied into another order of channels first.
    """
    back = problem.verb == "dgrad"
    shape = problem.y_shape if back else problem.x_shape
    reasons = tensor_reasons(shape, None if gathered else problem.strides, problem.dtype)
    if not problem.channels_last:
        reasons.append("The result is not channels_last.")
    return reasons


def tensor_reasons(
    shape: Sequence[int], strides: Sequence[int] | None, dtype: torch.dtype
) -> list[str]:
    """Lists why a descriptor cannot describe an operand; strides None are channels_last's own."""
    item, reasons = dtype.itemsize, []
    if item != 2:
        reasons.append(f"{dtype} is not a 16-bit type.")
    if shape[1] * item % 16:
        reasons.append(f"{shape[1]} channels are not a multiple of 16 bytes.")
    _, width = shape[2:]
    own = (shape[1] * shape[2] * width, 1, width * shape[1], shape[1])
    n, c, h, w = own if strides is None else strides
    far = [s for s, size in ((n, shape[0]), (h, shape[2]), (w, shape[3])) if size > 1]
    if (c != 1 and shape[1] > 1) or any(s * item % 16 or s <= 0 for s in far):
        reasons.append(f"The operand's strides {(n, c, h, w)} are not those of channels_last.")
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


def boxes_of(
    problem: Problem,
    tile: Tile,
    gathered: bool = False,
    work: Callable[[Box], float] | None = None,
) -> list[Box]:
    """Lists the boxes that may be used: the best one, if any; see `best_box`."""
    if tma_reasons(problem, gathered):
        return []
    back = problem.verb == "dgrad"
    n, _, h, w = problem.x_shape if back else problem.y_shape
    if back:
        h, w = (-(-size // s) for size, s in zip((h, w), problem.geometry.stride, strict=True))
    _, c, height, width = problem.x_shape
    strides = (c * height * width, 1, width * c, c) if gathered else problem.strides
    steps_one = back or problem.geometry.stride == (1, 1) or folds(problem, tile, strides)
    box = best_box((n, h, w), tile.pixels, steps_one, work=work)
    return [] if box is None else [box]


def best_box(
    size: Sequence[int],
    pixels: int,
    several: bool,
    exact: bool = False,
    work: Callable[[Box], float] | None = None,
) -> Box | None:
    """Returns the box that covers images of a size with the least waste.

    Args:
        size: images, rows and columns.
        pixels: of the box, a power of two.
        several: whether it may hold more than one pixel of an image.
        exact: whether it has to divide rows and columns.
        work: counts the steps of all tiles of one block of images; None if every tile has as many.

    Returns:
        The box; None where a box of that many images is beyond a descriptor's.
    """
    n, h, w = size
    edges = [2**k for k in range(9) if 2**k <= pixels]
    found: list[tuple[float, int, Box]] = []
    for rows in edges if several else (1,):
        for cols in edges if several else (1,):
            images = pixels // (rows * cols)
            if images < 1 or images > 256 or (exact and (h % rows or w % cols)):
                continue
            box = Box(images, rows, cols)
            each = -(-h // rows) * -(-w // cols) if work is None else work(box)
            found.append((-(-n // images) * each, abs(rows - cols), box))
    if not found:
        return None
    # Among near equals the squarest, whose taps share most of what they read.
    most = min(found)[0] * (1.0 if work is None else NEAR)
    return min((shape, box) for cost, shape, box in found if cost <= most)[1]


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
    problem: Problem,
    tile: Tile,
    box: Box | None,
    form: tuple[bool, bool],
    spec: GpuSpec,
    work: float = 0.0,
) -> GatherChoice | None:
    lowering = lowering_of(problem, tile.filters, tile.channels, *form)
    if form[0] and lowering.gather is None:
        return None  # the same as in the channels' own order
    n, c, h, w = problem.y_shape if problem.verb == "dgrad" else problem.x_shape
    shape = problem.x_shape if problem.verb == "dgrad" else problem.y_shape
    pixels, steps = shape[0] * shape[2] * shape[3], float(lowering.steps)
    if box is not None:  # those that its tiles cover; some of which skip steps
        places = [
            -(-rows.pixels // box.rows) * -(-cols.pixels // box.cols)
            for rows, cols in axes_of(problem)[0]
        ]
        steps = work * len(places) / max(1, sum(places))
        pixels = tile.pixels * -(-shape[0] // box.images)
        pixels *= -(-shape[2] // box.rows) * -(-shape[3] // box.cols)
    item = problem.dtype.itemsize
    kernel = fprop_seconds(tile, pixels, steps, lowering.segments, item, spec, lowering.classes)
    if box is None and has_tma(problem.device):
        kernel *= BOX_GAIN
    slabs = lowering.steps * tile.filters * tile.channels
    memory = problem.bytes_moved / spec.bandwidth
    seconds = LAUNCH + NEXT_LAUNCH + max(kernel, memory)
    seconds += slabs * (2 * item + 4) / spec.bandwidth
    if lowering.gather is not None:
        seconds += NEXT_LAUNCH + 2 * n * c * h * w * item / spec.bandwidth
    if not problem.channels_last:
        seconds += kernel  # rows of single elements, not of vectors
    executed = slabs
    efficiency = problem.support.live / executed if executed else 1.0
    return GatherChoice(tile, box, lowering, seconds, min(1.0, efficiency))


def choice_key(problem: Problem) -> tuple[object, ...]:
    """Returns what a choice depends on, beside the Support."""
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
        ONLY_LAUNCH,
        geometry.tail,
        parts.WITHOUT,
    )
