# SPDX-License-Identifier: Apache-2.0
"""Geometry tables: where the tiles of the kernels read and write, with their fields by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...masks import IntArray
from ...problem import Geometry
from ..gpu.axes import Axis, Size

# Of a class of fprop and dgrad, and of wgrad; `fields` says what they mean.
GATHER_FIELDS = (
    "segments", "height", "width", "pixels", "load_h", "load_w", "base_h", "base_w", "tap_h",
    "tap_w", "image_h", "image_w", "x_n", "x_h", "x_w", "x_c", "store_h", "store_w", "first_h",
    "first_w", "y_n", "y_h", "y_w", "y_c", "channels", "taps", "lists",
)  # fmt: skip
WGRAD_FIELDS = (
    "height", "width", "pixels", "split", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h",
    "dilation_w", "image_h", "image_w", "x_n", "x_h", "x_w", "x_c", "y_n", "y_h", "y_w", "y_c",
    "channels", "filters", "partial", "first",
)  # fmt: skip
# A line for each class of fprop and dgrad, and the one line of wgrad.
GATHER_LINE = np.dtype([(name, np.int64) for name in GATHER_FIELDS])
WGRAD_LINE = np.dtype([(name, np.int64) for name in WGRAD_FIELDS])


def geometry_table(
    axes: Sequence[tuple[Axis, Axis]],
    batch: int,
    image: Size,
    segments: int,
    read: Sequence[int],
    written: Sequence[int],
    units: tuple[int, int],
    channels: int,
    lists: Sequence[int] | None = None,
) -> IntArray:
    """Makes the table of fprop's kernels, and of dgrad.

    Args:
        axes: of each class.
        batch: images.
        image: height and width of the operand that is read.
        segments: blocks of filters.
        read: strides of that operand, as torch gives them.
        written: strides of the result.
        units: what strides, channels and first filters are divided by, for each of the two.
        channels: of the operand that is read.
        lists: of boxes, where the lists of each class are found (see `borders`).

    Returns:
        One line for each class.  # int64 [classes, fields of GATHER_LINE]
    """
    table: Any = np.zeros(len(axes), GATHER_LINE)
    table["segments"] = segments
    table["image_h"], table["image_w"] = image
    table["channels"] = channels // units[0]
    _fill_strides(table, "x", read, units[0])
    _fill_strides(table, "y", written, units[1])
    for line, (rows, cols), place in zip(table, axes, lists or [0] * len(axes), strict=True):
        line["height"], line["width"] = max(rows.pixels, 1), max(cols.pixels, 1)
        line["pixels"] = batch * rows.pixels * cols.pixels
        line["taps"], line["lists"] = max(rows.taps, cols.taps), place
        for name in ("load", "base", "tap", "store", "first"):
            line[f"{name}_h"], line[f"{name}_w"] = getattr(rows, name), getattr(cols, name)
    lines: IntArray = table.view(np.int64).reshape(len(axes), -1)
    return lines


def wgrad_table(
    geometry: Geometry,
    image: Size,
    output: Size,
    batch: int,
    strides: tuple[Sequence[int], Sequence[int]],
    sizes: tuple[int, int],
    units: tuple[int, int],
    split: int,
    partials: tuple[int, int],
) -> IntArray:
    """Makes the table of wgrad's kernels.

    Args:
        geometry: of the layer.
        image: height and width of x.
        output: height and width of dy.
        batch: images.
        strides: of x and of dy, as torch gives them.
        sizes: channels of x, and filters of dy.
        units: what strides, channels and filters are divided by, for x and for dy.
        split: pixels of one split.
        partials: float32 values of one split, and those of them before this launch's.

    Returns:
        The fields of WGRAD_LINE.  # int64 [fields]
    """
    table: Any = np.zeros(1, WGRAD_LINE)
    table["height"], table["width"] = output
    table["pixels"], table["split"] = batch * output[0] * output[1], split
    table["stride_h"], table["stride_w"] = geometry.stride
    table["pad_h"], _, table["pad_w"], _ = geometry.pads
    table["dilation_h"], table["dilation_w"] = geometry.dilation
    table["image_h"], table["image_w"] = image
    _fill_strides(table, "x", strides[0], units[0])
    _fill_strides(table, "y", strides[1], units[1])
    table["channels"], table["filters"] = sizes[0] // units[0], sizes[1] // units[1]
    table["partial"], table["first"] = partials
    fields: IntArray = table.view(np.int64)
    return fields


def _fill_strides(table: Any, operand: str, strides: Sequence[int], unit: int) -> None:
    """Fills in an operand's strides, all but that of the channels in units."""
    n, c, h, w = strides
    for axis, stride in (("n", n // unit), ("c", c), ("h", h // unit), ("w", w // unit)):
        table[f"{operand}_{axis}"] = stride
