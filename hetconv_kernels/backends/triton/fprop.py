# SPDX-License-Identifier: Apache-2.0
"""The portable fprop kernel: pixels on M, filters on N, operands gathered by pointers.

One source serves sm_80 to sm_120. A program computes one tile of pixels × filters from the steps of
one segment: a step multiplies the activations of one block of channels, shifted by one tap, with
one packed slab. dgrad is the same kernel on the transposed Support (see `dgrad`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_words import channel_block, tap_col, tap_row
from .epilogue import store_tile
from .fields import (
    BASE_H,
    BASE_W,
    CHANNELS,
    CLASS_FIELDS,
    HEIGHT,
    IMAGE_H,
    IMAGE_W,
    LOAD_H,
    LOAD_W,
    PIXELS,
    SEGMENTS,
    TAP_H,
    TAP_W,
    TAPS,
    WIDTH,
    X_C,
    X_H,
    X_N,
    X_W,
)


@triton.jit
def pack_kernel_gather(w, source, slabs, size, BLOCK: tl.constexpr):
    """Packs weights: slabs[i] = w[source[i]], zero where the source is negative."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    place = tl.load(source + at, mask=inside, other=-1)
    value = tl.load(w + place, mask=place >= 0, other=0.0)
    tl.store(slabs + at, value.to(slabs.dtype.element_ty), mask=inside)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Adds a · b to acc. The interpreter multiplies bfloat16's bit patterns: it gets float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def pixels_of(block, height, width, pixels, BM: tl.constexpr):
    """Returns image, row and column of each pixel of a block, and which of them there are."""
    m = block * BM + tl.arange(0, BM)
    inside = m < pixels
    m = tl.minimum(m, pixels - 1)
    image = m // (height * width)
    place = m - image * (height * width)
    i = place // width
    j = place - i * width
    return image, i, j, inside


@triton.jit
def taps_seen(table, row, col, tap_h, tap_w, PADDED: tl.constexpr):
    """Returns which tap rows and columns of each pixel lie in the image, in bit k that of tap k.

    Args:
        table: `geometry.GATHER_LINE` of the class.
        row: that the first tap of each pixel reads.
        col: its column.
        tap_h: rows from one tap to the next.
        tap_w: the same for columns.
        PADDED: whether any lies outside; the bits are not read where not.
    """
    rows_seen = tl.zeros_like(row)
    cols_seen = tl.zeros_like(row)
    if PADDED:
        image_h = tl.load(table + IMAGE_H).to(tl.int32)
        image_w = tl.load(table + IMAGE_W).to(tl.int32)
        for k in range(tl.load(table + TAPS).to(tl.int32)):
            at_h = row + k * tap_h
            at_w = col + k * tap_w
            rows_seen |= ((at_h >= 0) & (at_h < image_h)).to(tl.int32) << k
            cols_seen |= ((at_w >= 0) & (at_w < image_w)).to(tl.int32) << k
    return rows_seen, cols_seen


@triton.jit
def sum_steps(
    x,
    slabs,
    words,
    starts,
    table,
    segments,
    segment,
    block,
    pixels,
    image,
    i,
    j,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UNIT: tl.constexpr,
    LAST: tl.constexpr,
    PADDED: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Adds up the products of a segment's steps for a block of pixels.

    Arguments are those of the kernel; the class's line, segments and pixels; which of its segments
    and blocks these are; and image, row and column of each pixel.

    Returns:
        The sums.  # float32 [BM, BN]
    """
    row = i * tl.load(table + LOAD_H).to(tl.int32) + tl.load(table + BASE_H).to(tl.int32)
    col = j * tl.load(table + LOAD_W).to(tl.int32) + tl.load(table + BASE_W).to(tl.int32)
    tap_h = tl.load(table + TAP_H).to(tl.int32)
    tap_w = tl.load(table + TAP_W).to(tl.int32)
    x_h = tl.load(table + X_H)
    x_w = tl.load(table + X_W)
    x_c = tl.load(table + X_C)
    base = (image.to(tl.int64) * tl.load(table + X_N) + row * x_h + col * x_w) * UNIT
    step_h = x_h * tap_h
    step_w = x_w * tap_w
    lane = tl.arange(0, BK)
    if LAST:
        pointers = x + (base[:, None] + lane[None, :])
    else:
        pointers = x + (base[:, None] + lane[None, :] * x_c)
    channels = tl.load(table + CHANNELS).to(tl.int32) * UNIT
    rows_seen, cols_seen = taps_seen(table, row, col, tap_h, tap_w, PADDED)

    first = tl.program_id(1) * segments + segment
    start = tl.load(starts + first)
    end = tl.load(starts + first + 1)
    # A class may have fewer tiles than the grid; such a program computes nothing.
    end = tl.where(block * BM < pixels, end, start)
    weights = slabs + start.to(tl.int64) * (BN * BK)
    weights += tl.arange(0, BN)[:, None] * BK + lane[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    # The word is read one step ahead; read where it is used, it would cost half the pipeline.
    word = tl.load(words + start)
    for s in range(start, end):
        following = tl.load(words + s + 1)
        k_h = tap_row(word)
        k_w = tap_col(word)
        channel = channel_block(word) * BK
        if LAST:
            offset = (k_h * step_h + k_w * step_w) * UNIT + channel
        else:
            offset = (k_h * step_h + k_w * step_w) * UNIT + channel * x_c
        if PADDED:
            seen = ((rows_seen >> k_h) & (cols_seen >> k_w) & 1) != 0
            if TAIL:
                live = seen[:, None] & (lane < channels - channel)[None, :]
            else:
                live = seen[:, None]
            a = tl.load(pointers + offset, mask=live, other=0.0)
        elif TAIL:
            a = tl.load(pointers + offset, mask=(lane < channels - channel)[None, :], other=0.0)
        else:
            a = tl.load(pointers + offset)
        b = tl.load(weights)
        acc = multiply(a, tl.trans(b), acc, PRECISION, INTERPRETED)
        weights += BN * BK
        word = following
    return acc


@triton.jit
def fprop_kernel_gather(
    x,
    slabs,
    y,
    words,
    starts,
    rows,
    geometry,
    scale,
    shift,
    residual,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UNIT: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    LAST: tl.constexpr,
    PADDED: tl.constexpr,
    TAIL: tl.constexpr,
    SCATTER: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Computes one tile of act(scale · conv(x, w) + shift + residual).

    Args:
        x: activations, any strides.  # [N, C, H, W]
        slabs: packed weights.  # [steps, BN, BK]
        y: result; written where the tile has pixels and filters.
        words: of the steps (see `words`), and one spare.  # int32
        starts: first step of each segment of each class, and the end.  # int32
        rows: filters of each segment: all of them (SCATTER), or the first of each over ROW_UNIT.
        geometry: `geometry.GATHER_LINE` of each class.  # int64 [classes, fields]
        scale: per filter, or None.  # [F]
        shift: per filter, or None.  # [F]
        residual: laid out as y, or None.
        BM: pixels of a tile.
        BN: filters of a tile.
        BK: channels of a step.
        UNIT: divides all strides of x but that of the channels; its vectors are this wide.
        ROW_UNIT: the same for y and the first filters of segments.
        LAST: whether the channels of x, and of y, are adjacent in memory.
        PADDED: whether a tap may lie outside the image.
        TAIL: whether the last block of channels is not full.
        SCATTER: whether a segment's filters are listed one by one.
        ACT: the activation.
        PRECISION: of products of float32.
        INTERPRETED: whether Triton's interpreter runs this.
    """
    table = geometry + tl.program_id(1) * CLASS_FIELDS
    segments = tl.load(table + SEGMENTS).to(tl.int32)
    height = tl.load(table + HEIGHT).to(tl.int32)
    width = tl.load(table + WIDTH).to(tl.int32)
    pixels = tl.load(table + PIXELS).to(tl.int32)
    tile = tl.program_id(0)
    # Segments vary fastest: the programs that read the same pixels run together.
    segment = tile % segments
    block = tile // segments
    image, i, j, inside = pixels_of(block, height, width, pixels, BM)
    acc = sum_steps(
        x, slabs, words, starts, table, segments, segment, block, pixels, image, i, j, BM, BN, BK,
        UNIT, LAST, PADDED, TAIL, PRECISION, INTERPRETED,
    )  # fmt: skip
    store_tile(
        acc, y, table, rows, segment, image, i, j, inside, scale, shift, residual, BN, ROW_UNIT,
        LAST, SCATTER, ACT, 0,
    )  # fmt: skip
