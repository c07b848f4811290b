# SPDX-License-Identifier: Apache-2.0
"""The fields of the tables' lines by name, as the enumerations of narrow.h and wide.h have them."""

from __future__ import annotations

from enum import IntEnum


class NarrowClass(IntEnum):
    """Fields of a class of pixels, for narrow groups."""

    PIXELS_H = 0
    PIXELS_W = 1
    TILES_H = 2
    TILES_W = 3
    LOAD_H = 4
    LOAD_W = 5
    BASE_H = 6
    BASE_W = 7
    HALO_H = 8
    HALO_W = 9
    STORE_H = 10
    STORE_W = 11
    FIRST_H = 12
    FIRST_W = 13


class NarrowHead(IntEnum):
    """Fields of a head: a class of pixels and a part of the filters."""

    WORD_BEGIN = 0
    WORD_COUNT = 1
    FRAGMENT_BEGIN = 2
    FRAGMENT_COUNT = 3
    FILTER_FIRST = 4
    FILTER_COUNT = 5


class NarrowRound(IntEnum):
    """Fields of a round: the channels that are loaded, and gathered, at a time."""

    CHUNK_BEGIN = 0
    CHUNK_COUNT = 1
    SLOT_BEGIN = 2
    SLOT_COUNT = 3


class WgradHead(IntEnum):
    """Fields of a head of wgrad."""

    X_CHUNK_BEGIN = 0
    X_CHUNK_COUNT = 1
    X_SLOT_BEGIN = 2
    X_SLOT_COUNT = 3
    DY_CHUNK_BEGIN = 4
    DY_CHUNK_COUNT = 5
    DY_SLOT_BEGIN = 6
    DY_SLOT_COUNT = 7
    UNIT_BEGIN = 8
    UNIT_COUNT = 9


class WideClass(IntEnum):
    """Fields of a class of pixels, for wide groups."""

    PIXELS_H = 0
    PIXELS_W = 1
    TILES_H = 2
    TILES_W = 3
    IMAGES = 4
    IMAGE_PITCH = 5
    LOAD_H = 6
    LOAD_W = 7
    BASE_H = 8
    BASE_W = 9
    HALO_H = 10
    HALO_W = 11
    ROW_PITCH = 12
    COL_HALF = 13
    STORE_H = 14
    STORE_W = 15
    FIRST_H = 16
    FIRST_W = 17


class WideHead(IntEnum):
    """Fields of a head of the wide kernel: a class of pixels and a pair of segments."""

    BLOCK_BEGIN = 0
    BLOCK_COUNT = 1
