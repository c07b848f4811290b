# SPDX-License-Identifier: Apache-2.0
"""Lowering of wgrad for narrow groups: a Support as the units that the kernel computes.

A unit is the gradient of up to four steps (two halves each, see `narrow_lowering`) by a pair of
tiles of eight filters: 64 columns by 16 filters, eight accumulators of one warp. The halves of a
pair of tiles are those that either of them reads; products of a tile with a half that it does not
read are computed and left out of dw.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ...errors import ArgumentError, BackendError, mismatch
from ...masks import IntArray
from ...support import Support
from ..gpu.places import memory_places
from .fields import WgradHead, WgradUnit, table_line
from .narrow_lowering import (
    MAX_WARPS,
    NO_CHANNEL,
    Int32Array,
    filter_order,
    pack_pairs,
    tile_columns,
)
from .narrow_slots import LANES, Slots, arrange, odd_pitch
from .narrow_tma import HALO, TMA_ALIGN, refusal, round_up
from .windows import Window

UNIT_HALVES, UNIT_TILES, WARP_UNITS = 8, 2, 2
UNIT_VALUES = 1024


@dataclass(frozen=True)
class WgradTables:
    """The tables of wgrad, in the layout of narrow.h (which names the fields of their lines).

    Attributes:
        geometry: the class of pixels of fprop.  # int32 [14]
        heads: of the parts, one block each for the same pixels.  # int32 [parts, 10]
        units: four step words and the dy place of both tiles, -1: none.  # int32 [units, 6]
        chunks: channel / 8 of the chunks of x and dy.  # int32
        slots: eight places in the raw pixel each, 16 bits.  # int32 [slots, 4]
        positions: flat dense position of each number of the units; -1 is none.  # int64
        height: of a tile of pixels.
        width: of a tile of pixels.
        warps: of a block.
        pitches: of x raw, x gathered, dy raw, dy gathered, in 16 bytes; 0 if nothing is gathered.
        halo_pixels: of the halo tile of x.
    """

    geometry: Int32Array
    heads: Int32Array
    units: Int32Array
    chunks: Int32Array
    slots: Int32Array
    positions: IntArray
    height: int
    width: int
    warps: int
    pitches: tuple[int, int, int, int]
    halo_pixels: int

    def shared_bytes(self, buffers: int, tma: bool) -> int:
        """Returns the dynamic shared memory of a block, as the kernel lays it out."""
        x, x_slot, dy, dy_slot = self.pitches
        pixels, grain = self.height * self.width, TMA_ALIGN if tma else 16
        raw = round_up(self.halo_pixels * x * 16, grain) + round_up(pixels * dy * 16, grain)
        slots = 16 * (self.halo_pixels * x_slot + pixels * dy_slot)
        return buffers * raw + slots + (16 if tma else 0)

    @property
    def no_tma(self) -> str:
        """Says why TMA cannot bring the tiles as boxes; empty if it can."""
        classes, tile = self.geometry[None], np.array([[self.height, self.width]], np.int32)
        x, dy = (
            self.heads[:, [begin, count]].tolist()
            for begin, count in (
                (WgradHead.X_CHUNK_BEGIN, WgradHead.X_CHUNK_COUNT),
                (WgradHead.DY_CHUNK_BEGIN, WgradHead.DY_CHUNK_COUNT),
            )
        )
        return refusal(classes, classes[:, HALO], self.pitches[0], self.chunks, x) or refusal(
            classes, tile, self.pitches[2], self.chunks, dy
        )

    def targets(self, support: Support, form: str) -> Int32Array:
        """Lists where each number of a partial belongs in the memory of dw; -1 is nowhere.

        Args:
            support: the layer's.
            form: ``"contiguous"`` or ``"channels_last"`` for a dense gradient, or ``"live"``.

        Returns:
            int32 [units · 1024]
        """
        return memory_places(self.positions, support, form)


def lower_wgrad(
    support: Support, window: Window, height: int, width: int, units: int | None = None
) -> WgradTables:
    """Lowers a Support to the tables of wgrad.

    Args:
        support: the layer's.
        window: the class of pixels of fprop.
        height: of a tile of pixels.
        width: of a tile of pixels; height · width must be a multiple of 16.
        units: the most of one block, by default what its registers hold.

    Raises:
        ArgumentError: channels or filters are no multiple of 8, or the tile's pixels none of 16.
        BackendError: a tile with its halo is larger than any shared memory.
    """
    for name, count, least in (
        ("channels", support.channels, LANES),
        ("filters", support.filters, LANES),
        ("pixels of a tile", height * width, 16),
    ):
        if count % least:
            raise ArgumentError(mismatch(name, count, f"a multiple of {least}"))
    order, mask = filter_order(support, False)
    rows = order.reshape(-1, LANES)
    tiles = tile_columns(order, mask)
    x_slots = arrange(tiles)
    aligned = bool((rows == rows[:, :1] // LANES * LANES + np.arange(LANES)).all())
    dy_slots = Slots(rows, np.ones((1, len(rows)), bool), not aligned)
    live = x_slots.live(tiles).reshape(len(tiles), len(x_slots.channels), -1)
    # The units: pairs of tiles with up to eight halves each.
    found: list[tuple[int, IntArray, IntArray]] = []
    for pair in range(0, len(tiles), UNIT_TILES):
        slot, tap = np.nonzero(live[pair : pair + UNIT_TILES].any(axis=0))
        for begin in range(0, len(slot), UNIT_HALVES):
            end = begin + UNIT_HALVES
            found.append((pair, slot[begin:end], tap[begin:end]))
    most = min(units or MAX_WARPS * WARP_UNITS, MAX_WARPS * WARP_UNITS)
    parts = max(-(-len(found) // most), 1)
    bounds = np.linspace(0, len(found), parts + 1).astype(int)
    groups = [found[a:b] for a, b in pairwise(bounds.tolist())]
    tables = _Parts(x_slots, dy_slots)
    for group in groups:
        tables.add(group, len(tiles))
    pitch = [odd_pitch(n) for n in tables.counts]
    if not x_slots.gather:
        pitch[1] = 0
    if not dy_slots.gather:
        pitch[3] = 0
    places = np.array([window.place(t, width) for t in window.taps], np.int64)
    halves = np.array(tables.halves, np.int64).reshape(-1, UNIT_HALVES, 2)
    words = places[halves[..., 0]] * (pitch[1] or pitch[0]) + halves[..., 1]
    if words.max(initial=0) > 0xFFFF:
        raise BackendError(mismatch("halo tile", (height, width), "at most 2**20 bytes"))
    lines = np.empty((len(words), WgradUnit.DY_PLACE + UNIT_TILES), np.int32)
    lines[:, WgradUnit.STEP_WORD : WgradUnit.DY_PLACE] = pack_pairs(words)
    lines[:, WgradUnit.DY_PLACE :] = np.array(tables.tiles).reshape(-1, UNIT_TILES)
    most_units = max(len(group) for group in groups)
    gathers = np.concatenate([np.zeros((0, LANES), np.int64), *tables.gathers])
    return WgradTables(
        geometry=np.array([*window.fields(height, width).values()], np.int32),
        heads=np.array(tables.heads, np.int32),
        units=lines,
        chunks=np.array(tables.chunks, np.int32),
        slots=pack_pairs(gathers),
        positions=_positions(support, x_slots, rows, found),
        height=height,
        width=width,
        warps=min(MAX_WARPS, max(1, -(-most_units // WARP_UNITS))),
        pitches=(pitch[0], pitch[1], pitch[2], pitch[3]),
        halo_pixels=window.halo(height, 1)[0] * window.line(width),
    )


class _Parts:
    """Collects the tables part by part."""

    def __init__(self, x_slots: Slots, dy_slots: Slots) -> None:
        self._slots = x_slots, dy_slots
        self.heads: list[list[int]] = []
        self.halves: list[list[tuple[int, int]]] = []  # tap and slot in the tile, by unit
        self.tiles: list[tuple[int, int]] = []
        self.chunks: list[int] = []
        self.gathers: list[IntArray] = []
        self.counts = [0, 0, 0, 0]  # the most chunks and slots, of x and of dy

    def add(self, group: list[tuple[int, IntArray, IntArray]], tiles: int) -> None:
        """Adds the part with these units."""
        begin = len(self.tiles)
        x_needed = np.unique(np.concatenate([np.zeros(0, int), *(slot for _, slot, _ in group)]))
        pairs = {pair + n for pair, _, _ in group for n in range(UNIT_TILES) if pair + n < tiles}
        dy_needed = np.array(sorted(pairs), int)
        head = self._load(0, "X", x_needed) | self._load(1, "DY", dy_needed)
        for pair, slot, tap in group:
            near = np.searchsorted(x_needed, slot)
            halves = list(zip(tap.tolist(), near.tolist(), strict=True))
            # Idle halves read what the first one reads; nothing becomes of their products.
            self.halves.append(halves + halves[:1] * (UNIT_HALVES - len(halves)))
            first = int(np.searchsorted(dy_needed, pair))
            self.tiles.append((first, first + 1 if pair + 1 < tiles else -1))
        self.heads.append(table_line(WgradHead, **head, UNIT_BEGIN=begin, UNIT_COUNT=len(group)))

    def _load(self, operand: int, name: str, needed: IntArray) -> dict[str, int]:
        """Lists the chunks and slots of one operand: those fields of a head."""
        slots = self._slots[operand]
        own = slots.channels[needed]
        chunk_begin, slot_begin = len(self.chunks), sum(map(len, self.gathers))
        if slots.gather:
            chunks = np.unique(own[own >= 0] // LANES)
            place = np.searchsorted(chunks, own // LANES) * LANES + own % LANES
            self.gathers.append(np.where(own < 0, NO_CHANNEL, place))
            gathered = len(own)
        else:
            chunks, gathered = own[:, 0] // LANES, 0
        self.chunks += chunks.tolist()
        for index, count in ((0, len(chunks)), (1, gathered)):
            self.counts[operand * 2 + index] = max(self.counts[operand * 2 + index], count)
        return {
            f"{name}_CHUNK_BEGIN": chunk_begin,
            f"{name}_CHUNK_COUNT": len(chunks),
            f"{name}_SLOT_BEGIN": slot_begin,
            f"{name}_SLOT_COUNT": gathered,
        }


def _positions(
    support: Support, slots: Slots, rows: IntArray, units: list[tuple[int, IntArray, IntArray]]
) -> IntArray:
    """Lists the flat dense positions of the units' numbers; -1 for those that are no weight's.

    A lane 4·g + t has four numbers of each of the eight products of a unit (step, then tile): the
    channels g of both halves, by the filters 2·t and 2·t + 1.
    """
    _, channels, kh, kw = support.shape
    taps = kh * kw
    lane, number = np.arange(32)[:, None], np.arange(4)
    half, column = number // 2, lane % 4 * 2 + number % 2
    mask = support.mask.reshape(support.filters, channels, taps)
    found = np.full((len(units), UNIT_HALVES // 2, UNIT_TILES, 32, 4), -1)
    for unit, (pair, slot, tap) in zip(found, units, strict=True):
        for step in range(-(-len(slot) // 2)):
            own = step * 2 + half
            known = np.broadcast_to(own < len(slot), (32, 4))
            own = np.minimum(own, len(slot) - 1)
            c = slots.channels[slot[own], lane // 4]
            for tile in range(min(UNIT_TILES, len(rows) - pair)):
                f, k = rows[pair + tile][column], tap[own]
                used = slots.used[pair + tile][slot[own]]
                live = known & used & (c >= 0) & mask[f, c, k]
                unit[step, tile] = np.where(live, (f * channels + c) * taps + k, -1)
    return found.reshape(-1)
