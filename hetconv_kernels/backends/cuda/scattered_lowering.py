# SPDX-License-Identifier: Apache-2.0
"""Lowering for scattered groups: a Support as the tables that ``csrc/cuda/scattered.h`` reads.

Filters that keep the same channels stand in *tiles* of eight, the width of a matrix instruction,
wherever they are; a tile is a *job*, which one warp computes. Single channels are gathered, and
that costs nothing: a pixel's channels lie in *slots* of shared memory, each with eight images of
the batch, 16 bytes, and a matrix instruction takes any eight slots for its rows. Eight slots whose
numbers differ modulo eight are read without meeting in a bank, so slots are dealt to channels, and
channels to eights, with that in mind.

Sixteen channels of a job, at all taps, are a *step*. Jobs are in one or several *parts*, each for a
block of threads of its own. Where not all channels of a part fit in shared memory they are brought
there in several *blocks*, one after the other.

dgrad is the same on the transposed Support, whose filters are the layer's channels.

Example: two groups of eight filters that share no channel are two jobs, of one step of sixteen
channels each:

    >>> from hetconv_kernels import Support
    >>> keep = np.eye(2, dtype=bool).repeat(16, axis=1)
    >>> support = Support.self_grouped(np.arange(16) % 2, keep, 3)
    >>> tables = lower_scattered(support, scattered_jobs(support), 64, 1, 8)
    >>> tables.jobs.tolist()
    [[0, 0, 2, 4, 6, 8, 10, 12, 14], [9, 1, 3, 5, 7, 9, 11, 13, 15]]
    >>> tables.spans.tolist(), tables.useful(support)
    ([[0, 1], [1, 2]], 1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError, mismatch
from ...masks import BoolArray, Int32Array, IntArray
from ...support import Support
from ..gpu.places import memory_places
from .eights import EIGHT, cluster_by_eight
from .fields import ScatteredBlock, ScatteredJob, ScatteredPart, ScatteredSegment, table_line

# As in scattered.h.
STEP_CHANNELS, SEGMENT = 16, 32
# What a tile costs beside its steps, in steps: results, and the job's begin.
_TILE_STEPS = 0.25


@dataclass(frozen=True)
class ScatteredTables:
    """The tables of one call, in the layout of scattered.h.

    Attributes:
        parts: blocks, turns and columns of a part, and whether its columns are eights of filters
            that follow each other.  # int32 [parts, 6]
        blocks: the segments of a block.  # int32 [.., 2]
        segments: a segment of 32 channels, and the slot of each, -1 for none.  # int32 [.., 33]
        begins: the first job of each warp, and the end.  # int32 [parts, warps + 1]
        jobs: first fragment, then eight columns, -1 for none.  # int32 [jobs, 9]
        spans: the first step of a job in each block, and the end.  # int32 [jobs, most blocks + 1]
        steps: slots, as they are the rows of a matrix instruction.  # int32 [steps, 16]
        columns: the filter of each column, ascending in a part.  # int32
        packed: filters of each job, and channels of its steps; -1 is none.
            # int [8], int [steps, 16]
        slots: the most of any block, a multiple of eight.
        widest: the most columns of any part, a multiple of eight.
        meetings: turns in which shared memory gives the eights of a job.  # int [jobs]
        back: whether filters and channels have changed places, as for dgrad.
    """

    parts: Int32Array
    blocks: Int32Array
    segments: Int32Array
    begins: Int32Array
    jobs: Int32Array
    spans: Int32Array
    steps: Int32Array
    columns: Int32Array
    packed: tuple[tuple[IntArray, IntArray], ...]
    slots: int
    widest: int
    meetings: IntArray
    back: bool = False

    def useful(self, support: Support) -> float:
        """Returns live over packed weights."""
        taps = support.mask[0, 0].size
        return support.live / max(len(self.steps) * taps * STEP_CHANNELS * EIGHT, 1)

    def positions(self, support: Support) -> IntArray:
        """Lists the flat dense position of each packed weight, -1 for a zero.

        Of each job [step][tap][lane][4]: lane 4·g + t has filter g, and of a step's rows 2·t,
        2·t + 1 and the two that are eight further.

        # int64
        """
        mask = (support.transpose() if self.back else support).mask
        mask = mask.reshape(*mask.shape[:2], -1)
        taps, lane, number = mask.shape[2], np.arange(32), np.arange(4)
        row = lane[:, None] % 4 * 2 + number % 2 + number // 2 * EIGHT  # [32, 4]
        tap = np.arange(taps)[None, :, None, None]
        found = [np.zeros(0, np.int64)]
        for filters, rows in self.packed:
            c = rows[:, row][:, None]  # [steps, 1, 32, 4]
            f = filters[lane // 4][:, None]  # [32, 1]
            known = (c >= 0) & (f >= 0) & mask[f, c, tap]
            position = (f * mask.shape[1] + c) * taps + tap
            if self.back:  # whose taps are flipped
                position = (c * mask.shape[0] + f) * taps + taps - 1 - tap
            found.append(np.where(known, position, -1).reshape(-1))
        return np.concatenate(found)

    def source(self, support: Support, form: str) -> Int32Array:
        """Lists where each packed weight lies in the memory of the canonical weight; -1 is a zero.

        Args:
            support: the layer's own.
            form: ``"contiguous"`` or ``"channels_last"`` for a dense weight, or ``"live"``.
        """
        return memory_places(self.positions(support), support, form)


class TileJob(NamedTuple):
    """What a warp computes at a time: a tile of filters.

    Attributes:
        filters: at most eight.
        channels: those that any of them keeps.  # bool [channels]
    """

    filters: IntArray
    channels: BoolArray

    @property
    def cost(self) -> float:
        """Steps, were all channels in one block, and what else it takes."""
        return float(_tile_cost(self.channels[None])[0])


def scattered_jobs(support: Support) -> list[TileJob]:
    """Makes tiles of filters that keep nearly the same channels, wherever they are.

    Args:
        support: the layer's own, or for dgrad its transpose.

    Raises:
        ArgumentError: channels or filters are no multiple of 8.
    """
    for name, count in (("filters", support.filters), ("channels", support.channels)):
        if count % EIGHT:
            raise ArgumentError(mismatch(name, count, f"a multiple of {EIGHT}", 'backend="triton"'))
    keep = np.any(support.mask, axis=(2, 3))
    tiles = cluster_by_eight(keep, _tile_cost)
    return [TileJob(members, np.any(keep[members], axis=0)) for members in tiles]


def _tile_cost(needs: BoolArray) -> npt.NDArray[np.float64]:
    """Counts the steps of tiles.  # bool [tiles, channels] -> float [tiles]"""
    found: npt.NDArray[np.float64] = np.ceil(needs.sum(axis=1) / STEP_CHANNELS) + _TILE_STEPS
    return found


def lower_scattered(
    support: Support,
    jobs: Sequence[TileJob],
    most_slots: int,
    parts: int,
    warps: int,
    back: bool = False,
) -> ScatteredTables:
    """Lowers a Support to the tables of fprop or dgrad.

    Args:
        support: what is convolved with: the layer's own, or for dgrad its transpose.
        jobs: of it, by `scattered_jobs`.
        most_slots: channels of a block, a multiple of 32.
        parts: into how many jobs are divided; fewer where there are not so many jobs.
        warps: of a block of threads.
        back: whether it is the transpose.
    """
    builder = _Builder(support, most_slots, warps, back)
    for part in _dealt(jobs, parts):
        if part:
            builder.add(part)
    return builder.finish()


def _dealt(jobs: Sequence[TileJob], hands: int, lanes: int = 1) -> list[list[TileJob]]:
    """Deals jobs, each to the hand with the least to do, and the dearest first.

    Hands h, h + lanes, h + 2 * lanes, ... share what computes them, as warps do a scheduler.
    """
    own: list[list[TileJob]] = [[] for _ in range(hands)]
    loads = np.zeros(hands)
    for job in sorted(jobs, key=lambda job: -job.cost):
        shared = np.array([loads[h % lanes :: lanes].sum() for h in range(hands)])
        best = int(np.lexsort((loads, shared if lanes > 1 else loads))[0])
        own[best].append(job)
        loads[best] += job.cost
    return own


class _Builder:
    """Collects the tables part by part."""

    def __init__(self, support: Support, most_slots: int, warps: int, back: bool) -> None:
        self._mask, self._most, self._warps, self._back = support.mask, most_slots, warps, back
        self._parts: list[list[int]] = []
        self._blocks: list[list[int]] = []
        self._segments: list[list[int]] = []
        self._begins: list[list[int]] = []
        self._jobs: list[list[int]] = []
        self._spans: list[list[int]] = []
        self._steps: list[IntArray] = [np.zeros((0, STEP_CHANNELS), np.int64)]
        self._columns: list[int] = []
        self._packed: list[tuple[IntArray, IntArray]] = []
        self._meetings: list[int] = []
        self._slots, self._widest, self._step_count, self._fragments = EIGHT, EIGHT, 0, 0

    def add(self, jobs: list[TileJob]) -> None:
        """Adds a part."""
        columns = np.sort(np.concatenate([job.filters for job in jobs]))
        column_of = {int(f): index for index, f in enumerate(columns)}
        warps = _dealt(jobs, self._warps, 4)
        begin = len(self._blocks)
        blocks = self._add_blocks(jobs)
        turns = max(len(own) for own in warps)
        part = table_line(
            ScatteredPart,
            BLOCK_BEGIN=begin,
            BLOCK_COUNT=len(blocks),
            TURNS=turns,
            COLUMN_BEGIN=len(self._columns),
            COLUMN_COUNT=len(columns),
            EIGHTS=int(_in_eights(columns)),
        )
        self._parts.append(part)
        self._columns += columns.tolist()
        self._widest = max(self._widest, -(-len(columns) // EIGHT) * EIGHT)
        begins = [len(self._jobs)]
        for own in warps:
            for job in own:
                self._add_job(job, blocks, column_of)
            begins.append(len(self._jobs))
        self._begins.append(begins)

    def finish(self) -> ScatteredTables:
        """Makes the tables."""
        most = max(len(span) for span in self._spans)
        return ScatteredTables(
            parts=np.array(self._parts, np.int32),
            blocks=np.array(self._blocks, np.int32).reshape(-1, len(ScatteredBlock)),
            segments=np.array(self._segments, np.int32).reshape(
                -1, ScatteredSegment.SLOT + SEGMENT
            ),
            begins=np.array(self._begins, np.int32),
            jobs=np.array(self._jobs, np.int32),
            spans=np.array([s + [s[-1]] * (most - len(s)) for s in self._spans], np.int32),
            steps=np.concatenate(self._steps).astype(np.int32),
            columns=np.array(self._columns, np.int32),
            packed=tuple(self._packed),
            slots=self._slots,
            widest=self._widest,
            meetings=np.array(self._meetings, np.int64),
            back=self._back,
        )

    def _add_blocks(self, jobs: list[TileJob]) -> list[IntArray]:
        """Divides a part's channels into blocks; returns the slot of each channel, -1: not there.

        # int [blocks][channels]
        """
        needs = np.stack([job.channels for job in jobs])
        channels = needs.shape[1]
        padded = np.pad(needs.any(axis=0), (0, -channels % SEGMENT)).reshape(-1, SEGMENT)
        counts = padded.sum(axis=1)
        wanted = max(1, -(-int(counts.sum()) // self._most))
        cuts: list[list[int]] = [[]]
        share = counts.sum() / wanted
        for segment in np.flatnonzero(counts):
            own = int(counts[cuts[-1]].sum())
            over = own + counts[segment] > self._most
            if cuts[-1] and (over or (own >= share and len(cuts) < wanted)):
                cuts.append([])
            cuts[-1].append(int(segment))
        found = []
        for cut in cuts:
            inside = np.zeros(len(counts) * SEGMENT, bool).reshape(-1, SEGMENT)
            inside[cut] = True
            slot = _slots(needs & inside.reshape(-1)[:channels])
            lines = np.pad(slot, (0, -channels % SEGMENT), constant_values=-1).reshape(-1, SEGMENT)
            first, count = len(self._segments), len(cut)
            self._blocks.append(
                table_line(ScatteredBlock, SEGMENT_BEGIN=first, SEGMENT_COUNT=count)
            )
            self._segments += [
                table_line(ScatteredSegment, SEGMENT_INDEX=n, SLOT=lines[n].tolist()) for n in cut
            ]
            self._slots = max(self._slots, -(-int(slot.max(initial=0) + 1) // EIGHT) * EIGHT)
            found.append(slot)
        return found

    def _add_job(self, job: TileJob, blocks: list[IntArray], column_of: dict[int, int]) -> None:
        filters = np.append(job.filters, np.full(EIGHT - len(job.filters), -1))
        columns = [column_of.get(int(f), -1) for f in filters]
        self._jobs.append(table_line(ScatteredJob, FRAGMENT_BEGIN=self._fragments, COLUMN=columns))
        span, meetings, lines = [self._step_count], 0, []
        for slot in blocks:
            own = np.flatnonzero(job.channels & (slot >= 0))
            rows = _rows(own, slot)  # [steps, 16] channels
            eights = rows.reshape(-1, EIGHT)
            # A row that stands for nothing reads what its eight reads anyway.
            spare = np.where(eights[:, :1] >= 0, eights[:, :1], own.min(initial=len(slot)))
            slots = slot[np.where(eights >= 0, eights, spare)]
            self._steps.append(slots.reshape(-1, STEP_CHANNELS))
            meetings += _meetings(slots)
            lines.append(rows)
            self._step_count += len(rows)
            self._fragments += len(rows) * self._mask[0, 0].size
            span.append(self._step_count)
        self._spans.append(span)
        self._packed.append((filters, np.concatenate(lines)))
        self._meetings.append(meetings)


def _in_eights(columns: IntArray) -> bool:
    """Tells whether filters are eights that follow each other, each from a multiple of eight."""
    if len(columns) % EIGHT:
        return False
    eights = columns.reshape(-1, EIGHT)
    return bool((eights == eights[:, :1] // EIGHT * EIGHT + np.arange(EIGHT)).all())


def _slots(needs: BoolArray) -> IntArray:
    """Gives each channel that any job keeps a slot, so that each job's differ modulo eight.

    # bool [jobs, channels] -> int [channels], -1 for none
    """
    kept = np.flatnonzero(needs.any(axis=0))
    room = np.full(EIGHT, -(-len(kept) // EIGHT))
    counts = np.zeros((len(needs), EIGHT))
    slot = np.full(needs.shape[1], -1)
    taken = np.zeros(EIGHT, int)
    for channel in kept[np.argsort(-needs[:, kept].sum(axis=0), kind="stable")]:
        own = needs[:, channel]
        # The residue that its jobs have least of, and of such the one that is most free.
        added = np.where(room > 0, counts[own].sum(axis=0), np.inf)
        best = int(np.lexsort((-room, added))[0])
        slot[channel] = taken[best] * EIGHT + best
        taken[best] += 1
        room[best] -= 1
        counts[own, best] += 1
    return slot


def _rows(channels: IntArray, slot: IntArray) -> IntArray:
    """Deals channels to eights, so that those with the same residue come to different ones.

    Returns:
        Channels, -1 for none.  # int [steps, 16]
    """
    eights = 2 * -(-len(channels) // STEP_CHANNELS)
    found = np.full((eights, EIGHT), -1)
    turn, hand = np.divmod(np.arange(len(channels)), max(eights, 1))
    found[hand, turn] = channels[np.argsort(slot[channels] % EIGHT, kind="stable")]
    return found.reshape(-1, STEP_CHANNELS)


def _meetings(slots: IntArray) -> int:
    """Counts the turns in which shared memory gives eights of slots: of each the most in a bank.

    Example: 0 and 8 meet, 3 is read once however many rows name it:

        >>> _meetings(np.array([[0, 8, 1, 2, 3, 3, 3, 3]]))
        2

    # int [eights, 8]
    """
    slots = np.sort(slots, axis=1)
    first = np.diff(slots, axis=1, prepend=-1) > 0
    banks = slots[..., None] % EIGHT == np.arange(EIGHT)
    return int((banks & first[..., None]).sum(axis=1).max(axis=1).sum())
