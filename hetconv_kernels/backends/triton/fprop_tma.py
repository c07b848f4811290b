# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of fprop and dgrad: boxes of pixels by TMA, filters on M, pixels on N.

A host descriptor fetches a box of images × rows × columns × channels; what lies outside the image
reads zero, which is the padding. Reshaped and transposed it stays where it is: both operands feed
wgmma from shared memory. Boxes of several images fit small planes without waste.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_words import channel_block, slab, tap_col, tap_row
from .epilogue import activate, scaled, segment_filters, store_tile
from .fields import (
    BASE_H,
    BASE_W,
    CHANNELS,
    CLASS_FIELDS,
    HEIGHT,
    LISTS,
    LOAD_H,
    LOAD_W,
    PIXELS,
    SEGMENTS,
    TAP_H,
    TAP_W,
    WIDTH,
)
from .fprop import multiply


@triton.jit
def load_step(
    xd,
    word,
    image,
    at_h,
    at_w,
    base_h,
    base_w,
    tap_h,
    tap_w,
    channels,
    BK: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Loads the box of x that one step reads.

    Args:
        xd: as in the kernel.
        word: of the step.
        image: the tile's first one.
        at_h: row of x that the first tap of the tile's first pixel reads; FOLD: that pixel's own.
        at_w: its column.
        base_h: row of x that the first tap of the class's first pixel reads.
        base_w: its column.
        tap_h: rows from one tap to the next.
        tap_w: the same for columns.
        channels: of x.
        BK: channels of a step.
        FOLD: whether x is read at stride 2 through the parity fold.
    """
    shift_h = tap_row(word) * tap_h
    shift_w = tap_col(word) * tap_w
    c = channel_block(word) * BK
    if FOLD:
        # Pixel 2i + q lies at parity q & 1 of place i + (q >> 1), columns side by side.
        q_h = base_h + shift_h
        q_w = base_w + shift_w
        box = xd.load(
            [
                image,
                at_h + (q_h >> 1),
                q_h & 1,
                at_w + (q_w >> 1),
                (q_w & 1) * channels + c,
            ]
        )
    else:
        box = xd.load([image, at_h + shift_h, at_w + shift_w, c])
    return box


@triton.jit
def store_box(
    acc,
    yd,
    rd,
    rows,
    segment,
    image,
    first_h,
    first_w,
    scale,
    shift,
    BI: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BF: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    ACT: tl.constexpr,
):
    """Finishes a tile that its segment fills, and stores it by TMA: an epilogue without masks.

    Arguments are those of the kernel, the sums of products, and the tile's segment, first image,
    row and column.
    """
    f, known = segment_filters(rows, segment, BF, ROW_UNIT, False)
    acc = scaled(acc, f, known, scale, shift, 1)
    place = [image, first_h, first_w, tl.load(rows + segment) * ROW_UNIT]
    if rd is not None:
        more = rd.load(place).reshape(BI * BH * BW, BF).T
        acc = acc + more.to(tl.float32)
    acc = activate(acc, ACT)
    yd.store(place, acc.to(yd.dtype).T.reshape(BI, BH, BW, BF))


@triton.jit
def fprop_kernel_tma(
    xd,
    wd,
    yd,
    rd,
    y,
    words,
    starts,
    rows,
    geometry,
    scale,
    shift,
    residual,
    BI: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    FOLD: tl.constexpr,
    WHOLE: tl.constexpr,
    SCATTER: tl.constexpr,
    ACT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Computes tiles of act(scale · conv(x, w) + shift + residual), one after another.

    Args:
        xd: x as [N, H, W, C] in boxes [BI, BH, BW, BK]; FOLD: as [N, H/2, 2, W/2, 2C].
        wd: the slabs as [steps · BF, BK], in boxes [BF, BK].
        yd: y as [N, H, W, F] in boxes [BI, BH, BW, BF], if WHOLE.
        rd: the residual likewise, or None.
        y: the result itself.
        words: of the steps with their slabs (see `words`), and one spare.  # int64
        starts: first step of each segment of each list, and the end; then which list the tiles of
            a row and of a column run (see `borders`).  # int32
        rows: filters of each segment: all of them (SCATTER), or the first of each over ROW_UNIT.
        geometry: `geometry.GATHER_LINE` of each class, and the images.  # int64 [classes, fields]
        scale: per filter, or None.  # [F]
        shift: per filter, or None.  # [F]
        residual: laid out as y, or None.
        BI: images of a box.
        BH: rows of a box.
        BW: columns of a box.
        BF: filters of a tile.
        BK: channels of a step.
        ROW_UNIT: divides the strides of y and the first filters of segments.
        FOLD: whether x is read at stride 2 through the parity fold.
        WHOLE: whether every segment fills its tile and tiles are stored by TMA. A TMA store of a
            segment that does not would write over the filters of the next.
        SCATTER: whether a segment's filters are listed one by one.
        ACT: the activation.
        INTERPRETED: whether Triton's interpreter runs this.
    """
    table = geometry + tl.program_id(1) * CLASS_FIELDS
    segments = tl.load(table + SEGMENTS).to(tl.int32)
    height = tl.load(table + HEIGHT).to(tl.int32)
    width = tl.load(table + WIDTH).to(tl.int32)
    images = tl.load(table + PIXELS).to(tl.int32) // (height * width)
    load_h = tl.load(table + LOAD_H).to(tl.int32)
    load_w = tl.load(table + LOAD_W).to(tl.int32)
    base_h = tl.load(table + BASE_H).to(tl.int32)
    base_w = tl.load(table + BASE_W).to(tl.int32)
    tap_h = tl.load(table + TAP_H).to(tl.int32)
    tap_w = tl.load(table + TAP_W).to(tl.int32)
    channels = tl.load(table + CHANNELS).to(tl.int32)
    tiles_h = (height + BH - 1) // BH
    tiles_w = (width + BW - 1) // BW
    tiles = ((images + BI - 1) // BI) * tiles_h * tiles_w
    lists = starts + tl.load(table + LISTS)

    for t in tl.range(tl.program_id(0), tiles * segments, tl.num_programs(0)):
        segment = t % segments
        block = t // segments
        place_w = block % tiles_w
        first_w = place_w * BW
        rest = block // tiles_w
        place_h = rest % tiles_h
        first_h = place_h * BH
        image = (rest // tiles_h) * BI
        at_h = first_h
        at_w = first_w
        if not FOLD:
            at_h = first_h * load_h + base_h
            at_w = first_w * load_w + base_w
        number = tl.load(lists + place_h) + tl.load(lists + tiles_h + place_w)
        first = number * segments + segment
        start = tl.load(starts + first)
        end = tl.load(starts + first + 1)
        acc = tl.zeros((BF, BI * BH * BW), tl.float32)
        word = tl.load(words + start)
        for s in range(start, end):
            following = tl.load(words + s + 1)  # one step ahead, see `fprop`
            box = load_step(
                xd, word, image, at_h, at_w, base_h, base_w, tap_h, tap_w, channels, BK, FOLD
            )
            b = box.reshape(BI * BH * BW, BK)
            a = wd.load([slab(word) * BF, 0])
            acc = multiply(a, b.T, acc, "tf32", INTERPRETED)
            word = following

        if WHOLE:
            store_box(
                acc, yd, rd, rows, segment, image, first_h, first_w, scale, shift, BI, BH, BW, BF,
                ROW_UNIT, ACT,
            )  # fmt: skip
        else:
            p = tl.arange(0, BI * BH * BW)
            n = image + p // (BH * BW)
            i = first_h + (p // BW) % BH
            j = first_w + p % BW
            inside = (n < images) & (i < height) & (j < width)
            store_tile(
                acc, y, table, rows, segment, n, i, j, inside, scale, shift, residual, BF, ROW_UNIT,
                True, SCATTER, ACT, 1,
            )  # fmt: skip
