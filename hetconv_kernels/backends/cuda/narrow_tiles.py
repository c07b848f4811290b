# SPDX-License-Identifier: Apache-2.0
"""Tiles of the narrow kernels: which pixels and filters one block has, by predicted clocks.

The cost model counts clocks of one multiprocessor for one tile: reading and writing shared memory,
the matrix unit, and device memory, of which the longest counts where blocks or buffers overlap
them. Its constants are data sheets and arithmetic: **no GPU has confirmed them**.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...errors import BackendError
from ...support import Support
from ..gpu.devices import GpuSpec
from .fields import NarrowList, NarrowRound
from .narrow_lowering import FRAGMENT, MAX_WARPS, BlockShape, Tables, lower_narrow
from .narrow_slots import TILE_RANGES
from .narrow_tma import TMA_ALIGN, round_up
from .narrow_wgrad_lowering import WARP_UNITS, WgradTables, lower_wgrad
from .windows import Window

WARP_PIXELS, WARP_FILTERS = 32, 64
_WIDTHS = (8, 16, 32)
_BLOCK_RESERVE = 1024  # bytes of shared memory that the system takes of every block
_LINE = 128  # bytes of shared memory a clock
_REGISTERS = 65536
_WARPS = 16
_SIZES = np.array([size for _, size in TILE_RANGES])


class NarrowTiling(NamedTuple):
    """What is launched for one call, and what that is predicted to take.

    Attributes:
        tables: the lowering.
        buffers: halo tiles in shared memory; two are double buffering.
        resident: whether weights stay in shared memory.
        no_tma: why TMA does not bring halos; empty where it does.
        clocks: predicted, of the whole call.
    """

    tables: Tables
    buffers: int
    resident: bool
    no_tma: str
    clocks: float


def shared_bytes(tables: Tables, buffers: int, resident: bool, tma: bool) -> int:
    """Returns the dynamic shared memory of a block, as the kernel lays it out."""
    shape, grain = tables.shape, TMA_ALIGN if tma else 16
    lists = round_up(tables.rounds.shape[2] * shape.warps_n * tables.lists.shape[-1] * 4)
    words = round_up((tables.max_words + 1) * 4)
    stage = shape.warps_m * WARP_PIXELS * (shape.warps_n * WARP_FILTERS * tables.item + 16)
    buffer = max(tables.halo_pixels * tables.raw_pitch * 16, stage)
    weights = tables.max_fragments * FRAGMENT if resident else 0
    gathered = tables.halo_pixels * tables.slot_pitch * 16
    first = round_up(lists + words + weights, grain)
    mbarriers = 16 if tma else 0
    return first + buffers * round_up(buffer, grain) + gathered + mbarriers


def choose_narrow(
    support: Support,
    windows: Sequence[Window],
    batch: int,
    back: bool,
    spec: GpuSpec,
    no_tma: str = "",
    item: int = 2,
) -> NarrowTiling:
    """Chooses the tables of fprop or dgrad: the fastest predicted ones that fit.

    Args:
        support: the layer's own.
        windows: the classes of pixels.
        batch: images.
        back: whether for dgrad.
        spec: the GPU.
        no_tma: why it has no TMA; empty if it has.
        item: bytes of a number of x and y, 2 or 4.

    Raises:
        BackendError: no tile with its halo fits in shared memory.
    """
    filters = support.channels if back else support.filters
    best: NarrowTiling | None = None
    channels = support.filters if back else support.channels
    for slots in (64, 8, 4):  # at most so many at a time: all, or several rounds of fewer
        for shape in _shapes(windows, filters, slots):
            if max(_halo(w, shape.height, shape.width) for w in windows) * 16 > spec.shared:
                continue
            try:
                tables = lower_narrow(support, windows, shape, back, item)
            except BackendError:
                continue
            why = no_tma or tables.no_tma
            for resident, buffers in ((True, 2), (True, 1), (False, 2), (False, 1)):
                size = shared_bytes(tables, buffers, resident, not why)
                if size > spec.shared:
                    continue
                clocks = narrow_clocks(tables, windows, batch, buffers, resident, spec, size)
                if best is None or clocks < best.clocks:
                    best = NarrowTiling(tables, buffers, resident, why, clocks)
        if best is not None and (channels <= 64 or slots == 8):
            return best
    if best is not None:
        return best
    raise BackendError(
        f"no tile of {support} with its halo fits in {spec.shared} bytes of shared memory."
    )


def narrow_clocks(
    tables: Tables,
    windows: Sequence[Window],
    batch: int,
    buffers: int,
    resident: bool,
    spec: GpuSpec,
    size: int,
) -> float:
    """Predicts the clocks of a call (see the module) whose blocks have `size` bytes."""
    shape, item = tables.shape, tables.item
    # Instructions for wgmma's successors aside, mma.sync reaches 5/8 of what Hopper's unit does.
    rate = spec.rate * (0.625 if spec.waits else 1.0)
    bytes_a_clock = spec.bandwidth / spec.processors / spec.clock
    total = 0.0
    for index, window in enumerate(windows):
        tiles = batch * -(-window.rows.pixels // shape.height)
        tiles *= -(-window.cols.pixels // shape.width)
        halo = _halo(window, shape.height, shape.width)
        for rounds, lists in zip(tables.rounds[index], tables.lists[index], strict=True):
            begins = lists[..., NarrowList.LIST_BEGIN : NarrowList.LIST_FRAGMENT]
            steps = np.diff(begins).reshape(-1, len(TILE_RANGES)).sum(axis=0)
            chunks = int(rounds[:, NarrowRound.CHUNK_COUNT].sum())
            slots = int(rounds[:, NarrowRound.SLOT_COUNT].sum())
            loads = shape.warps_m * 2 * 4 * int(steps.sum())
            weights = shape.warps_m * 2 * int((steps * _SIZES).sum())
            moved = halo * chunks * 16 / _LINE
            moved += 2 * item * shape.filters * shape.warps_m * WARP_PIXELS / _LINE
            gathered = halo * slots / 32 * 14
            # Of TF32 a product has half the columns at half the rate; of float32 as the sum of two
            # such numbers there are three, which PyTorch's switch decides at the call.
            matrix = shape.warps_m * 2 * 2048 / rate * int((steps * _SIZES).sum())
            work = max(loads + weights + moved + gathered, matrix)
            used = min(shape.height * shape.width, shape.warps_m * WARP_PIXELS)
            memory = used * (chunks * 16 + shape.filters * item) / bytes_a_clock
            fill = (halo * chunks * 16 + (0 if resident else weights * _LINE)) / spec.l2
            threads = shape.warps_m * shape.warps_n * 32
            registers = 128 if resident and item == 2 else 192
            # Occupancy: thread blocks that a multiprocessor holds at once.
            fitting = spec.shared // (size + _BLOCK_RESERVE)
            resident_blocks = min(fitting, _REGISTERS // (registers * threads)) or 1
            moving = max(memory, fill)
            each = max(work, moving) if resident_blocks * buffers > 1 else work + moving
            # A warp waits for its own products; fewer than sixteen leave a processor waiting too.
            each *= max(1.0, _WARPS / (resident_blocks * threads / 32)) ** 0.5
            total += each * max(tiles / spec.processors, 1.0)
    return total


def choose_wgrad(
    support: Support, window: Window, spec: GpuSpec, no_tma: str = ""
) -> tuple[WgradTables, int, str]:
    """Chooses the tables of wgrad, how many buffers a block has, and why TMA does not fill them.

    Args:
        support: the layer's own.
        window: the class of pixels of fprop.
        spec: the GPU.
        no_tma: why it has no TMA; empty if it has.

    Raises:
        BackendError: no tile with its halo fits in shared memory.
    """
    rows, cols = window.rows.pixels, window.cols.pixels
    for pixels in (128, 64, 32, 16):
        fitting = []
        for width in (*_WIDTHS, 4):
            height = pixels // width
            if 1 <= height <= max(rows, 1) * 2:
                halo = _halo(window, height, width)
                count = -(-rows // height) * -(-cols // width)
                fitting.append((count * (pixels + halo), -width, height, width))
        for units in (MAX_WARPS * WARP_UNITS, MAX_WARPS, 2):
            for _, _, height, width in sorted(fitting)[:2]:
                if _halo(window, height, width) * 16 > spec.shared:
                    continue
                try:
                    tables = lower_wgrad(support, window, height, width, units)
                except BackendError:
                    continue
                why = no_tma or tables.no_tma
                for buffers in (2, 1):
                    most = spec.shared // (2 if buffers == 2 else 1)
                    if tables.shared_bytes(buffers, not why) <= most:
                        return tables, buffers, why
    raise BackendError(
        f"no tile of {support} with its halo fits in {spec.shared} bytes of shared memory."
    )


def _shapes(windows: Sequence[Window], filters: int, slots: int) -> Iterator[BlockShape]:
    """Lists the shapes that are worth a lowering, one for each arrangement of warps."""
    rows = max(window.rows.pixels for window in windows)
    cols = max(window.cols.pixels for window in windows)
    for warps_n in (1, 2, 4):
        if warps_n > 1 and filters <= warps_n // 2 * WARP_FILTERS:
            continue
        for warps_m in (8, 4, 2, 1):
            if warps_m * warps_n > MAX_WARPS:
                continue
            pixels = warps_m * WARP_PIXELS
            found = []
            for width in {*_WIDTHS, min(max(cols, 1), 32)}:
                height = min(pixels // width, max(rows, 1))
                if height < 1:
                    continue
                count = -(-rows // height) * -(-cols // width)
                halo = sum(_halo(w, height, width) for w in windows) / len(windows)
                # A tile whose lines are no multiple of eight meets some banks twice.
                uneven = 1.0 if width % 8 == 0 else 1.1
                found.append((count * (pixels * 2 + halo) * uneven, height, width))
            _, height, width = min(found)
            yield BlockShape(height, width, warps_m, warps_n, slots)


def _halo(window: Window, height: int, width: int) -> int:
    """Returns the pixels that a halo tile takes in shared memory."""
    return window.halo(height, 1)[0] * window.line(width)
