# SPDX-License-Identifier: Apache-2.0
"""Lowering for narrow groups: a Support as the tables that ``csrc/cuda/narrow.h`` reads.

Filters stand in *tiles* of eight, the width of a matrix instruction, those of one group together.
Channels stand in *slots* of eight, 16 bytes of a pixel in shared memory. A *half* is one slot at
one tap; any two halves make a *step*, the sixteen columns of one instruction. So neither a group of
eight channels nor the centre tap alone wastes columns: HetConv with 64 channels and p=8 has 8·1 + 8
= 16 halves, 8 steps, for every tile.

A half that several tiles read is loaded once for an aligned range of 8, 4, 2 or 1 of them: a warp
has 64 filters and runs fifteen step lists, one for each such range, widest first. A step is one
word, the places of its two halves in the halo tile in units of 16 bytes, first in the low 16 bits.

dgrad is the same on the transposed Support, one class of pixels for each residue of the stride.

Of float32 a slot has four channels, so a half and a step have half as many columns; they are 16 and
32 bytes of a pixel all the same, and so are the words.

A halo is brought chunk by chunk by cp.async, or from compute capability 9.0 on by TMA, as one box
of ``raw_pitch`` chunks from the round's first one (see `narrow_tma`). What the box has beyond the
round's own chunks, zeros at the end of a pixel and else their neighbours, fills the place that the
odd pitch leaves free, so the same words fit both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...errors import ArgumentError, BackendError, mismatch
from ...masks import BoolArray, Int32Array, IntArray
from ...support import Support
from ..gpu.places import memory_places
from .fields import NarrowHead, NarrowList, NarrowRound, table_line
from .narrow_slots import LANES, SLOT, TILE_RANGES, WARP_TILES, Slots, arrange, odd_pitch, ranges
from .narrow_tma import HALO, MOST_MAPS, refusal
from .windows import Window

FRAGMENT = 256  # bytes of the packed weights of one tile in one step
NO_CHANNEL = 0xFFFF  # in `slots`: a zero
MAX_WARPS = 8  # of one block


class BlockShape(NamedTuple):
    """The work of one block.

    Attributes:
        height: of a tile of pixels.
        width: of a tile of pixels.
        warps_m: warps along the pixels, 32 each.
        warps_n: warps along the filters, 64 each.
        slots: the most slots in shared memory at a time.
    """

    height: int
    width: int
    warps_m: int
    warps_n: int
    slots: int

    @property
    def filters(self) -> int:
        """Filters of one part."""
        return self.warps_n * WARP_TILES * LANES


@dataclass(frozen=True)
class Tables:
    """The tables of one call, in the layout of narrow.h (which names the fields of their lines).

    Attributes:
        classes: the classes of pixels.  # int32 [classes, 14]
        heads: what a class and part of the filters begin and end with.  # int32 [classes, parts, 6]
        rounds: chunks to load and slots to gather.  # int32 [classes, parts, rounds, 4]
        lists: prefix offsets into the words of the head, and the first fragment.
            # int32 [classes, parts, rounds, warps_n, 17]
        words: of the steps.  # int32 [steps]
        chunks: which 16 bytes of a pixel each chunk is.  # int32
        slots: eight places in the raw pixel each, 16 bits; of float32 four, one in a word.
            # int32 [slots, 4]
        rows: filters in order, -1 for none.  # int32 [parts, shape.filters]
        positions: of each packed weight in the flat dense weight, -1 is a zero.  # int64
        shape: the work of one block.
        raw_pitch: from pixel to pixel of the raw halo tile, in 16 bytes.
        slot_pitch: the same of the gathered one; 0 if nothing is gathered.
        halo_pixels: of the largest halo tile.
        item: bytes of a number of x and y.
    """

    classes: Int32Array
    heads: Int32Array
    rounds: Int32Array
    lists: Int32Array
    words: Int32Array
    chunks: Int32Array
    slots: Int32Array
    rows: Int32Array
    positions: IntArray
    shape: BlockShape
    raw_pitch: int
    slot_pitch: int
    halo_pixels: int
    item: int

    @property
    def max_words(self) -> int:
        """The most words of any head."""
        return int(self.heads[..., NarrowHead.WORD_COUNT].max())

    @property
    def max_fragments(self) -> int:
        """The most fragments of any head."""
        return int(self.heads[..., NarrowHead.FRAGMENT_COUNT].max())

    @property
    def halos(self) -> Int32Array:
        """The halo of each class, rows and columns.  # int32 [classes, 2]"""
        return self.classes[:, HALO]

    @property
    def no_tma(self) -> str:
        """Says why TMA cannot bring the halos as boxes; empty if it can."""
        if self.item != 2:
            return "boxes are built for numbers of 16 bits"
        if len(self.classes) > MOST_MAPS:
            return f"{len(self.classes)} classes of pixels need more than {MOST_MAPS} tensor maps"
        columns = [NarrowRound.CHUNK_BEGIN, NarrowRound.CHUNK_COUNT]
        loads = self.rounds[..., columns].reshape(-1, 2).tolist()
        return refusal(self.classes, self.halos, self.raw_pitch, self.chunks, loads)

    def source(self, support: Support, form: str) -> Int32Array:
        """Lists where each packed weight lies in the memory of the canonical weight; -1 is a zero.

        Args:
            support: the layer's own, for dgrad too.
            form: ``"contiguous"`` or ``"channels_last"`` for a dense weight, or ``"live"``.
        """
        return memory_places(self.positions, support, form)


class _Steps(NamedTuple):
    """Halves in pairs, by slot and tap; a step without a second half has -1 there."""

    tiles: IntArray  # of the range  # [size]
    slot: IntArray  # [steps, 2]
    tap: IntArray  # [steps, 2]


def lower_narrow(
    support: Support,
    windows: Sequence[Window],
    shape: BlockShape,
    back: bool = False,
    item: int = 2,
) -> Tables:
    """Lowers a Support to the tables of fprop or dgrad.

    Args:
        support: the layer's own.
        windows: the classes of pixels.
        shape: the work of one block.
        back: whether to lower dgrad: filters and channels change places.
        item: bytes of a number of x and y, 2 or 4.

    Raises:
        ArgumentError: the number of channels that are read fills no 16 bytes.
        BackendError: a tile with its halo is larger than any shared memory.
    """
    order, mask = filter_order(support, back)
    size = SLOT // item
    if mask.shape[1] % size:
        raise ArgumentError(
            mismatch("channels", mask.shape[1], f"a multiple of {size}", 'backend="triton"')
        )
    parts = -(-len(order) // shape.filters)
    rows = np.full((parts, shape.filters), -1)
    rows.reshape(-1)[: len(order)] = order
    tiles = tile_columns(rows, mask)
    slots = arrange(tiles, size)
    builder = _Builder(slots, shape, mask, rows, back)
    for window in windows:
        for part in range(parts):
            own = tiles.reshape(parts, -1, *mask.shape[1:])[part]
            builder.add(window, part, own)
    return builder.finish(windows)


def filter_order(support: Support, back: bool) -> tuple[IntArray, BoolArray]:
    """Returns the filters with groups together, and the mask [filters, channels, KH, KW] with the
    taps in their own places; for dgrad those of the transposed Support.
    """
    mask = support.mask
    lowered = support.transpose() if back else support
    order = np.concatenate([group.filters for group in lowered.groups])
    return order, mask.transpose(1, 0, 2, 3) if back else mask


def tile_columns(rows: IntArray, mask: BoolArray) -> BoolArray:
    """Tells which columns the tiles of eight filters have; -1 in `rows` is none.

    # bool [tiles, C, KH, KW]
    """
    padded = np.concatenate([mask, np.zeros_like(mask[:1])])
    return np.any(padded[rows.reshape(-1, LANES)], axis=1)


class _Builder:
    """Collects the tables head by head; what depends on the pitch is made at the end."""

    def __init__(
        self, slots: Slots, shape: BlockShape, mask: BoolArray, rows: IntArray, back: bool
    ) -> None:
        self._slots, self._shape, self._mask = slots, shape, mask
        self._size = slots.channels.shape[1]
        self._rows, self._back = rows, back
        self._chunks: list[int] = []
        self._gathers: list[IntArray] = []
        self._halves: list[IntArray] = []  # place and slot of each half  # [steps, 2, 2]
        self._positions: list[IntArray] = [np.zeros(0, np.int64)]
        self._heads: list[list[int]] = []
        self._rounds: list[list[list[int]]] = []
        self._lists: list[list[IntArray]] = []
        self._counts = {"words": 0, "fragments": 0, "slots": 0, "raw": 0, "slot": 0}

    def add(self, window: Window, part: int, tiles: BoolArray) -> None:
        """Adds the head of one class and part; `tiles` has the columns of the part's tiles."""
        shape, counts, slots = self._shape, self._counts, self._slots
        ky, kx = [t.ky for t in window.taps], [t.kx for t in window.taps]
        used = slots.used.reshape(-1, len(tiles), slots.used.shape[1])[part]
        live = Slots(slots.channels, used, slots.gather).live(tiles)[:, :, ky, kx]
        live = live.reshape(shape.warps_n, WARP_TILES, *live.shape[1:])
        taken = ranges(live)  # [15, warps_n, S, taps]
        needed = np.flatnonzero(live.any(axis=(0, 1, 3)))
        first = counts["words"], counts["fragments"]
        rounds, lists = [], []
        for begin in range(0, max(len(needed), 1), shape.slots):
            inside = needed[begin : begin + shape.slots]
            rounds.append(self._load(needed, inside, begin == 0))
            for warp in range(shape.warps_n):
                base = warp * WARP_TILES
                lists.append(self._steps(window, part, base, inside, taken[:, warp], first))
        self._rounds.append(rounds)
        self._lists.append(lists)
        head = table_line(
            NarrowHead,
            WORD_BEGIN=first[0],
            WORD_COUNT=counts["words"] - first[0],
            FRAGMENT_BEGIN=first[1],
            FRAGMENT_COUNT=counts["fragments"] - first[1],
            **self._extent(part),
        )
        self._heads.append(head)

    def finish(self, windows: Sequence[Window]) -> Tables:
        """Makes the tables."""
        shape, counts = self._shape, self._counts
        raw, slot = odd_pitch(counts["raw"]), odd_pitch(counts["slot"]) if self._slots.gather else 0
        steps = np.concatenate([np.zeros((0, 2, 2), np.int64), *self._halves])
        offsets = steps[..., 0] * (slot or raw) + steps[..., 1]
        if offsets.max(initial=0) > 0xFFFF:
            raise BackendError(mismatch("halo tile", shape, "at most 2**20 bytes"))
        words = pack_pairs(offsets)[:, 0]
        most = max(len(r) for r in self._rounds)
        end = self._lists_end(most)
        for rounds in self._rounds:
            rounds += [[0] * len(NarrowRound)] * (most - len(rounds))
        grid = len(windows), len(self._rows)
        halo = [w.halo(shape.height, 1)[0] * w.line(shape.width) for w in windows]
        gathers = np.concatenate([np.zeros((0, self._size), np.int64), *self._gathers])
        if self._size < LANES:  # a word for each
            gathers = np.stack([gathers, np.full_like(gathers, NO_CHANNEL)], -1)
            gathers = gathers.reshape(-1, LANES)
        fields = [[*w.fields(shape.height, shape.width).values()] for w in windows]
        return Tables(
            classes=np.array(fields, np.int32),
            heads=np.array(self._heads, np.int32).reshape(*grid, len(NarrowHead)),
            rounds=np.array(self._rounds, np.int32).reshape(*grid, most, len(NarrowRound)),
            lists=end.reshape(*grid, most, shape.warps_n, -1),
            words=words,
            chunks=np.array(self._chunks, np.int32),
            slots=pack_pairs(gathers),
            rows=self._rows.astype(np.int32),
            positions=np.concatenate(self._positions),
            shape=shape,
            raw_pitch=raw,
            slot_pitch=slot,
            halo_pixels=max(halo),
            item=SLOT // self._size,
        )

    def _load(self, needed: IntArray, inside: IntArray, begins: bool) -> list[int]:
        """Lists what a round loads and gathers: a line of ``rounds``."""
        channels, counts, size = self._slots.channels, self._counts, self._size
        chunk_begin, slot_begin = len(self._chunks), counts["slots"]
        own = channels[inside]
        if self._slots.gather:
            every = channels[needed]
            chunks = np.unique(every[every >= 0] // size)
            place = np.searchsorted(chunks, own // size) * size + own % size
            self._gathers.append(np.where(own < 0, NO_CHANNEL, place))
            counts["slots"] += len(own)
            counts["slot"] = max(counts["slot"], len(own))
        else:
            chunks, begins = own[:, 0] // size, True
        counts["raw"] = max(counts["raw"], len(chunks))
        self._chunks += chunks.tolist() if begins else []
        return table_line(
            NarrowRound,
            CHUNK_BEGIN=chunk_begin,
            CHUNK_COUNT=len(self._chunks) - chunk_begin,
            SLOT_BEGIN=slot_begin,
            SLOT_COUNT=counts["slots"] - slot_begin,
        )

    def _steps(
        self,
        window: Window,
        part: int,
        base: int,
        inside: IntArray,
        taken: BoolArray,
        first: tuple[int, int],
    ) -> IntArray:
        """Adds the steps of one warp column in one round; returns its line of ``lists``."""
        counts = self._counts
        begins = [counts["words"] - first[0]]
        fragment = counts["fragments"] - first[1]
        places = np.array([window.place(t, self._shape.width) for t in window.taps], np.int64)
        for (tile, size), own in zip(TILE_RANGES, taken[:, inside], strict=True):
            slot, tap = np.nonzero(own)
            if len(slot):
                pad = len(slot) % 2
                # A lone half is read twice; its second weights are zero.
                ends = np.append(slot, slot[-1:][:pad]), np.append(tap, tap[-1:][:pad])
                halves = np.stack([places[ends[1]], ends[0]], axis=1).reshape(-1, 2, 2)
                self._halves.append(halves)
                none = np.full(pad, -1)
                steps = _Steps(
                    part * (self._shape.filters // LANES) + base + tile + np.arange(size),
                    np.concatenate([inside[slot], none]).reshape(-1, 2),
                    np.concatenate([tap, none]).reshape(-1, 2),
                )
                self._positions.append(self._packed(window, steps))
                counts["words"] += len(halves)
                counts["fragments"] += len(halves) * size
            begins.append(counts["words"] - first[0])
        return np.array(table_line(NarrowList, LIST_BEGIN=begins, LIST_FRAGMENT=fragment))

    def _packed(self, window: Window, steps: _Steps) -> IntArray:
        """Lists the flat dense positions of the fragments of some steps, in the order of packing.

        Lane 4·g + t of a warp has filter g of each tile, and of both halves its channels 2·t and
        2·t + 1, of float32 channel t; where a range has several tiles, a lane's numbers of two of
        them are adjacent.
        """
        own = self._size // 4  # of a half
        lane, number = np.arange(32)[:, None], np.arange(2 * own)
        half, channel = number // own, lane % 4 * own + number % own  # [32, 4] or [32, 2]
        slot, tap = steps.slot[:, half], steps.tap[:, half]  # [steps, 4]
        lists = self._slots.channels[slot[:, None, :], channel]  # [steps, 32, 4]
        filters = self._rows.reshape(-1, LANES)[steps.tiles][:, np.arange(32) // 4]  # [size, 32]
        ky = np.array([t.ky for t in window.taps])[tap][:, None, None, :]
        kx = np.array([t.kx for t in window.taps])[tap][:, None, None, :]
        f, c = filters[None, :, :, None], lists[:, None]  # [steps, size, 32, 4] together
        known = (slot >= 0)[:, None, None, :] & (f >= 0) & (c >= 0)
        known = known & self._mask[f, c, ky, kx]
        shape = self._mask.shape
        inner, outer = (f, c) if self._back else (c, f)
        size = shape[0] if self._back else shape[1]
        flat = ((outer * size + inner) * shape[2] + ky) * shape[3] + kx
        found = np.where(known, flat, -1)
        if found.shape[1] > 1:
            found = found.reshape(len(found), -1, 2, 32, 2 * own).swapaxes(2, 3)
        return found.reshape(-1)

    def _extent(self, part: int) -> dict[str, int]:
        """Returns the range of filters that a part has, one without any if it has none such."""
        rows = self._rows[part][self._rows[part] >= 0]
        first, count = int(rows.min()), len(rows)
        whole = int(rows.max()) - first + 1 == count
        return {"FILTER_FIRST": first * whole, "FILTER_COUNT": count * whole}

    def _lists_end(self, most: int) -> Int32Array:
        """Joins the lines of ``lists``, with empty ones for heads that have fewer rounds."""
        size = most * self._shape.warps_n
        joined = []
        for lines in self._lists:
            idle = np.zeros((size - len(lines), NarrowList.LIST_FRAGMENT + 1), np.int64)
            joined.append(np.concatenate([np.array(lines), idle]))
        return np.stack(joined).astype(np.int32)


def pack_pairs(numbers: IntArray) -> Int32Array:
    """Packs pairs of 16-bit numbers into words, the first of each in the low half."""
    return (numbers[..., 0::2] | numbers[..., 1::2] << 16).astype(np.uint32).view(np.int32)
