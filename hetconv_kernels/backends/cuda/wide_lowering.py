# SPDX-License-Identifier: Apache-2.0
"""Lowering for wide groups: a Support as the tables that ``csrc/cuda/wide.h`` reads.

Filters come in *runs* of eight that follow each other in memory, eight runs make a *segment* of 64,
the rows of one matrix instruction, and two segments a *pair*, one for each warpgroup of a block of
threads. Channels come in *chunks* of eight, and eight chunks that a pair needs make a *block* whose
halo is brought to shared memory once. A *step* is one segment, one block and one tap: 64 × 64
weights, of which dead ones are zeros. Runs and chunks stand together so that steps are few.

Example: HetConv with p=2 on 128 channels and filters has two segments. Each takes all nine taps of
its own 64 channels, and the centre of the others: of two blocks, one has 9 and 1 steps for the two
warpgroups, the other 1 and 9:

    >>> from hetconv_kernels import Support
    >>> from hetconv_kernels.backends.cuda.fields import STEP_COUNTS
    >>> from hetconv_kernels.problem import make_geometry
    >>> s = Support.het(128, 128, 3, p=2)
    >>> tables = lower_wide(s, wide_windows(make_geometry(s, 1, 1), (28, 28), False)[0])
    >>> tables.rows[0, :, 0].tolist(), tables.blocks[:, STEP_COUNTS].tolist()
    ([0, 64], [[9, 1], [1, 9]])

dgrad is the same on the transposed Support, one class of pixels for each residue of the stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...errors import ArgumentError, BackendError, mismatch
from ...masks import BoolArray, Int32Array, IntArray
from ...problem import Geometry
from ...support import Support
from ..gpu.places import memory_places
from .eights import EIGHT, cluster_by_eight
from .fields import CHUNKS, UNREAD, WideBlock, WideHead, WideSteps, table_line
from .windows import Window, windows

# As in wide.h.
COLUMNS, SLAB, WARPGROUPS = 8, 64 * 64, 2
_MOST_STEPS = (2**31 - 1) // SLAB
# What bringing a block's halo to shared memory costs, in steps of one segment: L2 takes as long as
# two, the warps that bring it as long as one or two. By arithmetic, not measured.
_HALO_STEPS = 2.0
# Steps whose packed weights are listed at a time.
_LISTED = 256


@dataclass(frozen=True)
class WideTables:
    """The tables of one call, in the layout of wide.h, all but the classes' lines.

    Attributes:
        heads: first block and count of a class and pair.  # int32 [classes, pairs, 2]
        blocks: channel / 8 of eight chunks, -1 for none; then first step and count of each of the
            two warpgroups; then rows and columns of the halo that no step reads, at the top, at the
            bottom, on the left and on the right.  # int32 [blocks, 16]
        steps: the pixel of the halo that the tile's first pixel reads.  # int32 [steps]
        rows: the first filter of each run, -1 for none.  # int32 [pairs, 2, 8]
        segment: whose step it is, counting through `rows`.  # int [steps]
        block: on which block.  # int [steps]
        tap: the flat tap in the kernel.  # int [steps]
        back: whether these are dgrad's.
    """

    heads: Int32Array
    blocks: Int32Array
    steps: Int32Array
    rows: Int32Array
    segment: IntArray
    block: IntArray
    tap: IntArray
    back: bool

    @property
    def size(self) -> int:
        """Elements of the packed weights."""
        return len(self.steps) * SLAB

    def positions(self, support: Support) -> IntArray:
        """Lists the flat dense position of each packed weight, -1 for a zero.

        In a step: [channel / 8 of the block][filter / 8][filter % 8][channel % 8].

        # int64 [steps * 4096]
        """
        mask = oriented(support, self.back)
        found = np.empty((len(self.steps), SLAB), np.int64)
        for begin in range(0, len(self.steps), _LISTED):
            found[begin : begin + _LISTED] = self._listed(slice(begin, begin + _LISTED), mask)
        return found.reshape(-1)

    def source(self, support: Support, form: str) -> Int32Array:
        """Lists where each packed weight lies in the memory of the canonical weight; -1 is a zero.

        Args:
            support: the layer's own, for dgrad too.
            form: ``"contiguous"`` or ``"channels_last"`` for a dense weight, or ``"live"``.
        """
        return memory_places(self.positions(support), support, form)

    def _listed(self, own: slice, mask: BoolArray) -> IntArray:
        run = self.rows.reshape(-1, EIGHT)[self.segment[own]].astype(np.int64)
        chunk = self.blocks[self.block[own], CHUNKS].astype(np.int64)
        tap, within = self.tap[own].reshape(-1, 1, 1, 1, 1), np.arange(EIGHT)
        f = run[:, None, :, None, None] + within[:, None]
        c = chunk[:, :, None, None, None] * EIGHT + within
        filters, channels = mask.shape[:2]
        known = (run >= 0)[:, None, :, None, None] & (chunk >= 0)[:, :, None, None, None]
        known = known & mask.reshape(filters, channels, -1)[f, c, tap]  # where known
        flat = c * filters + f if self.back else f * channels + c
        found: IntArray = np.where(known, flat * mask[0, 0].size + tap, -1).reshape(-1, SLAB)
        return found


def oriented(support: Support, back: bool) -> BoolArray:
    """Returns the mask with what is written first.  # bool [filters, channels, KH, KW]"""
    return support.mask.transpose(1, 0, 2, 3) if back else support.mask


def wide_windows(
    geometry: Geometry, size: tuple[int, int], back: bool
) -> tuple[list[Window], tuple[int, int]]:
    """Lists the classes of fprop (one) or dgrad, and the pixels that are skipped.

    Where a kernel with one tap along an axis strides, only every stride-th pixel is ever read: they
    are an image of their own, and the stride is 1 there.

    Args:
        geometry: the layer.
        size: of x, in pixels.
        back: whether for dgrad.

    Returns:
        The classes; and which rows and columns the operand that is read is taken at: each n-th.

    Raises:
        BackendError: columns are read further than two apart.
    """
    found, every = windows(geometry, size, back), [1, 1]
    if not back:
        (window,) = found
        axes = [window.rows, window.cols]
        for index, axis in enumerate(axes):
            if axis.taps == 1 and axis.load > 1 and axis.base % axis.load == 0:
                every[index] = axis.load
                axes[index] = axis._replace(load=1, base=axis.base // axis.load)
        found = [window._replace(rows=axes[0], cols=axes[1])]
    furthest = max(max(window.rows.load, window.cols.load) for window in found)
    if furthest > 2:
        raise BackendError(
            mismatch("stride of wide groups", furthest, "1 or 2", "Use backend='triton'.")
        )
    return found, (every[0], every[1])


def lower_wide(support: Support, classes: Sequence[Window], back: bool = False) -> WideTables:
    """Lowers a Support to the tables of fprop or dgrad.

    Args:
        support: the layer's own.
        classes: the classes of pixels.
        back: whether to lower dgrad: filters and channels change places.

    Raises:
        ArgumentError: the channels that are read or the filters that are written are no multiple
            of 8.
        BackendError: there are too many steps.
    """
    mask = oriented(support, back)
    for name, count in (("filters", support.filters), ("channels", support.channels)):
        if count % EIGHT:
            raise ArgumentError(mismatch(name, count, f"a multiple of {EIGHT}", 'backend="triton"'))
    runs, chunks = mask.shape[0] // EIGHT, mask.shape[1] // EIGHT
    # Which runs read which chunks at which taps.
    live = np.any(mask.reshape(runs, EIGHT, chunks, EIGHT, -1), axis=(1, 3))
    segments = cluster_by_eight(live, segment_cost)
    needs = np.stack([live[members].any(axis=0) for members in segments])
    pairs = _paired(needs)
    builder = _Builder(mask.shape[3])
    for window in classes:
        for one, other in pairs:
            both = np.stack([needs[one], needs[other] if other >= 0 else np.zeros_like(needs[one])])
            builder.add(window, both)
    rows = np.full((len(pairs), 2, EIGHT), -1, np.int32)
    for index, pair in enumerate(pairs):
        for side, segment in enumerate(pair):
            if segment >= 0:
                members = segments[segment]
                rows[index, side, : len(members)] = members * EIGHT
    return builder.finish(len(classes), rows, back)


def eight(members: IntArray) -> list[int]:
    """Lists at most eight, and -1 for each that is missing."""
    return [*members.tolist(), *[-1] * (EIGHT - len(members))]


def segment_cost(needs: BoolArray) -> np.ndarray:
    """Counts the steps of segments, were their chunks in the best blocks.

    # bool [segments, chunks, taps] -> float [segments]
    """
    counts = np.ceil(needs.sum(axis=1) / EIGHT).sum(axis=1)
    found: np.ndarray = counts.astype(np.float64)
    return found


def _block_cost(needs: BoolArray) -> np.ndarray:
    """Counts the steps of blocks, and what their halos cost.

    # bool [blocks, 2, taps] -> float [blocks]
    """
    found: np.ndarray = needs.sum(axis=(1, 2)) + _HALO_STEPS
    return found


def _paired(needs: BoolArray) -> list[tuple[int, int]]:
    """Pairs segments that share chunks, and among such those with as many steps; -1 is none.

    # bool [segments, chunks, taps]
    """
    steps, chunks = segment_cost(needs), np.any(needs, axis=2)
    left = list(np.argsort(-steps, kind="stable"))
    found = []
    while left:
        one = int(left.pop(0))
        if not left:
            found.append((one, -1))
            break
        shared = (chunks[left] & chunks[one]).sum(axis=1)
        apart = np.abs(steps[left] - steps[one])
        # Among equals the segment that comes next, which is written beside this one.
        order = np.lexsort((np.array(left), apart, -shared))
        other = int(left.pop(int(order[0])))
        found.append((min(one, other), max(one, other)))
    return sorted(found, key=lambda pair: pair[0])


class _Step(NamedTuple):
    """What `WideTables` has of a step, its segment counted through all classes."""

    place: int
    segment: int
    block: int
    tap: int


class _Builder:
    """Collects blocks and steps, class by class and pair by pair."""

    def __init__(self, width: int) -> None:
        self._width = width  # of the kernel
        self._heads: list[list[int]] = []
        self._blocks: list[list[int]] = []
        self._steps: list[_Step] = []

    def add(self, window: Window, needs: BoolArray) -> None:
        """Adds one class of one pair; `needs` has the chunks and all taps of its two segments."""
        flat = [tap.ky * self._width + tap.kx for tap in window.taps]
        own = needs[:, :, flat].transpose(1, 0, 2)  # [chunks, 2, taps of the class]
        # One halo for what both read; or, where what either reads alone would then fill blocks
        # badly, blocks of each warpgroup, some chunks being brought twice.
        alone = np.zeros((2, *own.shape), bool)
        alone[0, :, 0], alone[1, :, 1] = own[:, 0], own[:, 1]
        shared, apart = _blocks_of(own), [block for one in alone for block in _blocks_of(one)]
        costs = [sum(_cost(needs) for _, needs in way) for way in (shared, apart)]
        blocks = apart if costs[1] < costs[0] else shared
        pair = len(self._heads)
        self._heads.append(
            table_line(WideHead, BLOCK_BEGIN=len(self._blocks), BLOCK_COUNT=len(blocks))
        )
        for nth in _in_turn([needs for _, needs in blocks]):
            members, together = blocks[nth]
            unread = window.unread([window.taps[i] for i in np.flatnonzero(together.any(axis=0))])
            steps: list[int] = []
            for side in range(WARPGROUPS):
                taps = np.flatnonzero(together[side])
                steps += table_line(WideSteps, STEP_BEGIN=len(self._steps), STEP_COUNT=len(taps))
                segment = WARPGROUPS * pair + side
                for index in taps:
                    place = window.place(window.taps[index], COLUMNS)
                    self._steps.append(_Step(place, segment, len(self._blocks), flat[index]))
            self._blocks.append(
                table_line(WideBlock, CHUNK=eight(members), STEPS=steps, UNREAD=unread)
            )

    def finish(self, classes: int, rows: Int32Array, back: bool) -> WideTables:
        """Makes the tables.

        Raises:
            BackendError: there are too many steps.
        """
        if len(self._steps) > _MOST_STEPS:
            raise BackendError(
                mismatch("steps of wide groups", len(self._steps), f"at most {_MOST_STEPS}")
            )
        steps = np.array(self._steps, np.int64).reshape(-1, len(_Step._fields))
        place, segment, block, tap = steps.T
        return WideTables(
            heads=np.array(self._heads, np.int32).reshape(classes, len(rows), len(WideHead)),
            blocks=np.array(self._blocks, np.int32).reshape(-1, UNREAD.stop),
            steps=place.astype(np.int32),
            rows=rows,
            segment=segment % (WARPGROUPS * len(rows)),
            block=block,
            tap=tap,
            back=back,
        )


def _blocks_of(needs: BoolArray) -> list[tuple[IntArray, BoolArray]]:
    """Puts chunks into blocks; returns each with the taps that its warpgroups need.

    # bool [chunks, 2, taps] -> int [up to 8], bool [2, taps]
    """
    read = np.flatnonzero(needs.any(axis=(1, 2)))
    sets = [read[members] for members in cluster_by_eight(needs[read], _block_cost)]
    return [(members, np.any(needs[members], axis=0)) for members in sets]


def _cost(needs: BoolArray) -> float:
    return float(_block_cost(needs[None])[0])


def _in_turn(needs: Sequence[BoolArray]) -> list[int]:
    """Orders blocks so that long and short ones alternate, and neither warpgroup falls behind.

    While a long block is computed the next halo arrives; after two short ones it would be waited
    for.
    """
    steps = np.array([need.sum(axis=1) for need in needs], np.int64).reshape(-1, 2)
    found: list[int] = []
    left, ahead = list(range(len(needs))), 0
    while left:
        totals = steps[left].sum(axis=1)
        wanted = totals.max() if len(found) % 2 == 0 else totals.min()
        fitting = [index for index, size in zip(left, totals, strict=True) if size == wanted]
        best = min(fitting, key=lambda i: abs(ahead + int(steps[i, 0] - steps[i, 1])))
        ahead += int(steps[best, 0] - steps[best, 1])
        left.remove(best)
        found.append(best)
    return found
