# SPDX-License-Identifier: Apache-2.0
"""Geometry tables: where the tiles of fprop's kernel read and write, for fprop and for dgrad.

dgrad is fprop's kernel on the transposed Support. Each residue class of the stride (see `lowering`)
is a stride-1 gather of dy whose pixels are written `stride` apart; one launch runs all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...masks import IntArray
from ...problem import Geometry, Problem
from .lowering import Residue, residues

Size = tuple[int, int]


class Axis(NamedTuple):
    """What one class reads and writes along one axis.

    Pixel i of the class reads place ``base + i * load + k * tap`` for its tap k, and is written to
    place ``first + i * store``.

    Attributes:
        pixels: of the class, along this axis.
        load: see above.
        base: see above.
        tap: see above.
        store: see above.
        first: see above.
        taps: how many the class has.
    """

    pixels: int
    load: int
    base: int
    tap: int
    store: int
    first: int
    taps: int

    def leaves(self, image: int) -> bool:
        """Tells whether a tap of some pixel lies outside an image of that many places."""
        if not self.pixels or not self.taps:
            return False
        reach = (self.taps - 1) * self.tap
        low = self.base + min(0, reach)
        high = self.base + (self.pixels - 1) * self.load + max(0, reach)
        return low < 0 or high >= image

    def seen(self, edge: int, image: int) -> npt.NDArray[np.bool_]:
        """Tells which taps may read inside an image of that many places, for tiles of pixels.

        Args:
            edge: pixels of a tile; the last one may have fewer.
            image: places.

        Returns:
            False where no pixel of a tile has that tap inside.  # bool [tiles, taps]
        """
        first = np.arange(0, self.pixels, edge)[:, None]
        last = np.minimum(first + edge, self.pixels) - 1
        shift = self.base + self.tap * np.arange(self.taps)
        inside: npt.NDArray[np.bool_] = first * self.load + shift < image
        return inside & (last * self.load + shift >= 0)


def fprop_axes(geometry: Geometry, size: Size) -> list[tuple[Axis, Axis]]:
    """Lists the one class of fprop, for an input of `size` pixels."""
    out = geometry.output_size(*size)
    pads = geometry.pads[0], geometry.pads[2]
    rows, cols = (
        Axis(out[a], geometry.stride[a], -pads[a], geometry.dilation[a], 1, 0, taps)
        for a, taps in enumerate(geometry.support.kernel)
    )
    return [(rows, cols)]


def dgrad_classes(geometry: Geometry) -> tuple[list[Residue], list[Residue]]:
    """Sorts the taps into the residue classes of rows and of columns."""
    rows, cols = (
        residues(taps, stride, dilation)
        for taps, stride, dilation in zip(
            geometry.support.kernel, geometry.stride, geometry.dilation, strict=True
        )
    )
    return rows, cols


def dgrad_axes(geometry: Geometry, size: Size) -> list[tuple[Axis, Axis]]:
    """Lists the classes of dgrad, for an input of `size` pixels.

    Example: four rows, three taps, pad 1, stride 2. Class 0 is rows 1 and 3 (row + pad even), whose
    taps 0 and 2 read the rows 1 and 2, and 0 and 1, of dy; class 1 is rows 0 and 2 with one tap:

        >>> from hetconv_kernels import Support
        >>> from hetconv_kernels.problem import make_geometry
        >>> classes = dgrad_axes(make_geometry(Support.dense(1, 1, 3), 2, 1), (4, 4))
        >>> classes[0][0]
        Axis(pixels=2, load=1, base=1, tap=-1, store=2, first=1, taps=2)
        >>> classes[3][0]
        Axis(pixels=2, load=1, base=0, tap=-1, store=2, first=0, taps=1)
    """
    pads = geometry.pads[0], geometry.pads[2]
    axes: list[list[Axis]] = []
    for a, classes in enumerate(dgrad_classes(geometry)):
        stride = geometry.stride[a]
        found = []
        for r, residue in enumerate(classes):
            first = (r - pads[a]) % stride
            pixels = max(0, -(-(size[a] - first) // stride))
            base = (first + pads[a]) // stride - residue.offset
            found.append(Axis(pixels, 1, base, -residue.step, stride, first, len(residue.taps)))
        axes.append(found)
    return [(rows, cols) for rows in axes[0] for cols in axes[1]]


def axes_of(problem: Problem) -> tuple[list[tuple[Axis, Axis]], Size]:
    """Returns the classes of fprop or dgrad, and height and width of the operand that is read."""
    size = problem.height, problem.width
    if problem.verb == "dgrad":
        return dgrad_axes(problem.geometry, size), problem.output_size
    return fprop_axes(problem.geometry, size), size


def geometry_table(
    axes: Sequence[tuple[Axis, Axis]],
    batch: int,
    image: Size,
    segments: int,
    read: Sequence[int],
    written: Sequence[int],
    units: tuple[int, int],
    channels: int,
    filters: int,
    lists: Sequence[int] | None = None,
) -> IntArray:
    """Makes the table that the kernel reads (see `fprop.FIELDS`).

    Args:
        axes: of each class.
        batch: images.
        image: height and width of the operand that is read.
        segments: blocks of filters.
        read: strides of that operand, as torch gives them.
        written: strides of the result.
        units: what strides, channels and first filters are divided by, for each of the two.
        channels: of the operand that is read.
        filters: of the result.
        lists: of boxes, where the lists of each class are found (see `borders`).

    Returns:
        One line for each class.  # int64 [classes, fields]
    """
    (x_n, x_c, x_h, x_w), (y_n, y_c, y_h, y_w) = read, written
    x_unit, y_unit = units
    lines = []
    for (rows, cols), place in zip(axes, lists or [0] * len(axes), strict=True):
        pixels = batch * rows.pixels * cols.pixels
        lines.append(
            [
                segments,
                max(rows.pixels, 1),
                max(cols.pixels, 1),
                pixels,
                rows.load,
                cols.load,
                rows.base,
                cols.base,
                rows.tap,
                cols.tap,
                *image,
                x_n // x_unit,
                x_h // x_unit,
                x_w // x_unit,
                x_c,
                rows.store,
                cols.store,
                rows.first,
                cols.first,
                y_n // y_unit,
                y_h // y_unit,
                y_w // y_unit,
                y_c,
                channels // x_unit,
                max(rows.taps, cols.taps),
                filters,
                place,
            ]
        )
    return np.array(lines, np.int64)
