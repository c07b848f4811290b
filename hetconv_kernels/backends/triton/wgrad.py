# SPDX-License-Identifier: Apache-2.0
"""The portable wgrad kernels: one product dyᵀ·x over pixels for each step, then a fixed-order sum.

The pixels are cut into splits so that all processors have work; each split leaves its own float32
partial, and `reduce_kernel_splits` adds them in order, so two runs agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_words import channel_block, tap_col, tap_row
from .fields import (
    WGRAD_CHANNELS,
    WGRAD_DILATION_H,
    WGRAD_DILATION_W,
    WGRAD_FILTERS,
    WGRAD_FIRST,
    WGRAD_HEIGHT,
    WGRAD_IMAGE_H,
    WGRAD_IMAGE_W,
    WGRAD_PAD_H,
    WGRAD_PAD_W,
    WGRAD_PARTIAL,
    WGRAD_PIXELS,
    WGRAD_SPLIT,
    WGRAD_STRIDE_H,
    WGRAD_STRIDE_W,
    WGRAD_WIDTH,
    WGRAD_X_C,
    WGRAD_X_H,
    WGRAD_X_N,
    WGRAD_X_W,
    WGRAD_Y_C,
    WGRAD_Y_H,
    WGRAD_Y_N,
    WGRAD_Y_W,
)
from .fprop import multiply


@triton.jit
def tap_shift(word, geometry, dilation_w):
    """Returns the row and column of x that the tap of a job reads for the pixel (0, 0) of y."""
    shift_h = tap_row(word) * tl.load(geometry + WGRAD_DILATION_H).to(tl.int32)
    shift_h -= tl.load(geometry + WGRAD_PAD_H).to(tl.int32)
    shift_w = tap_col(word) * dilation_w - tl.load(geometry + WGRAD_PAD_W).to(tl.int32)
    return shift_h, shift_w


@triton.jit
def load_tap(lanes, at, row_seen, col, image_w, channel_live):
    """Loads the channels of x that a tap reads, zero outside the image.

    Args:
        lanes: pointers to the channels.  # [1, BC]
        at: places of the pixels.  # [BP]
        row_seen: whether the tap's row lies in the image, for each pixel.
        col: the tap's column.
        image_w: columns of the image.
        channel_live: whether there is such a channel.  # [BC]
    """
    seen = row_seen & (col >= 0) & (col < image_w)
    return tl.load(lanes + at[:, None], mask=seen[:, None] & channel_live[None, :], other=0.0)


@triton.jit
def wgrad_kernel_gather(
    dy,
    x,
    partials,
    words,
    owners,
    rows,
    geometry,
    BP: tl.constexpr,
    BF: tl.constexpr,
    BC: tl.constexpr,
    TAPS: tl.constexpr,
    UNIT: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    LAST_X: tl.constexpr,
    LAST_Y: tl.constexpr,
    SCATTER: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Computes the partial gradient of one step's slab, or of TAPS adjacent steps' slabs.

    Args:
        dy: gradient of y, any strides.  # [N, F, OH, OW]
        x: activations, any strides.  # [N, C, H, W]
        partials: result, by split, launch and job.  # float32 [splits, ..., jobs, TAPS, BF, BC]
        words: of the first step of each job (see `words`).  # int32
        owners: segment of each job.  # int32
        rows: filters of each segment, -1 for none (SCATTER), or the first of each over ROW_UNIT.
        geometry: `geometry.WGRAD_LINE`.  # int64
        BP: pixels of a step of the loop.
        BF: filters of a slab.
        BC: channels of a slab.
        TAPS: adjacent tap columns that share the reading of dy.
        UNIT: divides all strides of x but that of the channels.
        ROW_UNIT: the same for dy and the first filters of segments.
        LAST_X: whether the channels of x are adjacent in memory.
        LAST_Y: whether the filters of dy are adjacent in memory.
        SCATTER: whether a segment's filters are listed one by one.
        PRECISION: of products of float32.
        INTERPRETED: whether Triton's interpreter runs this.
    """
    job = tl.program_id(0)
    height = tl.load(geometry + WGRAD_HEIGHT).to(tl.int32)
    width = tl.load(geometry + WGRAD_WIDTH).to(tl.int32)
    pixels = tl.load(geometry + WGRAD_PIXELS).to(tl.int32)
    split = tl.load(geometry + WGRAD_SPLIT).to(tl.int32)
    stride_h = tl.load(geometry + WGRAD_STRIDE_H).to(tl.int32)
    stride_w = tl.load(geometry + WGRAD_STRIDE_W).to(tl.int32)
    dilation_w = tl.load(geometry + WGRAD_DILATION_W).to(tl.int32)
    image_h = tl.load(geometry + WGRAD_IMAGE_H).to(tl.int32)
    image_w = tl.load(geometry + WGRAD_IMAGE_W).to(tl.int32)
    x_n = tl.load(geometry + WGRAD_X_N)
    x_h = tl.load(geometry + WGRAD_X_H)
    x_w = tl.load(geometry + WGRAD_X_W)
    y_n = tl.load(geometry + WGRAD_Y_N)
    y_h = tl.load(geometry + WGRAD_Y_H)
    y_w = tl.load(geometry + WGRAD_Y_W)

    word = tl.load(words + job)
    segment = tl.load(owners + job)
    shift_h, shift_w = tap_shift(word, geometry, dilation_w)
    channel = channel_block(word) * BC + tl.arange(0, BC)
    channel_live = channel < tl.load(geometry + WGRAD_CHANNELS).to(tl.int32) * UNIT
    if SCATTER:
        f = tl.load(rows + segment * BF + tl.arange(0, BF))
        known = f >= 0
    else:
        f = tl.load(rows + segment) * ROW_UNIT + tl.arange(0, BF)
        known = f < tl.load(geometry + WGRAD_FILTERS).to(tl.int32) * ROW_UNIT
    if LAST_Y:
        dy_lanes = dy + f[:, None]
    else:
        dy_lanes = dy + f[:, None] * tl.load(geometry + WGRAD_Y_C)
    if LAST_X:
        x_lanes = x + channel[None, :]
    else:
        x_lanes = x + channel[None, :] * tl.load(geometry + WGRAD_X_C)

    acc0 = tl.zeros((BF, BC), tl.float32)
    acc1 = acc0
    acc2 = acc0
    low = tl.program_id(1) * split
    for p in range(low, tl.minimum(low + split, pixels), BP):
        m = p + tl.arange(0, BP)
        inside = m < pixels
        image = m // (height * width)
        place = m - image * (height * width)
        i = place // width
        j = place - i * width
        at_y = (image.to(tl.int64) * y_n + i * y_h + j * y_w) * ROW_UNIT
        # Filters on rows: as [pixels, filters] this load would not be pipelined on sm_80.
        g = tl.load(dy_lanes + at_y[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        row = i * stride_h + shift_h
        col = j * stride_w + shift_w
        row_seen = inside & (row >= 0) & (row < image_h)
        at_x = (image.to(tl.int64) * x_n + row * x_h + col * x_w) * UNIT
        b = load_tap(x_lanes, at_x, row_seen, col, image_w, channel_live)
        acc0 = multiply(g, b, acc0, PRECISION, INTERPRETED)
        if TAPS == 3:
            col += dilation_w
            at_x += (dilation_w * x_w) * UNIT
            b = load_tap(x_lanes, at_x, row_seen, col, image_w, channel_live)
            acc1 = multiply(g, b, acc1, PRECISION, INTERPRETED)
            col += dilation_w
            at_x += (dilation_w * x_w) * UNIT
            b = load_tap(x_lanes, at_x, row_seen, col, image_w, channel_live)
            acc2 = multiply(g, b, acc2, PRECISION, INTERPRETED)

    store_slabs(partials, geometry, job, acc0, acc1, acc2, TAPS, BF, BC)


@triton.jit
def store_slabs(
    partials,
    geometry,
    job,
    acc0,
    acc1,
    acc2,
    TAPS: tl.constexpr,
    BF: tl.constexpr,
    BC: tl.constexpr,
):
    """Writes the partial gradients of a job, one for each tap, to their place in `partials`."""
    stride = tl.load(geometry + WGRAD_PARTIAL)
    first = tl.load(geometry + WGRAD_FIRST)
    cell = tl.arange(0, BF)[:, None] * BC + tl.arange(0, BC)[None, :]
    slab = partials + tl.program_id(1) * stride + first + job.to(tl.int64) * (TAPS * BF * BC)
    tl.store(slab + cell, acc0)
    if TAPS == 3:
        tl.store(slab + BF * BC + cell, acc1)
        tl.store(slab + 2 * BF * BC + cell, acc2)


@triton.jit
def reduce_kernel_splits(partials, places, dw, size, stride, splits, BLOCK: tl.constexpr):
    """Adds the splits in order and puts each weight's gradient in its place.

    Args:
        partials: of the splits.  # float32 [splits, stride]
        places: where each entry of dw lies in a split, -1 for a dead one.  # int32 [size]
        dw: result, in the order of its memory.
        size: entries of dw.
        stride: float32 values of one split.
        splits: how many.
        BLOCK: entries of one program.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    place = tl.load(places + at, mask=inside, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    pointers = partials + place
    for _ in range(splits):
        total += tl.load(pointers, mask=place >= 0, other=0.0)
        pointers += stride
    tl.store(dw + at, total.to(dw.dtype.element_ty), mask=inside)
