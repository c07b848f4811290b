# SPDX-License-Identifier: Apache-2.0
"""Flattened rows of the wide kernel in numpy, as wide.h says; see `wide_twin`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hetconv_kernels.backends.cuda.fields import UNREAD
from hetconv_kernels.backends.cuda.wide_tiles import WideTiling
from hetconv_kernels.problem import Geometry

if TYPE_CHECKING:
    from wide_twin import Line

Places = np.ndarray


def pixels_at(line: Line, pitch: int, places: Places) -> tuple[Places, Places, Places]:
    """Returns image, row and column of places of the line."""
    rows, cols = np.divmod(places, pitch)
    images, rows = np.divmod(rows, line.image_pitch)
    return images, rows, cols


def written(line: Line, pitch: int, places: Places, batch: int) -> Places:
    """Tells which places are pixels of y."""
    images, rows, cols = pixels_at(line, pitch, places)
    found: Places = (images < batch) & (rows < line.pixels_h) & (cols < line.pixels_w)
    return found


def brought(line: Line, pitch: int, block: Places) -> slice:
    """Returns which places of a halo are brought for a block."""
    top, bottom, left, right = block[UNREAD].tolist()
    return slice(top * pitch + left, line.halo_h * 8 - bottom * pitch - right)


def halo(tiling: WideTiling, line: Line, row: int, block: Places, x: Places) -> Places:
    """Brings a block's halo to planes; what nothing is brought to is NaN.  # [8, pitch, 8]"""
    shape = tiling.shape
    batch, height, width, _ = x.shape
    where = brought(line, shape.flat_pitch, block)
    places = np.arange(where.start, where.stop)
    images, rows, cols = pixels_at(line, shape.flat_pitch, row * shape.pixels + places)
    rows, cols = rows + line.base_h, cols + line.base_w
    there = (images < batch) & (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    planes = np.full((8, shape.plane_pitch, 8), np.nan)
    planes[:, places] = 0
    for chunk, plane in zip(block[:8], planes, strict=True):
        if chunk >= 0:
            cells = x[images[there], rows[there], cols[there], chunk * 8 : chunk * 8 + 8]
            plane[places[there]] = cells
    return planes


def store(
    tiling: WideTiling, line: Line, row: int, filters: Places, acc: Places, y: Places
) -> None:
    """Writes a tile to y, which must be NaN there.  # acc [2, 8, 8, rows, 8]"""
    pitch, pixels = tiling.shape.flat_pitch, tiling.shape.pixels
    places = row * pixels + np.arange(pixels)
    images, rows, cols = pixels_at(line, pitch, places)
    for place in np.flatnonzero(written(line, pitch, places, len(y))):
        at = (
            images[place],
            rows[place] * line.store_h + line.first_h,
            cols[place] * line.store_w + line.first_w,
        )
        for side in range(2):
            for run, first in enumerate(filters[side]):
                if first >= 0:
                    own = y[at][first : first + 8]
                    assert np.isnan(own).all(), "written twice"
                    own[:] = acc[side, run, :, place // 8, place % 8]


def check(
    tiling: WideTiling,
    line: Line,
    geometry: Geometry,
    read: tuple[int, int],
    batch: int,
    back: bool,
    every: tuple[int, int],
) -> list[Any]:
    """Checks every place of the line at every tap; returns rows and columns of y that are written.

    Raises:
        AssertionError: a step reads another pixel than its tap's, or what is not brought.
    """
    tables, shape = tiling.tables, tiling.shape
    pitch, pixels, kernel = shape.flat_pitch, shape.pixels, geometry.support.kernel
    assert pitch >= 8, "a step of a thread passes a row"
    assert line.image_pitch >= 4, "a step of a thread passes an image"
    assert shape.plane_pitch % 8 == 1, "banks"
    assert line.halo_h * 8 <= shape.plane_pitch, "halo in its plane"
    assert (line.load_h, line.load_w, line.halo_w, line.row_pitch, line.col_half) == (1, 1, 8, 8, 0)
    assert line.images >= batch, "one stack"
    assert line.tiles_w == 1, "one line"
    assert len(tables.heads) == 1, "one class"
    places = np.arange(line.tiles_h * pixels)
    places = places[written(line, pitch, places, batch)]
    assert len(places) == batch * line.pixels_h * line.pixels_w, "pixels written once"
    images, *own = pixels_at(line, pitch, places)
    ends = (line.base_h, line.base_w)
    extents = [-(-size // n) for size, n in zip(read, every, strict=True)]
    for tap, step in sorted(set(zip(tables.tap.tolist(), tiling.steps.tolist(), strict=True))):
        there, *found = pixels_at(line, pitch, places + step)
        same, meant, real = there == images, there < batch, there < batch
        for axis, k in enumerate(divmod(tap, kernel[1])):
            stride, dilation = geometry.stride[axis], geometry.dilation[axis]
            pad, store = geometry.pads[2 * axis], (line.store_h, line.store_w)[axis]
            first = (line.first_h, line.first_w)[axis]
            place = own[axis] * store + first
            wanted = place * stride - pad + k * dilation
            if back:
                wanted, rest = np.divmod(place + pad - k * dilation, stride)
                assert (rest == 0).all(), "a tap of another class"
            elif every[axis] > 1:
                wanted, rest = np.divmod(wanted, every[axis])
                assert (rest == 0).all(), "a pixel that is skipped"
            got = found[axis] + ends[axis]
            same = same & (got == wanted)
            meant = meant & (wanted >= 0) & (wanted < extents[axis])
            real = real & (got >= 0) & (got < extents[axis])
        assert (same | ~meant).all(), "another pixel than the tap's"
        assert (same | ~real).all(), "a pixel for padding"
    for index, block in enumerate(tables.blocks):
        where, steps = brought(line, pitch, block), tiling.steps[tables.block == index]
        assert block[UNREAD].min() >= 0, "borders"
        assert steps.min(initial=where.start) >= where.start, "places brought"
        assert steps.max(initial=0) + pixels <= where.stop, "places brought"
    rows, cols = np.arange(line.pixels_h), np.arange(line.pixels_w)
    return [rows * line.store_h + line.first_h, cols * line.store_w + line.first_w]
