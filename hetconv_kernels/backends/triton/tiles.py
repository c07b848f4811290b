# SPDX-License-Identifier: Apache-2.0
"""Tiles, the parts they run on, and the cost model that picks one.

The model counts clocks of one multiprocessor: the matrix unit's, those of filling shared memory
from L2, and a floor for starting a step; waves are whole. Its constants are nominal (data sheets
and arithmetic): **no GPU has confirmed them yet**.
"""

from __future__ import annotations

from typing import NamedTuple

from ..gpu.devices import GpuSpec


class Tile(NamedTuple):
    """The block sizes of one program.

    Attributes:
        pixels: of a tile; for wgrad the pixels of one turn of its loop.
        filters: of a tile.
        channels: of a step; for wgrad of a tile.
        warps: of 32 threads.
    """

    pixels: int
    filters: int
    channels: int
    warps: int


class Box(NamedTuple):
    """The shape of a tile of pixels that is fetched at once, powers of two.

    Attributes:
        images: in it.
        rows: of each.
        cols: of each.
    """

    images: int
    rows: int
    cols: int


# The tiles that are shipped, for 16-bit types and for float32.
HALF_TILES = (
    Tile(128, 128, 64, 8),
    Tile(128, 64, 64, 4),
    Tile(64, 64, 64, 4),
    Tile(256, 64, 64, 8),
    Tile(128, 32, 64, 4),
    Tile(128, 64, 32, 4),
    Tile(128, 32, 32, 4),
    Tile(128, 16, 16, 4),
)
# The tiles of the box kernel, filters on M; 16-bit types only.
BOX_TILES = (
    Tile(256, 64, 64, 4),
    Tile(128, 64, 64, 4),
    Tile(128, 128, 64, 8),
    Tile(256, 128, 64, 8),
)
SINGLE_TILES = (
    Tile(128, 64, 32, 8),
    Tile(64, 64, 32, 4),
    Tile(128, 32, 32, 4),
    Tile(128, 16, 16, 4),
)
# wgrad: jobs of three taps, then of one.
HALF_FUSED = (Tile(64, 128, 64, 8), Tile(64, 64, 64, 4), Tile(64, 32, 32, 4))
HALF_ONE = (Tile(64, 128, 128, 8), Tile(64, 64, 64, 4), Tile(64, 32, 32, 4))
# The same for boxes, filters on M; 16-bit types only.
BOX_FUSED = (Tile(64, 128, 64, 8), Tile(64, 64, 64, 4))
BOX_ONE = (Tile(64, 128, 128, 8),)
SINGLE_FUSED = SINGLE_ONE = (Tile(32, 64, 64, 4), Tile(32, 32, 32, 4))
# What three taps take instead where float32 is multiplied as 3xTF32: the parts of its numbers are
# in registers beside three accumulators, and of 32 pixels they would spill on sm_80 and sm_100.
SPLIT_FUSED = {Tile(32, 64, 64, 4): Tile(16, 64, 64, 4)}
MAX_STAGES = 4
# Clocks that a program spends before its first and after its last step.
PROLOGUE = 1500
# Clocks that a step takes at least, a warp and scheduler.
ISSUE = 25
# How much faster boxes are than pointers on Hopper, for the same tile: what descriptors gained on
# an H100 (triton-lang/triton pull 5461). And how much slower it is to read filters one by one.
BOX_GAIN, SCATTERED = 1.13, 4.0
# Seconds that a launch, and a launch more in the same call, take.
LAUNCH, NEXT_LAUNCH = 6e-6, 3e-6


def stages(tile: Tile, itemsize: int, spec: GpuSpec) -> int:
    """Returns the depth of the pipeline that fits into shared memory, at most `MAX_STAGES`."""
    step = (tile.pixels + tile.filters) * tile.channels * itemsize
    return _stages(step, MAX_STAGES, spec)


def box_stages(tile: Tile, itemsize: int, spec: GpuSpec) -> int:
    """Returns the pipeline's depth of the TMA kernel, whose result leaves by shared memory too."""
    step = (tile.pixels + tile.filters) * tile.channels * itemsize
    result = tile.pixels * tile.filters * itemsize
    return _stages(step, MAX_STAGES, spec._replace(shared=spec.shared - result))


def box_warps(tile: Tile, whole: bool) -> int:
    """Warps of the box kernel: eight where the result leaves through pointers, which are many."""
    return tile.warps if whole else 8


def wgrad_stages(tile: Tile, taps: int, itemsize: int, spec: GpuSpec) -> int:
    """Returns the pipeline's depth of wgrad, whose step holds dy, and x for each tap."""
    step = tile.pixels * (tile.filters + taps * tile.channels) * itemsize
    return _stages(step, MAX_STAGES - 1, spec)


def _stages(step: int, most: int, spec: GpuSpec) -> int:
    # Barriers want a little of the shared memory.
    return max(2, min(most, (spec.shared - 2048) // step + (not spec.waits)))


def step_clocks(
    rows: int, cols: int, depth: int, warps: int, itemsize: int, spec: GpuSpec
) -> float:
    """Returns the clocks of one product [rows, depth] · [depth, cols] and of fetching both."""
    rate = spec.rate if itemsize == 2 else spec.rate / 2
    return max(
        rows * cols * depth / rate,
        (rows + cols) * depth * itemsize / spec.l2,
        ISSUE * warps,
    )


def fprop_seconds(
    tile: Tile,
    pixels: int,
    segment_steps: float,
    segments: int,
    itemsize: int,
    spec: GpuSpec,
    classes: int = 1,
) -> float:
    """Predicts the kernel's time.

    Args:
        tile: its tile.
        pixels: of the result, all images.
        segment_steps: steps of all segments (of all classes) together.
        segments: blocks of filters.
        itemsize: of the operands, in bytes.
        spec: where.
        classes: residue classes, each computing its share of the pixels.

    Returns:
        Seconds, without the launch.
    """
    clocks = step_clocks(tile.pixels, tile.filters, tile.channels, tile.warps, itemsize, spec)
    tiles = -(-pixels // (tile.pixels * classes)) * classes
    programs = tiles * segments
    average = segment_steps / (segments * classes) * clocks
    average += PROLOGUE + tile.pixels * tile.filters * itemsize / spec.l2
    return -(-programs // spec.processors) * average / spec.clock


def wgrad_seconds(
    tile: Tile, jobs: int, taps: int, pixels: int, itemsize: int, spec: GpuSpec
) -> float:
    """Predicts the time of one launch of wgrad's kernel, split so that all processors work."""
    rows, cols = tile.filters, taps * tile.channels
    clocks = step_clocks(rows, cols, tile.pixels, tile.warps, itemsize, spec)
    turns = -(-pixels // tile.pixels)
    cut = splits(jobs, pixels, tile.pixels, spec)
    programs = jobs * cut
    average = turns / cut * clocks + PROLOGUE
    return -(-programs // spec.processors) * average / spec.clock


def splits(jobs: int, pixels: int, block: int, spec: GpuSpec) -> int:
    """Returns into how many pieces the pixels are cut: two to three programs a processor."""
    wanted = -(-5 * spec.processors // (2 * max(jobs, 1)))
    # A piece is worth its partial result from some hundred pixels on.
    return max(1, min(wanted, -(-pixels // max(256, 4 * block)), 256))
