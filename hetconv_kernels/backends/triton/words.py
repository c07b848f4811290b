# SPDX-License-Identifier: Apache-2.0
"""Step words: what a step of a kernel reads, in the bits of one integer. Imports no Triton.

The tap's column is lowest, then the tap's row, then the channel block, 31 bits together. A step of
boxes has a word of 64 bits, with its slab in the upper half. `device_words` reads them in kernels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import BackendError, mismatch
from ...masks import Int32Array, IntArray

Int64Array = npt.NDArray[np.int64]
# Bits of a tap's row, and of its column; of a channel block; and below the slab.
TAP_BITS, BLOCK_BITS, SLAB_SHIFT = 5, 21, 32
# Taps along one axis, and channel blocks, that a step word holds.
MAX_TAPS, MAX_BLOCKS = 1 << TAP_BITS, 1 << BLOCK_BITS


def step_words(block: IntArray, row: IntArray, col: IntArray) -> Int32Array:
    """Packs channel block, tap row and tap column of each step.

    Taps are counted, not measured in pixels: a dilation of any size fits.

    Example: channel block 2 at tap row 1 and column 3 is 2·2¹⁰ + 1·2⁵ + 3:

        >>> words = step_words(np.array([2]), np.array([1]), np.array([3]))
        >>> words.tolist(), tap_rows(words).tolist(), tap_cols(words).tolist()
        ([2083], [1], [3])

    Raises:
        BackendError: a number is beyond its bits. Packed all the same, it would silently name
            another place.
    """
    limits = (("channel block", block, MAX_BLOCKS), ("tap row", row, MAX_TAPS))
    for name, values, limit in (*limits, ("tap column", col, MAX_TAPS)):
        if len(values) and not 0 <= values.min() <= values.max() < limit:
            raise BackendError(
                mismatch(
                    f"{name} of a step",
                    f"{values.min()} to {values.max()}",
                    f"0 to {limit - 1}",
                    "Use backend='auto' or backend='vendor'.",
                )
            )
    words: Int32Array = (block << 2 * TAP_BITS | row << TAP_BITS | col).astype(np.int32)
    return words


def box_words(words: Int32Array, slabs: IntArray) -> Int64Array:
    """Packs the slab of each step of boxes above its step word."""
    found: Int64Array = words.astype(np.int64) | slabs << SLAB_SHIFT
    return found


def tap_rows(words: IntArray | Int32Array) -> IntArray:
    """Returns the tap row of each word, of steps or of boxes."""
    rows: IntArray = words >> TAP_BITS & MAX_TAPS - 1
    return rows


def tap_cols(words: IntArray | Int32Array) -> IntArray:
    """Returns the tap column of each word, of steps or of boxes."""
    cols: IntArray = words & MAX_TAPS - 1
    return cols
