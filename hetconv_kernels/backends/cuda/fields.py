# SPDX-License-Identifier: Apache-2.0
"""The fields of the tables' lines by name, as the enumerations in the headers have them.

A field is the place of a number in a line, or of the first one of several that follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


def table_line(fields: type[IntEnum], **values: int | Sequence[int]) -> list[int]:
    """Makes a line of a table of what its fields hold; numbers of the same field are a sequence.

    Example: what a unit of wgrad reads by four steps, of one tile:

        >>> table_line(WgradUnit, STEP_WORD=[5, 6, 7, 8], DY_PLACE=[2, -1])
        [5, 6, 7, 8, 2, -1]

    Raises:
        KeyError: a field is missing.
        IndexError: what stands before a field is not as long as its place says.
    """
    found: list[int] = []
    for field in fields:
        value = values[field.name]
        if len(found) != field:
            raise IndexError(f"{field!r} would stand at place {len(found)}")
        found += value if isinstance(value, Sequence) else [value]
    return found


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


class NarrowList(IntEnum):
    """Fields of the step lists of a warp column: where each begins; the first fragment."""

    LIST_BEGIN = 0
    LIST_FRAGMENT = 16


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


class WgradUnit(IntEnum):
    """Fields of a unit of wgrad: the words of its steps, and where its tiles lie in dy."""

    STEP_WORD = 0
    DY_PLACE = 4


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


class WideSteps(IntEnum):
    """Fields of the steps of a warpgroup in a block."""

    STEP_BEGIN = 0
    STEP_COUNT = 1


class WideUnread(IntEnum):
    """Fields of what is not read along the borders of a halo: rows and columns."""

    TOP = 0
    BOTTOM = 1
    LEFT = 2
    RIGHT = 3


class WideBlock(IntEnum):
    """Fields of a block: its chunks, the steps of each warpgroup, and what none of them reads."""

    CHUNK = 0
    STEPS = 8
    UNREAD = 12


# Where a line of such blocks has its chunks, how many steps each warpgroup runs, and what is not
# read; and of the latter alone, rows and columns.
CHUNKS = slice(WideBlock.CHUNK, WideBlock.STEPS)
STEP_COUNTS = [
    steps + WideSteps.STEP_COUNT
    for steps in range(WideBlock.STEPS, WideBlock.UNREAD, len(WideSteps))
]
UNREAD = slice(WideBlock.UNREAD, WideBlock.UNREAD + len(WideUnread))
UNREAD_ROWS, UNREAD_COLS = [WideUnread.TOP, WideUnread.BOTTOM], [WideUnread.LEFT, WideUnread.RIGHT]


class WideWgradJob(IntEnum):
    """Fields of a job of wgrad for wide groups: the chunks of dy, and the blocks."""

    DY_CHUNK = 0
    JOB_BEGIN = 8
    JOB_COUNT = 9


class WideWgradBlock(IntEnum):
    """Fields of a block of wgrad for wide groups: its chunks, and what no product reads."""

    X_CHUNK = 0
    X_UNREAD = 8


class ScatteredPart(IntEnum):
    """Fields of a part of the filters, for scattered groups."""

    BLOCK_BEGIN = 0
    BLOCK_COUNT = 1
    TURNS = 2
    COLUMN_BEGIN = 3
    COLUMN_COUNT = 4
    EIGHTS = 5


class ScatteredBlock(IntEnum):
    """Fields of a block of channels."""

    SEGMENT_BEGIN = 0
    SEGMENT_COUNT = 1


class ScatteredSegment(IntEnum):
    """Fields of a segment of channels: which it is, and the slot of each channel."""

    SEGMENT_INDEX = 0
    SLOT = 1


class ScatteredJob(IntEnum):
    """Fields of a job: its first fragment, and the column of each filter."""

    FRAGMENT_BEGIN = 0
    COLUMN = 1
