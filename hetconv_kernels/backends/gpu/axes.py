# SPDX-License-Identifier: Apache-2.0
"""Axes: which places the pixels and taps of fprop and of dgrad read and write, by rows and columns.

dgrad is fprop on the transposed Support. At a stride its pixels fall into residue classes: row i of
dx meets tap k only where (i + pad − d·k) mod stride = 0, so class r has the taps with
d·k mod stride = r, and within it dx is a stride-1 gather of dy whose pixels are written ``stride``
apart; one launch runs all classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...problem import Geometry, Problem

Size = tuple[int, int]


class Residue(NamedTuple):
    """The taps of one residue class along one axis.

    Example: three taps at stride 2 and dilation 1. Class 0 has taps 0 and 2, which read dy at the
    pixel's own place and one before it; class 1 has tap 1:

        >>> residues(3, 2, 1)
        [Residue(taps=(0, 2), offset=0, step=1), Residue(taps=(1,), offset=0, step=1)]

    Attributes:
        taps: ascending.
        offset: pixel q of the class reads dy at q − offset for its first tap,
        step: and that much earlier for each further one.
    """

    taps: tuple[int, ...]
    offset: int
    step: int


def residues(taps: int, stride: int, dilation: int) -> list[Residue]:
    """Sorts the taps of one axis into the classes of dgrad, one for each residue of the stride."""
    step = dilation // int(np.gcd(stride, dilation))
    classes = []
    for r in range(stride):
        own = tuple(k for k in range(taps) if k * dilation % stride == r)
        classes.append(Residue(own, own[0] * dilation // stride if own else 0, step))
    return classes


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
