# SPDX-License-Identifier: Apache-2.0
"""Slots: how channels stand in shared memory, and which of a warp's filters share loading them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...masks import BoolArray, IntArray

LANES = 8  # filters of a tile, channels of a slot of 16-bit numbers
SLOT = 16  # bytes
WARP_TILES = 8  # of one warp: 64 filters
# The ranges of a warp's tiles that have a step list: first tile and how many.
TILE_RANGES = tuple((first, size) for size in (8, 4, 2, 1) for first in range(0, WARP_TILES, size))
# Clocks of one half for 32 pixels: two loads of x, then products and weights for each tile; and of
# gathering one slot channel by channel. From data sheets: they order the choices, no more.
_HALF_CLOCKS, _TILE_CLOCKS, _GATHER_CLOCKS = 5.0, 2.5, 20.0


class Slots(NamedTuple):
    """How channels stand in shared memory.

    Attributes:
        channels: of each slot, -1 for none.  # int [S, 8], or [S, 4] of float32
        used: which tiles read which slots; a channel may stand in several.  # bool [tiles, S]
        gather: whether slots are not simply adjacent channels.
    """

    channels: IntArray
    used: BoolArray
    gather: bool

    def live(self, tiles: BoolArray) -> BoolArray:
        """Tells which tiles read which slots at which taps.

        # bool [tiles, C, KH, KW] -> bool [tiles, S, KH, KW]
        """
        padded = np.concatenate([tiles, np.zeros_like(tiles[:, :1])], axis=1)
        return np.any(padded[:, self.channels], axis=2) & self.used[:, :, None, None]


def arrange(tiles: BoolArray, size: int = LANES) -> Slots:
    """Chooses how channels stand in shared memory: the way that is predicted to be fastest.

    As they are; with channels that the same tiles read brought together (HetConv whose order is
    interleaved); or each tile's own, a channel then standing in several slots (ragged groups).

    Args:
        tiles: the columns that a tile has.  # bool [tiles, C, KH, KW]
        size: channels of a slot.
    """
    count, channels = tiles.shape[:2]
    own = np.arange(channels)
    ways = [_slots([own], np.ones((count, 1), bool), False, size)]
    readers = np.packbits(tiles.transpose(1, 0, 2, 3).reshape(channels, -1), axis=1)
    first: dict[bytes, int] = {}
    order = np.argsort(
        [first.setdefault(row.tobytes(), c) for c, row in enumerate(readers)], kind="stable"
    )
    if not np.array_equal(order, own):
        ways.append(_slots([order], np.ones((count, 1), bool), True, size))
    sets: dict[bytes, int] = {}
    whole = np.any(tiles, axis=(2, 3))
    owner = np.array([sets.setdefault(row.tobytes(), len(sets)) for row in whole])
    lists = [order[np.frombuffer(key, bool)[order]] for key in sets]
    ways.append(_slots(lists, owner[:, None] == np.arange(len(sets)), True, size))
    return min(ways, key=lambda way: _clocks(way, tiles))


def _slots(lists: Sequence[IntArray], readers: BoolArray, gather: bool, size: int) -> Slots:
    """Cuts lists of channels into slots; `readers` has the lists that a tile reads."""
    filled = [
        np.append(channels, [-1] * (-len(channels) % size)).reshape(-1, size) for channels in lists
    ]
    used = np.repeat(readers, [len(slots) for slots in filled], axis=1)
    channels = np.concatenate(filled).astype(np.int64)
    # Aligned runs are copied whole.
    aligned = np.arange(size) + channels[:, :1] // size * size
    return Slots(channels, used, gather and not np.array_equal(channels, aligned))


def _clocks(slots: Slots, tiles: BoolArray) -> float:
    live = slots.live(tiles)
    live = live.reshape(*live.shape[:2], -1)
    pad = -len(live) % WARP_TILES
    live = np.concatenate([live, np.zeros((pad, *live.shape[1:]), bool)])
    live = live.reshape(-1, WARP_TILES, *live.shape[1:])
    taken = ranges(live)
    cost = _GATHER_CLOCKS * int(live.any(axis=(0, 1, 3)).sum()) if slots.gather else 0.0
    for index, (_, size) in enumerate(TILE_RANGES):
        cost += int(taken[index].sum()) * (_HALF_CLOCKS + _TILE_CLOCKS * size)
    return cost


def ranges(live: BoolArray) -> BoolArray:
    """Chooses the ranges of tiles that each half is loaded for: as few clocks as possible.

    Example: a half that tiles 0, 1 and 2 read is loaded for the range of the first four, whose
    fourth gets zero weights:

        >>> live = np.zeros((1, 8, 1), bool)
        >>> live[0, :3] = True
        >>> [TILE_RANGES[i] for i in np.flatnonzero(ranges(live))]
        [(0, 4)]

    Args:
        live: which tiles of a warp read which halves.  # bool [warps, 8, ...]

    Returns:
        The ranges, in the order of `TILE_RANGES`.  # bool [15, warps, ...]
    """
    size, any_below = 1, live
    cost = np.where(live, _HALF_CLOCKS + _TILE_CLOCKS, 0.0)
    levels = [live]
    while size < WARP_TILES:
        size *= 2
        any_below = any_below[:, 0::2] | any_below[:, 1::2]
        apart = cost[:, 0::2] + cost[:, 1::2]
        together = _HALF_CLOCKS + _TILE_CLOCKS * size
        taken = any_below & (together <= apart)
        cost = np.where(taken, together, apart)
        levels.append(taken)
    free = np.ones_like(levels[-1])
    chosen = []
    for taken in reversed(levels):
        chosen.append(np.moveaxis(taken & free, 1, 0))
        free = np.repeat(free & ~taken, 2, axis=1)
    return np.concatenate(chosen)


def odd_pitch(count: int) -> int:
    """Returns an odd pitch of at least `count`: eight adjacent pixels then meet all banks once."""
    return max(count, 1) | 1
