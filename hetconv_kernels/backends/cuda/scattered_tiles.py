# SPDX-License-Identifier: Apache-2.0
"""What the kernel for scattered groups holds in shared memory, by predicted clocks.

The model counts, for one tile and part, clocks of the matrix unit by the busiest of a
multiprocessor's four schedulers, of shared memory's port, and of what L2 supplies: halos first,
then weights while they are multiplied, results last; then whole rounds of blocks over the
multiprocessors. Its constants are data sheets and arithmetic: **no GPU has confirmed them**.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...errors import BackendError
from ...problem import Geometry
from ...support import Support
from ..gpu.devices import GpuSpec
from .eights import EIGHT
from .fields import ScatteredBlock, ScatteredPart
from .scattered_lowering import (
    SEGMENT,
    STEP_CHANNELS,
    ScatteredTables,
    lower_scattered,
    scattered_jobs,
)

# As in scattered.h.
_IMAGES, _ROWS, _COLUMNS = 8, 2, 7
_SIDES, _WARPS = (1, 3), (16, 8)
_PARTS, _SLOTS = (1, 2, 3, 4, 6), (128, 192, 256)
_PIXELS = _IMAGES * _ROWS * _COLUMNS
_LINE = 128  # bytes of shared memory a clock
_MOST_WARPS = 16  # of a multiprocessor, by registers: 128 of each thread
_RESERVE = 1024  # bytes of shared memory that the system takes of every block
# Of the channels of the eights that filters keep a channel of, the share from which on there is
# nothing to gather.
_IN_EIGHTS = 0.8
# Clocks that a first read of memory is waited for, before a block has anything to compute.
_LATENCY = 1000.0


class ScatteredShape(NamedTuple):
    """What one block of threads holds.

    Attributes:
        side: rows and columns of the kernel, 1 or 3.
        slots: channels in shared memory.
        columns: filters in shared memory.
        warps: 8 or 16.
    """

    side: int
    slots: int
    columns: int
    warps: int

    @property
    def halo(self) -> int:
        """Pixels of an image's halo."""
        return (_ROWS + self.side - 1) * (_COLUMNS + self.side - 1)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory, as the kernel lays it out."""
        return self.halo * self.slots * 16 + _PIXELS * (self.columns * 2 + 16)


class ScatteredTiling(NamedTuple):
    """What is launched for one call, and what that is predicted to take.

    Attributes:
        tables: the lowering.
        shape: of a block of threads.
        clocks: predicted, of the whole call.
        executed: multiply-accumulates that the matrix unit does, of the whole call.
    """

    tables: ScatteredTables
    shape: ScatteredShape
    clocks: float
    executed: int


def scattered_refusal(geometry: Geometry, back: bool = False) -> str:
    """Says why fprop of a layer, or dgrad, is not for the kernel; empty when it is."""
    support = geometry.support
    if support.kernel[0] != support.kernel[1] or support.kernel[0] not in _SIDES:
        return f"the kernel is {support.kernel[0]} x {support.kernel[1]}, neither 1 x 1 nor 3 x 3."
    if geometry.stride != (1, 1) or geometry.dilation != (1, 1):
        return f"stride {geometry.stride} or dilation {geometry.dilation} is not 1."
    keep = np.any(support.mask, axis=(2, 3))
    keep = keep.T if back else keep
    if keep.shape[1] % EIGHT == 0:  # else the lowering says so
        eights = int(keep.reshape(len(keep), -1, EIGHT).any(axis=2).sum()) * EIGHT
        if keep.sum() >= _IN_EIGHTS * eights:
            return "filters keep channels in eights that follow each other, as other kernels do."
    return ""


def tile_count(size: tuple[int, int], batch: int) -> int:
    """Returns the tiles of y: eight images, two rows and seven columns each."""
    return -(-batch // _IMAGES) * -(-size[0] // _ROWS) * -(-size[1] // _COLUMNS)


def choose_scattered(
    geometry: Geometry, size: tuple[int, int], batch: int, spec: GpuSpec, back: bool = False
) -> ScatteredTiling:
    """Chooses the tables of fprop or dgrad: the fastest predicted ones that fit.

    Args:
        geometry: the layer.
        size: of the result, in pixels.
        batch: images.
        spec: the GPU.
        back: whether for dgrad.

    Raises:
        ArgumentError: channels or filters are no multiple of 8.
        BackendError: the layer is not for this kernel, or does not fit in shared memory.
    """
    if reason := scattered_refusal(geometry, back):
        raise BackendError(reason)
    support, found = geometry.support, []
    multiplied = tile_count(size, batch) * _PIXELS * support.kernel[0] ** 2 * STEP_CHANNELS * EIGHT
    for tables, shape in _lowered(support, back):
        if shape.shared_bytes <= spec.shared:
            clocks = scattered_clocks(tables, shape, size, batch, spec)
            found.append(ScatteredTiling(tables, shape, clocks, multiplied * len(tables.steps)))
    if not found:
        raise BackendError(
            f"no tile of {support} with its halo fits in {spec.shared} bytes of shared memory."
        )
    return min(found, key=lambda tiling: tiling.clocks)


def _lowered(support: Support, back: bool) -> list[tuple[ScatteredTables, ScatteredShape]]:
    """Lowers a Support in all ways; kept with it."""
    key = ("cuda scattered tables", back)
    found: list[tuple[ScatteredTables, ScatteredShape]] | None = support.derived.get(key)
    if found is None:
        own = support.transpose() if back else support
        found, jobs = [], scattered_jobs(own)
        whole = -(-own.channels // SEGMENT) * SEGMENT
        for most in {min(slots, whole) for slots in (*_SLOTS, whole)}:
            for parts in _PARTS[: len(jobs)]:
                for warps in _WARPS:
                    tables = lower_scattered(own, jobs, most, parts, warps, back)
                    shape = ScatteredShape(support.kernel[0], tables.slots, tables.widest, warps)
                    found.append((tables, shape))
        support.derived[key] = found
    return found


def scattered_clocks(
    tables: ScatteredTables,
    shape: ScatteredShape,
    size: tuple[int, int],
    batch: int,
    spec: GpuSpec,
) -> float:
    """Predicts the clocks of a call; see the module."""
    held = max(1, min(spec.shared // (shape.shared_bytes + _RESERVE), _MOST_WARPS // shape.warps))
    taps, positions = shape.side**2, shape.halo
    # mma.sync reaches 5/8 of what Hopper's matrix unit does.
    rate = spec.rate * (0.625 if spec.waits else 1.0)
    total = 0.0
    for part, begins in zip(tables.parts.tolist(), tables.begins, strict=True):
        own = slice(begins[0], begins[-1])
        steps = tables.spans[own, -1] - tables.spans[own, 0]
        warp = np.searchsorted(begins, np.arange(begins[0], begins[-1]), side="right") - 1
        products = steps * taps * _COLUMNS * 2048 / rate
        busiest = 4 * np.bincount(warp % 4, products, minlength=4).max()
        results = len(steps) * 8 * _PIXELS / 32 * 2
        weights = int(steps.sum()) * taps * 256
        # Each pixel of an eight of slots is read once, and each weight.
        port = int(tables.meetings[own].sum()) * positions + weights / _LINE + results
        compute = max(busiest, port, weights / spec.l2)
        first, count = part[ScatteredPart.BLOCK_BEGIN], part[ScatteredPart.BLOCK_COUNT]
        column, columns = part[ScatteredPart.COLUMN_BEGIN], part[ScatteredPart.COLUMN_COUNT]
        blocks = tables.blocks[first : first + count]
        segments = int(blocks[:, ScatteredBlock.SEGMENT_COUNT].sum())
        again = part[ScatteredPart.TURNS] if count > 1 else 1
        brought = again * segments * SEGMENT * 2 * positions * _IMAGES
        load = max(brought / spec.l2, 3 * brought / _LINE) + again * count * _LATENCY
        # Of each pixel the sectors, of 32 bytes, that the part's filters lie in.
        sectors = len(np.unique(tables.columns[column : column + columns] // 16))
        store = _PIXELS * max(sectors * 32 / spec.l2, columns * 4 / _LINE)
        # Another block computes while this one's pixels come and go, where two are held.
        total += max(compute, (load + compute + store) / held)
    launched = tile_count(size, batch) * len(tables.parts)
    at_once = spec.processors * held
    rounds = -(-launched // at_once) * held
    return rounds * total / len(tables.parts)
