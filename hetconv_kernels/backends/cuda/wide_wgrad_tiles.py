# SPDX-License-Identifier: Apache-2.0
"""Tiles and jobs of wgrad for wide groups, by predicted clocks.

The model counts, for one tile of a job, clocks of the matrix unit, of shared memory's port, of what
L2 supplies and of the warps that bring the tile, of which the longest counts; then whole rounds of
tiles, and the writing and adding up of partial gradients. Its constants are data sheets, arithmetic
and counts of machine code: **no GPU has confirmed them**.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...errors import BackendError
from ...masks import Int32Array, IntArray
from ...support import Support
from ..gpu.devices import GpuSpec
from .fields import UNREAD_COLS, UNREAD_ROWS, WideClass, WideUnread
from .wide_lowering import COLUMNS, SLAB, WARPGROUPS
from .wide_tiles import class_lines, plane_pitch, tile_counts
from .wide_wgrad_lowering import (
    WideJob,
    WideWgradTables,
    lower_wide_wgrad,
    wide_jobs,
    wide_segments,
)
from .windows import Tap, Window

# As in wide_wgrad.cu: products of a warpgroup.
PRODUCTS = (6, 5, 4, 2)
# Blocks of channels that a job may read, and the most rows of a tile, all its images together.
_BLOCKS, _MOST_ROWS = (2, 4, 8, 12), 32
_STAGES = (4, 3, 2, 1)
_LINE = 128  # bytes of shared memory a clock
# Instructions in which a warp copies 16 bytes for each lane (`turn` of tests/machine_code.json);
# and clocks from one tile to the next, in which no product is on its way: a barrier, a fence, and
# the last products' end.
_COPY_CLOCKS, _TURN_CLOCKS = 12.5, 150.0
# Bytes that partial gradients may take.
_MOST_PARTIALS = 2**28


class WideWgradPlan(NamedTuple):
    """A way to run wgrad, and what that is predicted to take.

    Attributes:
        jobs: of blocks of threads.
        products: of each warpgroup.
        line: how a tile reads x.  # int64 [18]
        rows: of a tile's pixels.
        pitches: 16-byte units of a plane of x, and of dy.
        stages: tiles in shared memory.
        splits: blocks of threads of each job.
        clocks: predicted, without launches.
        executed: multiply-accumulates that the matrix unit does.
    """

    jobs: list[WideJob]
    products: int
    line: IntArray
    rows: int
    pitches: tuple[int, int]
    stages: int
    splits: int
    clocks: float
    executed: int

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory, as the kernel lays it out."""
        blocks = max(len(job.blocks) for job in self.jobs)
        return self.stages * (128 * (self.pitches[1] + blocks * self.pitches[0]) + 16)


class WideWgradTiling(NamedTuple):
    """What is launched for one call.

    Attributes:
        plan: how.
        tables: the lowering.
        classes: two lines, of x and of dy, then four zeros.  # int32 [40]
    """

    plan: WideWgradPlan
    tables: WideWgradTables
    classes: Int32Array


def choose_wide_wgrad(
    support: Support, window: Window, image: tuple[int, int], batch: int, spec: GpuSpec
) -> WideWgradTiling:
    """Chooses jobs and a tile: the fastest predicted ones that fit.

    Args:
        support: of the layer.
        window: the pixels that a tile reads.
        image: rows and columns of x.
        batch: images.
        spec: the GPU.

    Raises:
        ArgumentError: channels or filters are no multiple of 8.
        BackendError: there is no weight, or no tile fits.
    """
    found = list(wgrad_plans(support, window, image, batch, spec))
    if not found:
        raise BackendError(
            f"no tile of {support} with its halo fits in {spec.shared} bytes of shared memory, "
            f"with partial gradients of at most {_MOST_PARTIALS} bytes."
        )
    return lowered(min(found, key=lambda plan: plan.clocks), window)


def lowered(plan: WideWgradPlan, window: Window) -> WideWgradTiling:
    """Makes the tables of a plan."""
    own = plan.line.copy()
    for field, value in (
        *(("LOAD_H", 1), ("LOAD_W", 1), ("BASE_H", 0), ("BASE_W", 0), ("HALO_H", plan.rows)),
        *(("HALO_W", COLUMNS), ("ROW_PITCH", COLUMNS), ("COL_HALF", 0)),
    ):
        own[WideClass[field]] = value
    classes = np.concatenate([plan.line, own, np.zeros(len(WideUnread), np.int64)]).astype(np.int32)
    tables = lower_wide_wgrad(plan.jobs, window, plan.products, plan.pitches[0])
    return WideWgradTiling(plan, tables, classes)


def wgrad_plans(
    support: Support, window: Window, image: tuple[int, int], batch: int, spec: GpuSpec
) -> Iterator[WideWgradPlan]:
    """Lists all ways that fit, with their predictions; arguments as `choose_wide_wgrad`."""
    segments, seen = wide_segments(support, window), set()
    lines = list(_lines(window, image, batch))
    for most_blocks in _BLOCKS:
        for products in PRODUCTS:
            jobs = wide_jobs(segments, WARPGROUPS * products, most_blocks)
            key = products, tuple((len(job.blocks), *job.products) for job in jobs)
            if not jobs or key in seen:
                continue
            seen.add(key)
            margins = _margins(jobs, window)
            for line, rows in lines:
                plan = _plan(jobs, margins, products, line, rows, batch, spec)
                if plan is not None:
                    yield plan


def _lines(window: Window, image: tuple[int, int], batch: int) -> Iterator[tuple[IntArray, int]]:
    """Lists lines of x for tiles of some rows: parts of an image, or stacks of whole ones."""
    seen = set()
    pixels = window.rows.pixels
    heights = [-(-pixels // parts) for parts in range(1, -(-pixels // 2) + 1)]
    heights += range(pixels + 1, _MOST_ROWS + 1)
    for height in heights:
        rows = -(-height // 2) * 2
        if rows > _MOST_ROWS or rows in seen:
            continue
        seen.add(rows)
        (line,) = class_lines([window], rows * COLUMNS, image[0], batch)
        images, pitch = line[[WideClass.IMAGES, WideClass.IMAGE_PITCH]].tolist()
        # Rows below the last image are of no use.
        if rows <= -(-pixels // 2) * 2 or rows - ((images - 1) * pitch + pixels) < 2:
            yield line, rows


def _margins(jobs: Sequence[WideJob], window: Window) -> list[IntArray]:
    """Counts the rows and columns that each block of each job leaves out.  # int [blocks, 2]"""
    found = []
    for job in jobs:
        reads: list[list[Tap]] = [[] for _ in job.blocks]
        for block, tap in job.products:
            reads[block].append(window.taps[tap])
        unread = np.array([window.unread(taps) for taps in reads])
        sides = [unread[:, UNREAD_ROWS].sum(axis=1), unread[:, UNREAD_COLS].sum(axis=1)]
        found.append(np.stack(sides, axis=1))
    return found


def _plan(
    jobs: list[WideJob],
    margins: Sequence[IntArray],
    products: int,
    line: IntArray,
    rows: int,
    batch: int,
    spec: GpuSpec,
) -> WideWgradPlan | None:
    """Predicts a way to run wgrad (see the module); None where it does not fit."""
    (tiles,) = tile_counts(line[None], batch)
    pitches = plane_pitch(line[None]), rows * COLUMNS + 1
    splits = max(1, min(tiles, spec.processors // len(jobs)))
    blocks, pixels, together = splits * len(jobs), rows * COLUMNS, WARPGROUPS * products
    partial = together * SLAB * 4
    executed = len(jobs) * together * SLAB * pixels * tiles
    plan = WideWgradPlan(jobs, products, line, rows, pitches, 1, splits, 0.0, executed)
    fitting = [s for s in _STAGES if plan._replace(stages=s).shared_bytes <= spec.shared]
    if not fitting or blocks * partial > _MOST_PARTIALS:
        return None
    halo = line[[WideClass.HALO_H, WideClass.HALO_W]]
    moved = np.array([128.0 * (pixels + np.prod(halo - own, axis=1).sum()) for own in margins])
    multiply = together * SLAB * pixels / spec.rate + _TURN_CLOCKS
    # A fragment of dy for each warpgroup, and x for each product: 2 KB of sixteen pixels.
    port = (2048 * (WARPGROUPS + together) * pixels / 16 + moved) / _LINE
    bring = moved / 16 / 32 * _COPY_CLOCKS / 4  # of one of four warps
    fill = np.maximum(moved / spec.l2, bring)
    busy = np.maximum(multiply, port)
    tile = float((np.maximum(busy, fill) if fitting[0] > 1 else busy + fill).max())
    waves = -(-blocks // spec.processors)
    added = (waves + blocks / spec.processors) * partial / spec.l2  # written, and read again
    clocks = waves * -(-tiles // splits) * tile + float(fill.max()) + added
    return plan._replace(stages=fitting[0], clocks=clocks)
