# SPDX-License-Identifier: Apache-2.0
"""Geometry tables: where the tiles of fprop's kernel read and write, for fprop and for dgrad."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...masks import IntArray
from ..gpu.axes import Axis, Size


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
