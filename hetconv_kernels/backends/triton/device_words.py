# SPDX-License-Identifier: Apache-2.0
"""Step words as kernels read them; `words` packs them, and has the widths of their fields."""

from __future__ import annotations

import triton
import triton.language as tl

from . import words

_TAP_BITS = tl.constexpr(words.TAP_BITS)
_LAST_TAP = tl.constexpr(words.MAX_TAPS - 1)
_LAST_BLOCK = tl.constexpr(words.MAX_BLOCKS - 1)
_BLOCK_SHIFT = tl.constexpr(2 * words.TAP_BITS)
_SLAB_SHIFT = tl.constexpr(words.SLAB_SHIFT)


@triton.jit
def tap_row(word):
    """Returns the tap row of a word of a step or of boxes, counted in taps."""
    return ((word >> _TAP_BITS) & _LAST_TAP).to(tl.int32)


@triton.jit
def tap_col(word):
    """Returns the tap column of a word of a step or of boxes, counted in taps."""
    return (word & _LAST_TAP).to(tl.int32)


@triton.jit
def channel_block(word):
    """Returns the channel block of a word of a step or of boxes."""
    block = word >> _BLOCK_SHIFT
    if word.dtype == tl.int64:
        block = block & _LAST_BLOCK  # the slab stands above
    return block.to(tl.int32)


@triton.jit
def slab(word):
    """Returns the slab of a word of boxes."""
    return (word >> _SLAB_SHIFT).to(tl.int32)
