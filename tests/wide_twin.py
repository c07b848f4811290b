# SPDX-License-Identifier: Apache-2.0
"""The wide kernel in numpy: runs its tables literally, as wide.h says, and checks them.

Neither uses `windows` or the lowering: what a tap reads comes from the geometry itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import wide_flat

from hetconv_kernels.backends.cuda.fields import (
    CHUNKS,
    STEP_COUNTS,
    UNREAD,
    WideBlock,
    WideHead,
    WideSteps,
)
from hetconv_kernels.backends.cuda.wide_tiles import WideTiling
from hetconv_kernels.problem import Geometry

STEPS = slice(WideBlock.STEPS, WideBlock.UNREAD)


class Line(NamedTuple):
    """A line of ``classes``; the attributes are its fields."""

    pixels_h: int
    pixels_w: int
    tiles_h: int
    tiles_w: int
    images: int
    image_pitch: int
    load_h: int
    load_w: int
    base_h: int
    base_w: int
    halo_h: int
    halo_w: int
    row_pitch: int
    col_half: int
    store_h: int
    store_w: int
    first_h: int
    first_w: int


class Tile(NamedTuple):
    """A tile of a class: its stack of images, and its place in it."""

    stack: int
    row: int
    col: int


def lines(tiling: WideTiling) -> list[Line]:
    """Returns the classes by name."""
    return [Line(*fields) for fields in tiling.classes.tolist()]


def tiles(line: Line, batch: int) -> Iterator[Tile]:
    """Lists the tiles of a class."""
    for stack in range(-(-batch // line.images)):
        for row in range(line.tiles_h):
            for col in range(line.tiles_w):
                yield Tile(stack, row, col)


def tile_rows(line: Line, high: int, row: int) -> np.ndarray:
    """Returns the image in the stack, and the row of y's class, of each tile row; -1: none."""
    i = np.arange(high)
    image, own = (np.zeros(high, int), i) if line.images == 1 else np.divmod(i, line.image_pitch)
    own = own + row * high
    stored = (own < line.pixels_h) & (image < line.images)
    return np.where(stored, [image, own], -1)


def halo_rows(line: Line, high: int, row: int) -> np.ndarray:
    """Returns the image in the stack, and the row in it, of each halo row."""
    r, apart = np.arange(line.halo_h), line.image_pitch * line.load_h
    image = np.minimum(r // apart, line.images - 1)
    return np.stack([image, line.base_h + row * high * line.load_h + r - image * apart])


def places(line: Line) -> np.ndarray:
    """Returns the place in a halo row of each halo column."""
    c = np.arange(line.halo_w)
    return c % line.load_w * line.col_half + c // line.load_w


def execute(tiling: WideTiling, x: np.ndarray, slabs: np.ndarray, y: np.ndarray) -> None:
    """Runs the tables; y has to be NaN, and what is written twice is an error.

    Args:
        tiling: tables and shape.
        x: what is read.  # [N, H, W, C]
        slabs: packed weights.  # [steps * 4096]
        y: what is written.  # [N, OH, OW, F]
    """
    tables, high = tiling.tables, tiling.shape.pixels // 8
    weights = slabs.reshape(-1, 8, 8, 8, 8)
    for line, heads in zip(lines(tiling), tables.heads, strict=True):
        for tile in tiles(line, len(x)):
            for (begin, count), rows in zip(heads, tables.rows, strict=True):
                acc = np.zeros((2, 8, 8, high, 8))
                for block in tables.blocks[begin : begin + count]:
                    halo = (
                        wide_flat.halo(tiling, line, tile.row, block, x)
                        if tiling.shape.flat_pitch
                        else _halo(tiling, line, tile, block, x)
                    )
                    for side in range(2):
                        first, steps = block[STEPS].reshape(2, len(WideSteps))[side]
                        for step in range(first, first + steps):
                            read = _window(tiling, line, halo, tiling.steps[step])
                            acc[side] += np.einsum("kabc,kijc->abij", weights[step], read)
                if tiling.shape.flat_pitch:
                    wide_flat.store(tiling, line, tile.row, rows, acc, y)
                else:
                    _store(line, high, tile, rows, acc, y)


def _halo(tiling: WideTiling, line: Line, tile: Tile, block: np.ndarray, x: np.ndarray) -> object:
    """Brings a block's halo to planes; what nothing is brought to is NaN.  # [8, pitch, 8]"""
    chunks, (top, bottom, left, right) = block[CHUNKS], block[UNREAD]
    brought = slice(left, line.halo_w - right)
    batch, height, width, _ = x.shape
    high = tiling.shape.pixels // 8
    planes = np.full((8, tiling.shape.plane_pitch, 8), np.nan)
    columns = line.base_w + tile.col * 8 * line.load_w + np.arange(line.halo_w)
    images, rows = halo_rows(line, high, tile.row)
    for r, (image, row) in enumerate(zip(images, rows, strict=True)):
        if not top <= r < line.halo_h - bottom:
            continue
        image += tile.stack * line.images
        for chunk, plane in zip(chunks, planes, strict=True):
            cells = np.zeros((line.halo_w, 8))
            if chunk >= 0 and image < batch and 0 <= row < height:
                inside = (columns >= 0) & (columns < width)
                cells[inside] = x[image, row, columns[inside], chunk * 8 : chunk * 8 + 8]
            plane[r * line.row_pitch + places(line)[brought]] = cells[brought]
    return planes


def _window(tiling: WideTiling, line: Line, planes: object, step: int) -> np.ndarray:
    """Returns what a tile reads at a step.  # [8, rows, 8, 8]"""
    i, j = np.arange(tiling.shape.pixels // 8)[:, None], np.arange(8)
    where = step + i * line.load_h * line.row_pitch + j
    assert 0 <= where.min() <= where.max() < tiling.shape.plane_pitch
    found: np.ndarray = planes[:, where]  # type: ignore[index]
    return found


def _store(
    line: Line,
    high: int,
    tile: Tile,
    rows: np.ndarray,
    acc: np.ndarray,
    y: np.ndarray,
) -> None:
    images, own = tile_rows(line, high, tile.row)
    for i in np.flatnonzero(own >= 0):
        image = tile.stack * line.images + images[i]
        for j in range(8):
            col = tile.col * 8 + j
            if image >= len(y) or col >= line.pixels_w:
                continue
            at = image, own[i] * line.store_h + line.first_h, col * line.store_w + line.first_w
            for side in range(2):
                for run, first in enumerate(rows[side]):
                    if first >= 0:
                        filters = slice(first, first + 8)
                        assert np.isnan(y[at][filters]).all(), "written twice"
                        y[at][filters] = acc[side, run, :, i, j]


def check(
    tiling: WideTiling,
    geometry: Geometry,
    size: tuple[int, int],
    batch: int,
    back: bool,
    every: tuple[int, int] = (1, 1),
) -> None:
    """Checks the tables of a call of any size, without running them.

    Each pixel of each filter is written once; each live weight is packed once, and every pixel has
    all taps that it needs; what a step reads is the pixel that its tap means, or padding for
    padding; no address leaves its plane.

    Raises:
        AssertionError: they are wrong.
    """
    tables, support = tiling.tables, geometry.support
    out = geometry.output_size(*size)
    written, read = (size, out) if back else (out, size)
    packed = tables.positions(support)
    assert (np.sort(packed[packed >= 0]) == np.flatnonzero(support.mask)).all(), "live weights"
    runs = tables.rows[tables.rows >= 0]
    assert sorted(runs) == list(range(0, support.channels if back else support.filters, 8)), "runs"
    begins = tables.blocks[:, STEPS].reshape(-1, len(WideSteps))[:, WideSteps.STEP_BEGIN]
    assert (np.diff(begins) >= 0).all(), "order of steps"
    assert tables.blocks[:, STEP_COUNTS].sum() == len(tables.steps), "steps of blocks"
    assert tables.heads[..., WideHead.BLOCK_COUNT].sum() == len(tables.blocks), "blocks of heads"
    chunks = tables.blocks[:, CHUNKS]
    assert chunks.min(initial=0) >= -1
    limit = support.filters if back else support.channels
    assert chunks.max(initial=-1) * 8 < limit, "channels"
    assert len(tiling.steps) == len(tables.steps), "steps of tiles"
    seen = np.zeros(written, int)
    for index, line in enumerate(lines(tiling)):
        if tiling.shape.flat_pitch:
            seen[np.ix_(*wide_flat.check(tiling, line, geometry, read, batch, back, every))] += 1
            continue
        _check_shape(tiling, line, batch)
        taps = _taps_of(tiling, index, line)
        rows = _check_axis(tiling, line, geometry, read, taps, batch, back, 0, every[0])
        cols = _check_axis(tiling, line, geometry, read, taps, batch, back, 1, every[1])
        seen[np.ix_(rows, cols)] += 1
        if back and len(rows) and len(cols):
            _check_taps(geometry, (rows[0], cols[0]), tiling, index)
    assert (seen == 1).all(), "pixels written once"


def _check_shape(tiling: WideTiling, line: Line, batch: int) -> None:
    """Checks what wide.h asks of a class."""
    high, pitch = tiling.shape.pixels // 8, tiling.shape.plane_pitch
    assert pitch % 8 == 1, "banks"
    assert line.halo_h * line.row_pitch <= pitch, "halo in its plane"
    assert places(line).max() < line.row_pitch, "halo row"
    assert len(set(places(line))) == line.halo_w, "halo columns apart"
    assert line.images == 1 or line.tiles_h == 1, "a stack in one tile"
    assert line.images > 1 or line.image_pitch >= high, "one image"
    assert 1 <= line.images <= max(batch, 1), "images"


def _taps_of(tiling: WideTiling, index: int, line: Line) -> set[tuple[int, int, int]]:
    """Lists flat tap, halo row and halo column of the steps of a class."""
    tables, found = tiling.tables, set()
    column = {place: c for c, place in enumerate(places(line))}
    reach = (tiling.shape.pixels // 8 - 1) * line.load_h * line.row_pitch + 7
    for begin, count in tables.heads[index]:
        own = np.isin(tables.block, np.arange(begin, begin + count))
        _check_borders(tiling, line, begin, count, column)
        for tap, step in set(zip(tables.tap[own], tiling.steps[own], strict=True)):
            assert step >= 0, "address"
            assert step + reach < line.halo_h * line.row_pitch, "address"
            row, place = divmod(int(step), line.row_pitch)
            assert place in column, "a column that nothing is brought to"
            found.add((int(tap), row, column[place]))
    return found


def _check_borders(
    tiling: WideTiling, line: Line, begin: int, count: int, column: dict[int, int]
) -> None:
    """Checks that no step reads what is not brought of its block's halo."""
    tables, high = tiling.tables, tiling.shape.pixels // 8
    for block in range(begin, begin + count):
        top, bottom, left, right = tables.blocks[block, UNREAD].tolist()
        assert min(top, bottom, left, right) >= 0, "borders"
        for step in tiling.steps[tables.block == block].tolist():
            row, place = divmod(step, line.row_pitch)
            assert top <= row < line.halo_h - bottom - (high - 1) * line.load_h, "rows brought"
            col = column[place]
            assert left <= col < line.halo_w - right - 7 * line.load_w, "columns brought"


def _check_axis(
    tiling: WideTiling,
    line: Line,
    geometry: Geometry,
    read: tuple[int, int],
    taps: set[tuple[int, int, int]],
    batch: int,
    back: bool,
    axis: int,
    every: int,
) -> np.ndarray:
    """Checks what is read along an axis; returns the places of y that the class writes."""
    high, width = tiling.shape.pixels // 8, geometry.support.kernel[1]
    extent = -(-read[axis] // every)
    stride, dilation = geometry.stride[axis], geometry.dilation[axis]
    pad = geometry.pads[2 * axis]
    store, first = (line.store_h, line.first_h) if axis == 0 else (line.store_w, line.first_w)
    places = []
    for number in range((line.tiles_h, line.tiles_w)[axis]):
        if axis == 0:
            image, own = tile_rows(line, high, number)
            owner, there = halo_rows(line, high, number)
        else:
            image, own = np.zeros(8, int), number * 8 + np.arange(8)
            own = np.where(own < line.pixels_w, own, -1)
            there = line.base_w + number * 8 * line.load_w + np.arange(line.halo_w)
            owner = np.zeros(line.halo_w, int)
        for i in np.flatnonzero(own >= 0):
            place = int(own[i]) * store + first
            if image[i] == 0:
                places.append(place)
            for tap, row, col in taps:
                k, t = (tap // width, row) if axis == 0 else (tap % width, col)
                h = i * (line.load_h, line.load_w)[axis] + t
                wanted = place * stride - pad + k * dilation
                if back:
                    wanted, rest = divmod(place + pad - k * dilation, stride)
                    assert rest == 0, "a tap of another class"
                elif every > 1:
                    wanted, rest = divmod(wanted, every)
                    assert rest == 0, "a pixel that is skipped"
                inside = 0 <= wanted < extent
                if owner[h] == image[i] and there[h] == wanted:
                    continue
                assert not inside, "another pixel than the tap's"
                assert not 0 <= there[h] < extent, "a pixel for padding"
        if axis == 0:
            counts = np.bincount(image[own >= 0], minlength=line.images)
            assert (counts == counts[0]).all(), "all images of a stack alike"
    return np.array(places, int)


def _check_taps(geometry: Geometry, pixel: tuple[int, int], tiling: WideTiling, index: int) -> None:
    """Checks that a class of dgrad has no tap of another, given one of its pixels."""
    kh, kw = geometry.support.kernel
    own = {
        ky * kw + kx
        for ky in range(kh)
        for kx in range(kw)
        if (pixel[0] + geometry.pads[0] - ky * geometry.dilation[0]) % geometry.stride[0] == 0
        and (pixel[1] + geometry.pads[2] - kx * geometry.dilation[1]) % geometry.stride[1] == 0
    }
    tables = tiling.tables
    for begin, count in tables.heads[index]:
        steps = np.isin(tables.block, np.arange(begin, begin + count))
        assert set(tables.tap[steps].tolist()) <= own, "a tap of another class"
