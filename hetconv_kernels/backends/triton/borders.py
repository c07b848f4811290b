# SPDX-License-Identifier: Apache-2.0
"""Step lists of boxes: a tile of pixels skips the taps that lie outside the image for all of them.

A box of several images at one pixel skips 18 % of the taps of a 3×3 layer at 7×7, and 9 % at 14×14;
a box that is wide enough skips none, and there is one list. Imports no Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...masks import Int32Array, IntArray
from ..gpu.axes import Axis, Size
from .lowering import Lowering
from .tiles import Box
from .words import Int64Array, box_words, tap_cols, tap_rows

Axes = Sequence[tuple[Axis, Axis]]
# Beyond so many words of all lists, or so many classes of dgrad, nothing is skipped.
MOST_WORDS, MOST_CLASSES = 2**20, 64


class Borders(NamedTuple):
    """The lists of steps that tiles of a box run.

    Example: one row of three pixels, a box of one pixel, three taps, pad 1. The first pixel has no
    left neighbour and the last no right one, so there are three lists, of the taps 1 and 2, 0 to 2,
    0 and 1:

        >>> from hetconv_kernels import Support
        >>> from hetconv_kernels.problem import make_geometry
        >>> from ..gpu.axes import fprop_axes
        >>> geometry = make_geometry(Support.dense(8, 8, (1, 3)), 1, (0, 1))
        >>> lowering = Lowering(geometry.support, 8, 8)
        >>> found = borders(lowering, fprop_axes(geometry, (1, 3)), (1, 3), Box(4, 1, 1))
        >>> found.starts.tolist(), found.places
        ([0, 2, 5, 7, 0, 0, 1, 2], [4])
        >>> tap_cols(found.words).tolist()
        [1, 2, 0, 1, 2, 0, 1, 0]

    Attributes:
        words: of the steps of all lists, with their slabs (see `words`); and a spare one.
        starts: first step of each segment of each list, and the end; then for each class the first
            list of each row of tiles, and what is added to it in each column of tiles.
        places: where in `starts` the rows of each class begin.
    """

    words: Int64Array
    starts: Int32Array
    places: list[int]


def borders(lowering: Lowering, axes: Axes, image: Size, box: Box) -> Borders:
    """Makes the lists of steps of the tiles of a box.

    Args:
        lowering: whose steps they are.
        axes: of each class.
        image: height and width of the operand that is read.
        box: the pixels of a tile.
    """
    segments, bounds = lowering.segments, lowering.starts.astype(np.int64)
    words: list[IntArray] = []
    counts: list[IntArray] = []
    tiles: list[list[IntArray]] = []
    for kind, (rows, cols) in enumerate(axes):
        heads = bounds[kind * segments : (kind + 1) * segments + 1]
        slabs = np.arange(heads[0], heads[-1])
        own = lowering.words[slabs]
        owner = np.repeat(np.arange(segments), np.diff(heads))
        kinds_h, of_row = _kinds(rows.seen(box.rows, image[0]))
        kinds_w, of_col = _kinds(cols.seen(box.cols, image[1]))
        if len(kinds_h) * len(kinds_w) * len(own) > MOST_WORDS or len(axes) > MOST_CLASSES:
            kinds_h, kinds_w = (np.ones((1, kinds.shape[1]), bool) for kinds in (kinds_h, kinds_w))
            of_row, of_col = np.zeros_like(of_row), np.zeros_like(of_col)
        tiles.append([len(counts) + of_row * len(kinds_w), of_col])
        for seen_h in kinds_h:
            for seen_w in kinds_w:
                live = seen_h[tap_rows(own)] & seen_w[tap_cols(own)]
                words.append(box_words(own, slabs)[live])
                counts.append(np.bincount(owner[live], minlength=segments))
    starts = np.append(0, np.cumsum(np.concatenate(counts)))
    sizes = [len(of_row) + len(of_col) for of_row, of_col in tiles]
    places = (len(starts) + np.cumsum([0, *sizes[:-1]])).tolist()
    whole = np.concatenate([starts, *(part for pair in tiles for part in pair)])
    return Borders(np.append(np.concatenate(words), 0), whole.astype(np.int32), places)


def steps_run(lowering: Lowering, axes: Axes, image: Size) -> Callable[[Box], int]:
    """Returns what counts the steps that all tiles of a box run for one block of images.

    Those of all segments and classes together; `borders` makes the lists. Of very many classes, as
    a huge stride makes them, the count is a bound.
    """
    if len(axes) > MOST_CLASSES:
        height, width = (max(pair[a].pixels for pair in axes) for a in (0, 1))
        return lambda box: lowering.steps * -(-height // box.rows) * -(-width // box.cols)
    taps = [_taps(lowering, kind, pair) for kind, pair in enumerate(axes)]
    seen: dict[Any, IntArray] = {}

    def often(axis: Axis, edge: int, size: int) -> IntArray:
        key = axis, edge, size
        if key not in seen:
            seen[key] = axis.seen(edge, size).sum(0)
        return seen[key]

    def count(box: Box) -> int:
        total = 0
        for steps, (rows, cols) in zip(taps, axes, strict=True):
            seen_h, seen_w = often(rows, box.rows, image[0]), often(cols, box.cols, image[1])
            total += int(seen_h @ steps @ seen_w)
        return total

    return count


def _taps(lowering: Lowering, kind: int, axes: tuple[Axis, Axis]) -> IntArray:
    """Counts the steps of each tap of a class.  # [tap rows, tap columns]"""
    first, last = lowering.starts[[kind * lowering.segments, (kind + 1) * lowering.segments]]
    words = lowering.words[first:last]
    found = np.zeros((axes[0].taps, axes[1].taps), np.int64)
    np.add.at(found, (tap_rows(words), tap_cols(words)), 1)
    return found


def _kinds(seen: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], IntArray]:
    """Returns the different lines of a table, and which of them each line is."""
    if not len(seen):
        return np.ones((1, seen.shape[1]), bool), np.zeros(0, np.int64)
    changes = np.append(True, (seen[1:] != seen[:-1]).any(axis=1))
    return seen[changes], np.cumsum(changes) - 1
