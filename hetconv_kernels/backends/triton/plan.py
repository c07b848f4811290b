# SPDX-License-Identifier: Apache-2.0
"""Plan: a Support lowered for one tile shape of the Triton engine.

It cuts filters into segments and each segment's columns into steps, runs of channels at one tap,
whose weights form one packed slab. The CPU and CUDA engines lower a Support in ways of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError, mismatch
from ...masks import BoolArray, Int32Array, IntArray
from ...support import Support

__all__ = ["Block", "Plan"]

STEP = np.dtype([("dy", "i4"), ("dx", "i4"), ("channel", "i4"), ("count", "i4"), ("slab", "i8")])


@dataclass(frozen=True)
class Block:
    """The tile that a lowering aims at.

    Attributes:
        filters: filters that one segment computes together.
        channels: channels of one block; a run never crosses a block's border.
        align: runs start and end at multiples of this within their block, or with the last channel.
        gap: dead channels between two such runs at one tap that are covered, making them one.
    """

    filters: int
    channels: int
    align: int = 1
    gap: int = 0

    def __post_init__(self) -> None:
        if self.filters < 1 or self.channels < 1 or self.align < 1 or self.gap < 0:
            raise ArgumentError(mismatch("block", self, "positive sizes and a gap of at least 0"))
        if self.channels % self.align:
            raise ArgumentError(
                mismatch("align of a block", self.align, f"a divisor of channels={self.channels}")
            )


class Plan:
    """A Support lowered to segments and steps.

    Filters are taken in the order `rows` (groups together), channels in the order `cols` (channels
    with the same readers together), so that blocks come out dense. Segment s computes the filters
    ``rows[segments[s]:segments[s+1]]`` from the steps ``steps[starts[s]:starts[s+1]]``. A step
    reads the channels ``cols[channel:channel+count]`` at tap (dy, dx) and multiplies by the slab of
    count × block.filters weights that begins at ``slab``.

    Example: HetConv with two filters on four channels, p=2, for blocks of one filter and four
    channels. Each segment has nine steps: its own two channels at eight ring taps, and all four
    channels at the centre tap, 8·2 + 4 = 20 columns, the live weights of one filter:

        >>> plan = Plan(Support.het(4, 2, 3, p=2), Block(filters=1, channels=4))
        >>> plan.segments.tolist(), plan.starts.tolist()
        ([0, 1, 2], [0, 9, 18])
        >>> plan.steps[["dy", "dx", "channel", "count"]][3:6].tolist()
        [(1, 0, 0, 2), (1, 1, 0, 4), (1, 2, 0, 2)]
        >>> plan.slab_size, plan.efficiency
        (40, 1.0)

    Args:
        support: what to lower.
        block: the tile.
        reorder: whether channels may be reordered; where not, `cols` is their own order.

    Attributes:
        rows: filters in segment order.  # int [F]
        cols: channels in block order.  # int [C]
        segments: prefix offsets into rows.  # int [S + 1]
        starts: prefix offsets into steps.  # int [S + 1]
        steps: by segment, channel block, tap, then channel.  # STEP [number of steps]
        slab_size: packed weights of all steps together.
    """

    def __init__(self, support: Support, block: Block, reorder: bool = True) -> None:
        self.support, self.block = support, block
        groups = support.groups
        tap_masks = np.stack([g.mask for g in groups])
        in_order = np.arange(support.channels)
        self.cols: IntArray = _column_order(tap_masks) if reorder else in_order
        # Live columns of each group in block order.  # [groups, C, KH, KW]
        live = tap_masks[:, self.cols]
        pieces = [
            (g.filters[i : i + block.filters], live[index])
            for index, g in enumerate(groups)
            for i in range(0, len(g.filters), block.filters)
        ]
        pieces = self._merge(pieces)
        self.rows: IntArray = np.concatenate([filters for filters, _ in pieces])
        self.segments: IntArray = _prefix([len(filters) for filters, _ in pieces])
        segment, self.steps = self._runs(np.stack([mask for _, mask in pieces]))
        self.starts: IntArray = _prefix(np.bincount(segment, minlength=len(pieces)))
        slabs = _prefix(self.steps["count"].astype(np.int64) * block.filters)
        self.steps["slab"] = slabs[:-1]
        self.slab_size: int = int(slabs[-1])

    @cached_property
    def efficiency(self) -> float:
        """Useful multiply-accumulates over executed ones; a tile runs all its filter lanes."""
        align = self.block.align
        executed = int((-(-self.steps["count"].astype(np.int64) // align) * align).sum())
        return self.support.live / (executed * self.block.filters) if executed else 1.0

    @cached_property
    def owner(self) -> IntArray:
        """The segment of each step: the list for wgrad, one output slab a step.  # [steps]"""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @cached_property
    def slab_source(self) -> IntArray:
        """Where each packed weight comes from in the flat dense weight; -1 is a zero.

        # [slab_size]
        """
        _, c, kh, kw = self.support.shape
        # Every column of every step, and every filter that has it in its tile.
        step, offset = _expand(self.steps["count"])
        channel = self.cols[self.steps["channel"][step] + offset]
        tap = self.steps["dy"][step] * kw + self.steps["dx"][step]
        filters = self.padded_rows[self.owner[step]].astype(np.int64)
        position = filters * (c * kh * kw) + (channel * (kh * kw) + tap)[:, None]
        live = self.support.mask.reshape(-1)[position] & (filters >= 0)
        return np.where(live, position, -1).reshape(-1)

    @cached_property
    def padded_rows(self) -> Int32Array:
        """The filters of each segment, -1 after the last one.  # int32 [S, block.filters]"""
        sizes = np.diff(self.segments)
        rows = np.full((len(sizes), self.block.filters), -1, np.int32)
        rows[np.arange(self.block.filters) < sizes[:, None]] = self.rows
        return rows

    def __repr__(self) -> str:
        return (
            f"Plan({self.support!r}, {self.block}, segments={len(self.segments) - 1}, "
            f"steps={len(self.steps)}, efficiency={self.efficiency:.3g})"
        )

    def _merge(self, pieces: list[tuple[IntArray, BoolArray]]) -> list[tuple[IntArray, BoolArray]]:
        """Joins neighbouring pieces that fit in one tile where that executes no more columns."""
        piece, runs = self._runs(np.stack([mask for _, mask in pieces]))
        costs = np.bincount(piece, weights=runs["count"], minlength=len(pieces))
        merged, cost = [pieces[0]], costs[0]
        for (filters, mask), own_cost in zip(pieces[1:], costs[1:], strict=True):
            last_filters, last_mask = merged[-1]
            if len(last_filters) + len(filters) <= self.block.filters:
                union = last_mask | mask
                union_cost = self._runs(union[None])[1]["count"].sum()
                if union_cost <= cost + own_cost:
                    merged[-1] = (np.concatenate([last_filters, filters]), union)
                    cost = union_cost
                    continue
            merged.append((filters, mask))
            cost = own_cost
        return merged

    def _runs(self, masks: BoolArray) -> tuple[IntArray, npt.NDArray[np.void]]:
        """Lists the runs of each piece, by channel block, tap, then channel.

        Args:
            masks: live columns in block order.  # bool [pieces, C, KH, KW]

        Returns:
            The piece of each run, and the runs without their slabs.  # [runs], STEP [runs]
        """
        width = self.block.channels
        align, gap = self.block.align, self.block.gap
        pieces, channels, kh, kw = masks.shape
        blocks, taps, cells = -(-channels // width), kh * kw, width // align
        padded = np.zeros((pieces, blocks * width, taps), bool)
        padded[:, :channels] = masks.reshape(pieces, channels, taps)
        # A cell is `align` channels at one tap, a line the cells of a piece, channel block and tap.
        live = np.any(padded.reshape(pieces, blocks, cells, align, taps), axis=3)
        line, cell = np.divmod(np.flatnonzero(live.swapaxes(2, 3)), cells)
        begins = np.diff(line, prepend=-1) != 0
        begins |= (np.diff(cell, prepend=0) - 1) * align > gap
        first, last = cell[begins], cell[np.roll(begins, -1)]  # a run ends where the next begins
        piece, block, tap = np.unravel_index(line[begins], (pieces, blocks, taps))
        runs = np.zeros(len(first), STEP)
        runs["dy"], runs["dx"] = np.divmod(tap, kw)
        runs["channel"] = block * width + first * align
        end = np.minimum(block * width + (last + 1) * align, channels)
        runs["count"] = end - runs["channel"]
        return piece, runs


def _column_order(group_masks: BoolArray) -> IntArray:
    """Orders channels so that those with the same readers stand together.

    # bool [groups, C, KH, KW] -> int [C]
    """
    channels = group_masks.shape[1]
    readers = np.packbits(group_masks.transpose(1, 0, 2, 3).reshape(channels, -1), axis=1)
    # Channels follow the first one with their readers, so a blocked order stays as it is.
    first: dict[bytes, int] = {}
    key = [first.setdefault(row.tobytes(), channel) for channel, row in enumerate(readers)]
    return np.argsort(key, kind="stable")


def _prefix(sizes: npt.ArrayLike) -> IntArray:
    return np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])


def _expand(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Lists the items of consecutive lists: the list each is in, and its place there."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - _prefix(counts)[owner]
