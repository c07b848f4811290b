# SPDX-License-Identifier: Apache-2.0
"""Tiles of the wide kernel: pixels, and what shared memory holds, by predicted clocks.

The model counts, for one tile of two segments, clocks of the matrix unit, of shared memory's port,
of what L2 supplies and of the warps that bring halos, of which the longest counts; then whole
rounds of tiles over the multiprocessors. Its constants are data sheets and arithmetic: **no GPU has
confirmed them**.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import BackendError
from ...masks import Int32Array, IntArray
from ..gpu import parts
from ..gpu.devices import GpuSpec
from .eights import EIGHT
from .fields import STEP_COUNTS, UNREAD, UNREAD_COLS, UNREAD_ROWS, WideClass
from .wide_lowering import COLUMNS, SLAB, WideTables
from .windows import Window

# As in wide.h: pixels of a tile, most first, and where rows are flattened; and blocks of threads
# that share slabs.
TILE_PIXELS, FLAT_PIXELS, CLUSTER_SIZES = (256, 224, 128, 64), (224, 208), (1, 2)
_STAGES, _SLOTS = (3, 2, 1), (8, 6, 5, 4, 3, 2)
_PLANES, _WARPGROUPS, _STAGED = 8, 2, 4 * 32 * 144
_LINE = 128  # bytes of shared memory a clock
# Slabs in flight that cover what L2 takes to answer: 64 KB of two warpgroups.
_DEEP = 4
# Clocks in which a warpgroup brings 32 pixels from its registers to y, what its machine code issues
# (`results` of tests/machine_code.json) and what it waits for, a barrier and staged numbers; and of
# starting to. Where rows are flattened, by the pixels of a tile.
_RESULT_CLOCKS, _WAIT_CLOCKS, _FINISH_CLOCKS = 94.0, 56.0, 300.0
_FLAT_RESULT_CLOCKS = {224: 124.0, 208: 148.0}
# Columns of a halo that are brought side by side, and the instructions of each warp, a clock each:
# for a pixel in every column, and to begin a halo. Counted in machine code (nvcc 13.0).
_LANES, _PIECE_CLOCKS, _BEGIN_CLOCKS = 8, 12.5, 150.0
# The same where rows are flattened: for a pixel in every column, and for each row of an image.
_FLAT_PIECE_CLOCKS, _FLAT_ROW_CLOCKS = 13.0, 27.0
# Tiles whose rounds are counted one by one; and those, times pairs, that a 32-bit integer counts.
_COUNTED, _MOST = 2**16, 2**30


class WideShape(NamedTuple):
    """What one block of threads holds.

    Attributes:
        pixels: of a tile, one of `TILE_PIXELS`.
        plane_pitch: 16-byte units from a chunk's halo to the next.
        stages: halos in shared memory.
        slots: slabs in shared memory, of each warpgroup.
        cluster: blocks of threads that share slabs.
        flat_pitch: where rows are flattened, the places from one to the next; else 0.
    """

    pixels: int
    plane_pitch: int
    stages: int
    slots: int
    cluster: int
    flat_pitch: int = 0

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory, as the kernel lays it out."""
        halos = self.stages * _PLANES * self.plane_pitch * 16
        slabs = self.slots * _WARPGROUPS * SLAB * 2
        return halos + slabs + _STAGED + 16 * (self.stages + 2 * self.slots + 1)


class WideTiling(NamedTuple):
    """What is launched for one call, and what that is predicted to take.

    Attributes:
        tables: the lowering.
        steps: as in the tables, for these tiles.  # int32 [steps]
        classes: their lines.  # int32 [classes, 18]
        shape: of a block of threads.
        clocks: predicted, of the whole call.
        executed: multiply-accumulates that the matrix unit does, of the whole call.
    """

    tables: WideTables
    steps: Int32Array
    classes: Int32Array
    shape: WideShape
    clocks: float
    executed: int


def choose_wide(
    tables: WideTables,
    classes: Sequence[Window],
    image: tuple[int, int],
    batch: int,
    spec: GpuSpec,
) -> WideTiling:
    """Chooses the tile of fprop or dgrad: the fastest predicted one that fits.

    Args:
        tables: the lowering.
        classes: the classes of pixels.
        image: rows and columns of the operand that is read.
        batch: images.
        spec: the GPU.

    Raises:
        BackendError: no tile with its halo fits in shared memory.
    """
    found = list(tilings(tables, classes, image, batch, spec))
    if not found:
        raise BackendError(
            f"no tile with its halo, and two slabs for each warpgroup, fits in {spec.shared} bytes "
            f"of shared memory, with at most {_MOST} tiles."
        )
    # Among equals clusters of two, which ask L2 for half of the slabs.
    return min(found, key=lambda tiling: (tiling.clocks, -tiling.shape.cluster))


def tilings(
    tables: WideTables,
    classes: Sequence[Window],
    image: tuple[int, int],
    batch: int,
    spec: GpuSpec,
) -> Iterator[WideTiling]:
    """Lists all tiles that fit, with their predictions; arguments as `choose_wide`."""
    ways = [(pixels, 0, class_lines(classes, pixels, image[0], batch)) for pixels in TILE_PIXELS]
    for pixels in () if parts.left_out("cuda-flat") else FLAT_PIXELS:
        flat = flat_line(classes, pixels, image, batch)
        if flat is not None:
            ways.append((pixels, *flat))
    for pixels, flat_pitch, lines in ways:
        shape = _deepest_fit(pixels, plane_pitch(lines), spec.shared)
        if shape is None or sum(tile_counts(lines, batch)) * len(tables.rows) > _MOST:
            continue
        fields = lines.astype(np.int32)  # which holds all that fits in shared memory
        steps = flat_steps(tables, classes[0], flat_pitch) if flat_pitch else tables.steps
        for cluster in CLUSTER_SIZES:
            if cluster > 1 and parts.left_out("cuda-cluster"):
                continue
            own = shape._replace(cluster=cluster, flat_pitch=flat_pitch)
            clocks, executed = wide_clocks(tables, lines, batch, own, spec)
            yield WideTiling(tables, steps, fields, own, clocks, executed)


def class_lines(classes: Sequence[Window], pixels: int, height: int, batch: int) -> IntArray:
    """Makes the lines of ``classes`` of wide.h for tiles of that many pixels.

    Example: four images of 7 × 7 pixels, with 3 × 3 taps and padding 1, stand in one tile of 32
    rows, 8 apart, so that one row of zeros is the padding below one and above the next:

        >>> from hetconv_kernels import Support
        >>> from hetconv_kernels.backends.cuda.windows import windows
        >>> from hetconv_kernels.problem import make_geometry
        >>> found = windows(make_geometry(Support.dense(64, 64, 3), 1, 1), (7, 7), False)
        >>> class_lines(found, 256, 7, 128)[0, :6].tolist()
        [7, 7, 1, 1, 4, 8]

    Args:
        classes: the classes of pixels.
        pixels: of a tile.
        height: rows of the operand that is read.
        batch: images.

    Returns:
        One line for each class.  # int64 [classes, 18]
    """
    high, lines = pixels // COLUMNS, []
    for window in classes:
        rows = window.rows.pixels
        fields = window.fields(high, COLUMNS)
        load, base = fields["LOAD_H"], fields["BASE_H"]
        reach = window.halo(1, 1)[0]
        # Rows of an image, and what it reads below, belong to the next one only if both are zeros.
        apart = max(height - base, (rows - 1) * load + reach + min(base, 0), rows * load)
        pitch = -(-apart // load)
        images = 1
        if 0 < rows <= high:
            images = min(max(batch, 1), 1 + (high - rows) // pitch)
        line, step = window.line(COLUMNS), window.cols.load
        fields |= {"IMAGES": images, "IMAGE_PITCH": pitch if images > 1 else high}
        fields |= {"ROW_PITCH": line, "COL_HALF": line // step if step > 1 else 0}
        lines.append([fields[field.name] for field in WideClass])
    return np.array(lines, np.int64)


def flat_line(
    classes: Sequence[Window], pixels: int, image: tuple[int, int], batch: int
) -> tuple[int, IntArray] | None:
    """Makes the line of ``classes`` of wide.h for flattened rows; None where they are not for it.

    Example: 128 images of 28 × 28 pixels, with 3 × 3 taps and padding 1, are a line of rows 29
    apart and images 29 rows apart, of which 93 % are pixels; eights of columns fill 28 of 32:

        >>> from hetconv_kernels import Support
        >>> from hetconv_kernels.backends.cuda.windows import windows
        >>> from hetconv_kernels.problem import make_geometry
        >>> found = windows(make_geometry(Support.dense(64, 64, 3), 1, 1), (28, 28), False)
        >>> pitch, lines = flat_line(found, 208, (28, 28), 128)
        >>> pitch, lines[0, :6].tolist(), 128 * 28 * 28 * 100 // (518 * 208)
        (29, [28, 28, 518, 1, 128, 29], 93)

    Args:
        classes: the classes of pixels.
        pixels: of a tile.
        image: rows and columns of the operand that is read.
        batch: images.

    Returns:
        Places from a row to the next, and the line.  # int64 [1, 18]
    """
    if len(classes) != 1:
        return None
    (window,) = classes
    axes, fields = (window.rows, window.cols), window.fields(1, 1)
    bases, reaches = (fields["BASE_H"], fields["BASE_W"]), window.halo(1, 1)
    apart = [
        # What a pixel reads beyond its row belongs to the next one only if both are zeros.
        max(size - base, axis.pixels - 1 + reach + min(base, 0), axis.pixels)
        for axis, size, base, reach in zip(axes, image, bases, reaches, strict=True)
    ]
    rows, cols = (axis.pixels for axis in axes)
    if any(axis.load != 1 for axis in axes) or not rows * cols * batch:
        return None
    if apart[0] < 4 or apart[1] < _LANES:  # the kernel counts on it
        return None
    tiles = -(-(((batch - 1) * apart[0] + rows - 1) * apart[1] + cols) // pixels)
    halo = pixels + (reaches[0] - 1) * apart[1] + reaches[1] - 1
    if tiles * pixels + halo > _MOST:
        return None
    fields |= {"TILES_H": tiles, "TILES_W": 1, "IMAGES": batch, "IMAGE_PITCH": apart[0]}
    fields |= {"HALO_H": -(-halo // COLUMNS), "HALO_W": COLUMNS, "ROW_PITCH": COLUMNS}
    fields |= {"COL_HALF": 0}
    return apart[1], np.array([[fields[field.name] for field in WideClass]], np.int64)


def flat_steps(tables: WideTables, window: Window, pitch: int) -> Int32Array:
    """Returns what the first pixel of a tile reads at each step, where rows are flattened.

    Args:
        tables: the lowering, of one class.
        window: the class, with all taps.
        pitch: places from a row to the next.
    """
    width = 1 + max(tap.kx for tap in window.taps)
    places = np.zeros(width * (1 + max(tap.ky for tap in window.taps)), np.int32)
    for tap in window.taps:
        places[tap.ky * width + tap.kx] = tap.row * pitch + tap.col
    return places[tables.tap]


def plane_pitch(classes: IntArray) -> int:
    """Returns the pitch of planes: room for every halo, and 1 beyond a multiple of eight.

    So the eight chunks of a pixel, written together, meet all banks once.
    """
    most = int((classes[:, WideClass.HALO_H] * classes[:, WideClass.ROW_PITCH]).max())
    return -(-(most - 1) // 8) * 8 + 1


def tile_counts(classes: IntArray | Int32Array, batch: int) -> list[int]:
    """Returns the tiles of each class."""
    columns = [WideClass.IMAGES, WideClass.TILES_H, WideClass.TILES_W]
    return [-(-batch // images) * h * w for images, h, w in classes[:, columns].tolist()]


def wide_clocks(
    tables: WideTables, classes: IntArray, batch: int, shape: WideShape, spec: GpuSpec
) -> tuple[float, int]:
    """Predicts the clocks of a call (see the module), and counts its multiply-accumulates."""
    pixels, cluster = shape.pixels, shape.cluster
    # Bytes that a pair writes.
    stored = (tables.rows >= 0).sum(axis=(1, 2)) * EIGHT * pixels * 2
    part = _FLAT_RESULT_CLOCKS[pixels] if shape.flat_pitch else _RESULT_CLOCKS
    finish = _FINISH_CLOCKS + (part + _WAIT_CLOCKS) * pixels / 32
    step = SLAB * pixels / spec.rate
    spans, executed = [], 0
    for line, heads, tiles in zip(classes, tables.heads, tile_counts(classes, batch), strict=True):
        unread = tables.blocks[:, UNREAD]
        above_below, beside = (unread[:, own].sum(axis=1) for own in (UNREAD_ROWS, UNREAD_COLS))
        high, wide = int(line[WideClass.HALO_H]), int(line[WideClass.HALO_W])
        if shape.flat_pitch:
            places = high * wide - (above_below * shape.flat_pitch + beside)
            halos, bringing = places * 128, flat_producer_clocks(places, shape.flat_pitch)
        else:
            rows, cols = high - above_below, wide - beside
            halos, bringing = rows * cols * 128, producer_clocks(rows, cols)
        costs = []
        for (begin, count), written in zip(heads.tolist(), stored.tolist(), strict=True):
            each = tables.blocks[begin : begin + count, STEP_COUNTS].sum(axis=0)
            steps = int(each.sum())
            macs = steps * SLAB * pixels
            executed += tiles * macs
            halo = int(halos[begin : begin + count].sum())
            bring = float(bringing[begin : begin + count].sum())
            read = steps * 4 * (2 + pixels / 32) * 1024
            moved = steps * SLAB * 2 + halo
            port = (read + moved + 2 * written) / _LINE
            fill = (moved - steps * SLAB * 2 * (1 - 1 / cluster) + written) / spec.l2
            # One warpgroup multiplies while the other one writes its results.
            busy = max(steps * step, port, int(each.max()) * step + finish)
            # With one halo in shared memory nothing is fetched while it is computed.
            if shape.stages > 1:
                costs.append(max(busy, fill, bring))
            else:
                costs.append(busy + max(halo / spec.l2, bring))
        spans.append((-(-tiles // cluster), np.array(costs)))
    clocks = _rounds(spans, max(spec.processors // cluster, 1))
    return clocks + finish if clocks else 0.0, executed  # beside the last one nothing is computed


def producer_clocks(rows: IntArray, cols: IntArray) -> npt.NDArray[np.float64]:
    """Predicts the clocks in which the two warps bring halos of one block, as the kernel does.

    Eight columns at a time, a pixel of each in turn; four and fewer that are left over have several
    of their rows at a time.

    Example: 30 rows of 8 columns are 30 turns, 10 columns are 30 and, four rows at a time, 8:

        >>> producer_clocks(np.array([30, 30]), np.array([8, 10])).tolist()
        [525.0, 625.0]

    Args:
        rows: of each halo.  # [halos]
        cols: of each halo.  # [halos]
    """
    left = cols % _LANES
    at_a_time = _LANES // np.maximum(left, 1)
    turns = cols // _LANES * rows + np.where(left > 0, -(-rows // at_a_time), 0)
    return turns.astype(np.float64) * _PIECE_CLOCKS + _BEGIN_CLOCKS


def flat_producer_clocks(places: IntArray, pitch: int) -> npt.NDArray[np.float64]:
    """Predicts the same where rows are flattened: of each row, eight places at a time.

    Example: 268 places are in eleven rows of 29 at most, four turns each:

        >>> flat_producer_clocks(np.array([268]), 29).tolist()
        [1019.0]

    Args:
        places: of each halo.  # [halos]
        pitch: places from a row to the next.
    """
    lines = -(-places // pitch) + 1
    each = -(-pitch // _LANES) * _FLAT_PIECE_CLOCKS + _FLAT_ROW_CLOCKS
    return lines.astype(np.float64) * each + _BEGIN_CLOCKS


def _rounds(spans: Sequence[tuple[int, np.ndarray]], processors: int) -> float:
    """Returns the clocks of the busiest processor, tiles going to them in turn."""
    total = sum(count * len(costs) for count, costs in spans)
    if not total:
        return 0.0
    if total > _COUNTED:
        return float(sum(count * costs.sum() for count, costs in spans)) / processors
    each = np.concatenate([np.tile(costs, count) for count, costs in spans])
    each = np.append(each, np.zeros(-len(each) % processors))
    return float(each.reshape(-1, processors).sum(axis=0).max())


def _deepest_fit(pixels: int, pitch: int, shared: int) -> WideShape | None:
    """Returns what fits in shared memory: two halos and four slabs first, then more of both."""
    fitting = [shape for shape in _shapes(pixels, pitch) if shape.shared_bytes <= shared]
    if not fitting:
        return None
    return max(fitting, key=lambda s: (min(s.stages, 2), min(s.slots, _DEEP), s.stages, s.slots))


def _shapes(pixels: int, pitch: int) -> Iterator[WideShape]:
    for stages in _STAGES:
        for slots in _SLOTS:
            yield WideShape(pixels, pitch, stages, slots, 1)
