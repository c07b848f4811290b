# SPDX-License-Identifier: Apache-2.0
"""Step words as kernels read them; `words` packs them, and has the widths of their fields."""

from __future__ import annotations

import triton
import triton.language as tl

from . import words

TAP_BITS = tl.constexpr(words.TAP_BITS)
LAST_TAP = tl.constexpr(words.MAX_TAPS - 1)
LAST_BLOCK = tl.constexpr(words.MAX_BLOCKS - 1)
BLOCK_SHIFT = tl.constexpr(2 * words.TAP_BITS)
SLAB_SHIFT = tl.constexpr(words.SLAB_SHIFT)


@triton.jit
def tap_row(word):
    """Returns the tap row of a word of a step or of boxes, counted in taps."""
    return ((word >> TAP_BITS) & LAST_TAP).to(tl.int32)


@triton.jit
def tap_col(word):
    """Returns the tap column of a word of a step or of boxes, counted in taps."""
    return (word & LAST_TAP).to(tl.int32)


@triton.jit
def channel_block(word):
    """Returns the channel block of a word of a step or of boxes."""
    block = word >> BLOCK_SHIFT
    if word.dtype == tl.int64:
        block = block & LAST_BLOCK  # the slab stands above
    return block.to(tl.int32)


@triton.jit
def slab(word):
    """Returns the slab of a word of boxes."""
    return (word >> SLAB_SHIFT).to(tl.int32)
