# SPDX-License-Identifier: Apache-2.0
"""Plan: a Support lowered for one tile shape, and Columns: a Support lowered weight by weight.

Two encodings serve every engine. The *block* encoding, `Plan`, cuts filters into segments and each
segment's columns into steps, runs of channels at one tap, whose weights form one packed slab. The
*element* encoding, `Columns`, lists the columns of each filter; irregular masks use it, since block
lists would be larger than their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError, mismatch
from .masks import BoolArray, IntArray
from .support import Support

STEP = np.dtype([("dy", "i4"), ("dx", "i4"), ("channel", "i4"), ("count", "i4"), ("slab", "i8")])
TRANSPOSED_STEP = np.dtype([*((name, STEP[name]) for name in STEP.names or ()), ("segment", "i4")])


@dataclass(frozen=True)
class Block:
    """The tile that a lowering aims at.

    Attributes:
        filters: filters that one segment computes together.
        channels: channels of one block; a run never crosses a block's border.
        align: runs start and end at multiples of this within their block.
        gap: dead channels between two live ones that a run may cover rather than break.
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
        strict: forbids merging groups and covering gaps: a filter then never sees a channel that
            it does not read, whatever non-finite value stands there.

    Attributes:
        rows: filters in segment order.  # int [F]
        cols: channels in block order.  # int [C]
        segments: prefix offsets into rows.  # int [S + 1]
        starts: prefix offsets into steps.  # int [S + 1]
        steps: by segment, channel block, then tap.  # STEP [number of steps]
    """

    def __init__(self, support: Support, block: Block, strict: bool = False) -> None:
        self.support, self.block, self.strict = support, block, strict
        groups = support.groups
        tap_masks = np.stack([g.mask for g in groups])
        self.cols: IntArray = _column_order(tap_masks)
        # Live columns of each group in block order.  # [groups, C, KH, KW]
        live = tap_masks[:, self.cols]
        pieces = [
            (g.filters[i : i + block.filters], live[index])
            for index, g in enumerate(groups)
            for i in range(0, len(g.filters), block.filters)
        ]
        if not strict:
            pieces = self._merge(pieces)
        self.rows: IntArray = np.concatenate([filters for filters, _ in pieces])
        self.segments: IntArray = _prefix([len(filters) for filters, _ in pieces])
        runs = [self._runs(mask) for _, mask in pieces]
        self.starts: IntArray = _prefix([len(r) for r in runs])
        self.steps: npt.NDArray[np.void] = np.zeros(self.starts[-1], STEP)
        for field, column in zip(("dy", "dx", "channel", "count"), range(4), strict=True):
            self.steps[field] = [run[column] for segment in runs for run in segment]
        sizes = _prefix((self.steps["count"].astype(np.int64) * block.filters).tolist())
        self.steps["slab"] = sizes[:-1]
        self.slab_size: int = int(sizes[-1])

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
    def transposed(self) -> tuple[IntArray, npt.NDArray[np.void]]:
        """The same slabs by channel block, for dgrad.

        Returns:
            Prefix offsets by channel block [blocks + 1], and the steps in that order with the
            segment that owns each slab.
        """
        by_block = self.steps["channel"] // self.block.channels
        order = np.lexsort((np.arange(len(by_block)), by_block))
        steps = np.zeros(len(order), TRANSPOSED_STEP)
        for name in STEP.names or ():
            steps[name] = self.steps[name][order]
        steps["segment"] = self.owner[order]
        blocks = -(-self.support.channels // self.block.channels)
        counts = np.bincount(by_block, minlength=blocks)
        return _prefix(counts.tolist()), steps

    @cached_property
    def slab_source(self) -> IntArray:
        """Where each packed weight comes from in the flat dense weight; -1 is a zero.

        # [slab_size]
        """
        f, c, kh, kw = self.support.shape
        position = np.where(self.support.mask, np.arange(f * c * kh * kw).reshape(f, c, kh, kw), -1)
        source = np.full(self.slab_size, -1, np.int64)
        for segment, step in zip(self.owner, self.steps, strict=True):
            filters = self.rows[self.segments[segment] : self.segments[segment + 1]]
            channels = self.cols[step["channel"] : step["channel"] + step["count"]]
            slab = np.full((len(channels), self.block.filters), -1, np.int64)
            slab[:, : len(filters)] = position[filters][:, channels, step["dy"], step["dx"]].T
            source[step["slab"] : step["slab"] + slab.size] = slab.ravel()
        return source

    def __repr__(self) -> str:
        return (
            f"Plan({self.support!r}, {self.block}, segments={len(self.segments) - 1}, "
            f"steps={len(self.steps)}, efficiency={self.efficiency:.3g})"
        )

    def _merge(self, pieces: list[tuple[IntArray, BoolArray]]) -> list[tuple[IntArray, BoolArray]]:
        """Joins neighbouring pieces that fit in one tile where that executes no more columns."""
        merged = [pieces[0]]
        cost = self._cost(pieces[0][1])
        for filters, mask in pieces[1:]:
            last_filters, last_mask = merged[-1]
            union, own_cost = last_mask | mask, self._cost(mask)
            fits = len(last_filters) + len(filters) <= self.block.filters
            if fits and (union_cost := self._cost(union)) <= cost + own_cost:
                merged[-1] = (np.concatenate([last_filters, filters]), union)
                cost = union_cost
            else:
                merged.append((filters, mask))
                cost = own_cost
        return merged

    def _cost(self, mask: BoolArray) -> int:
        return sum(run[3] for run in self._runs(mask))

    def _runs(self, mask: BoolArray) -> list[tuple[int, int, int, int]]:
        """Lists (dy, dx, first channel, count) for the live columns, by channel block, then tap."""
        width, gap = self.block.channels, 0 if self.strict else self.block.gap
        align = 1 if self.strict else self.block.align
        runs = []
        for low in range(0, mask.shape[0], width):
            block = mask[low : low + width]
            for dy, dx in np.argwhere(block.any(0)):
                live = np.flatnonzero(block[:, dy, dx])
                breaks = np.flatnonzero(np.diff(live) > gap + 1) + 1
                first = live[np.concatenate([[0], breaks])] // align * align
                last = live[np.concatenate([breaks - 1, [-1]])] // align * align + align
                last = np.minimum(last, len(block))
                keep = np.concatenate([[True], first[1:] >= last[:-1]])
                ends = last[np.concatenate([np.flatnonzero(keep)[1:] - 1, [len(keep) - 1]])]
                runs += [
                    (int(dy), int(dx), low + int(a), int(b - a))
                    for a, b in zip(first[keep], ends, strict=True)
                ]
        return runs


class Columns(NamedTuple):
    """The columns of each filter, in the order of the live vector.

    Filter f multiplies ``live[starts[f]:starts[f+1]]`` with its columns (channel, tap), tap being
    ky·KW + kx. The transposed list gives dgrad the same weights by channel.

    Attributes:
        starts: prefix offsets by filter.  # int [F + 1]
        channel: of each live weight.  # int [live]
        tap: of each live weight.  # int [live]
        channel_starts: prefix offsets by channel, into the next.  # int [C + 1]
        order: positions in the live vector, by channel.  # int [live]
        filter: of each live weight.  # int [live]
    """

    starts: IntArray
    channel: IntArray
    tap: IntArray
    channel_starts: IntArray
    order: IntArray
    filter: IntArray


def columns(support: Support) -> Columns:
    """Lowers a Support weight by weight."""
    f, c, kh, kw = support.shape
    filters, channel, tap = np.nonzero(support.mask.reshape(f, c, kh * kw))
    return Columns(
        starts=_prefix(np.bincount(filters, minlength=f).tolist()),
        channel=channel,
        tap=tap,
        channel_starts=_prefix(np.bincount(channel, minlength=c).tolist()),
        order=np.argsort(channel, kind="stable"),
        filter=filters,
    )


def _column_order(group_masks: BoolArray) -> IntArray:
    """Orders channels so that those with the same readers stand together.

    # bool [groups, C, KH, KW] -> int [C]
    """
    channels = group_masks.shape[1]
    readers = group_masks.transpose(1, 0, 2, 3).reshape(channels, -1)
    _, first, signature = np.unique(readers, axis=0, return_index=True, return_inverse=True)
    signature = signature.reshape(-1)
    # Signatures follow their lowest channel, so an order that is blocked already stays as it is.
    return np.lexsort((np.arange(channels), first[signature]))


def _prefix(sizes: list[int]) -> IntArray:
    return np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]).astype(np.int64)
