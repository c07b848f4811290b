# SPDX-License-Identifier: Apache-2.0
"""Windows: the pixels that a tile of fprop or dgrad reads, its halo, and where they are kept.

dgrad has one class of pixels for each residue of the stride, each a stride-1 gather of dy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...problem import Geometry
from ..gpu.axes import Axis, dgrad_axes, dgrad_classes, fprop_axes


class Tap(NamedTuple):
    """A tap within a class: its place in the kernel and in the halo.

    Attributes:
        ky: row in the kernel.
        kx: column in the kernel.
        row: of the halo, for the tile's first pixel.
        col: the same along the columns.
    """

    ky: int
    kx: int
    row: int
    col: int


class Window(NamedTuple):
    """What one class of pixels reads and writes.

    Attributes:
        rows: along the rows, as in `Axis`.
        cols: along the columns.
        taps: of the class, row by row.
    """

    rows: Axis
    cols: Axis
    taps: tuple[Tap, ...]

    def halo(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size of the halo tile for a tile of height × width pixels."""
        (_, reach_h), (_, reach_w) = _ends(self.rows), _ends(self.cols)
        return (height - 1) * self.rows.load + reach_h + 1, (
            width - 1
        ) * self.cols.load + reach_w + 1

    def line(self, width: int) -> int:
        """Returns the pixels in shared memory of one halo row.

        Its columns stand by residue of the stride, so that adjacent outputs read adjacent pixels.
        """
        load = self.cols.load
        return -(-self.halo(1, width)[1] // load) * load

    def place(self, tap: Tap, width: int) -> int:
        """Returns the pixel in shared memory that the tile's first pixel reads at a tap."""
        line, load = self.line(width), self.cols.load
        return tap.row * line + tap.col % load * (line // load) + tap.col // load

    def unread(self, taps: Sequence[Tap]) -> tuple[int, int, int, int]:
        """Counts what none of these taps reads of a halo: rows above and below, columns beside.

        Example: the tap in the middle of 3 × 3 needs nothing around the tile:

            >>> from hetconv_kernels import Support
            >>> from hetconv_kernels.problem import make_geometry
            >>> (window,) = windows(make_geometry(Support.dense(8, 8, 3), 1, 1), (56, 56), False)
            >>> window.unread(window.taps[4:5]), window.unread(window.taps[:4])
            ((1, 1, 1, 1), (0, 1, 0, 0))
        """
        found: list[int] = []
        for places, size in zip(
            ([tap.row for tap in taps], [tap.col for tap in taps]), self.halo(1, 1), strict=True
        ):
            found += [min(places), size - 1 - max(places)]
        return found[0], found[1], found[2], found[3]

    def fields(self, height: int, width: int) -> dict[str, int]:
        """Lists the fields of a line of ``classes`` in narrow.h, in the order of `NarrowClass`."""
        rows, cols = self.rows, self.cols
        halo_h, halo_w = self.halo(height, width)
        return {
            "PIXELS_H": rows.pixels,
            "PIXELS_W": cols.pixels,
            "TILES_H": -(-rows.pixels // height),
            "TILES_W": -(-cols.pixels // width),
            "LOAD_H": rows.load,
            "LOAD_W": cols.load,
            "BASE_H": rows.base + _ends(rows)[0],
            "BASE_W": cols.base + _ends(cols)[0],
            "HALO_H": halo_h,
            "HALO_W": halo_w,
            "STORE_H": rows.store,
            "STORE_W": cols.store,
            "FIRST_H": rows.first,
            "FIRST_W": cols.first,
        }


def windows(geometry: Geometry, size: tuple[int, int], back: bool) -> list[Window]:
    """Lists the classes of fprop (one) or dgrad, for an input of `size` pixels.

    Example: 3×3 taps and padding 1. A tile of 8×16 pixels reads a halo of 10×18:

        >>> from hetconv_kernels import Support
        >>> from hetconv_kernels.problem import make_geometry
        >>> (window,) = windows(make_geometry(Support.dense(8, 8, 3), 1, 1), (56, 56), False)
        >>> window.halo(8, 16), window.taps[5]
        ((10, 18), Tap(ky=1, kx=2, row=1, col=2))
    """
    own: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]
    if back:
        rows, cols = dgrad_classes(geometry)
        own, axes = ([r.taps for r in rows], [r.taps for r in cols]), dgrad_axes(geometry, size)
    else:
        kh, kw = geometry.support.kernel
        own, axes = ([range(kh)], [range(kw)]), fprop_axes(geometry, size)
    found = []
    for index, (along_h, along_w) in enumerate(axes):
        first, second = divmod(index, len(own[1]))
        low_h, low_w = _ends(along_h)[0], _ends(along_w)[0]
        taps = tuple(
            Tap(ky, kx, i * along_h.tap - low_h, j * along_w.tap - low_w)
            for i, ky in enumerate(own[0][first])
            for j, kx in enumerate(own[1][second])
        )
        found.append(Window(along_h, along_w, taps))
    return found


def _ends(axis: Axis) -> tuple[int, int]:
    """Returns the offset of the first tap in the image, and the distance to the last one."""
    reach = max(axis.taps - 1, 0) * axis.tap
    return min(reach, 0), abs(reach)
