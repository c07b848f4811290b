# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of wgrad: boxes of pixels of dy and of x by TMA, one product for each tap.

What lies outside x reads zero, which is the padding; what lies outside dy (a box of images beyond
the last one) reads zero too and adds nothing. Three taps of a row share one box of dy. Boxes none
of whose pixels has a job's taps inside x are not visited.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_words import channel_block
from .fields import (
    WGRAD_DILATION_W,
    WGRAD_HEIGHT,
    WGRAD_IMAGE_H,
    WGRAD_IMAGE_W,
    WGRAD_PIXELS,
    WGRAD_STRIDE_H,
    WGRAD_STRIDE_W,
    WGRAD_WIDTH,
)
from .fprop import multiply
from .wgrad import store_slabs, tap_shift


@triton.jit
def seen_from(shift, edge, stride):
    """Returns the first tile of `edge` places with one that `shift` brings to 0 or beyond."""
    return (tl.maximum(-shift - (edge - 1) * stride, 0) + edge * stride - 1) // (edge * stride)


@triton.jit
def seen_until(shift, edge, stride, image):
    """Returns the tile after the last one with a place that `shift` leaves below `image`."""
    return (tl.maximum(image - shift, 0) + edge * stride - 1) // (edge * stride)


@triton.jit
def wgrad_kernel_tma(
    dyd,
    xd,
    partials,
    words,
    owners,
    rows,
    geometry,
    BI: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BF: tl.constexpr,
    BC: tl.constexpr,
    TAPS: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Computes the partial gradient of one step's slab, or of TAPS adjacent steps' slabs.

    Args:
        dyd: dy as [N, OH, OW, F] in boxes [BI, BH, BW, BF].
        xd: x as [N, H, W, C] in boxes [BI, BH, BW, BC].
        partials: result, by split, launch and job.  # float32 [splits, ..., jobs, TAPS, BF, BC]
        words: of the first step of each job (see `words`).  # int32
        owners: segment of each job.  # int32
        rows: the first filter of each segment, over ROW_UNIT.  # int32
        geometry: `geometry.WGRAD_LINE`; boxes are split evenly here.  # int64
        BI: images of a box.
        BH: rows of a box, a divisor of OH.
        BW: columns of a box, a divisor of OW.
        BF: filters of a slab.
        BC: channels of a slab.
        TAPS: adjacent tap columns that share the reading of dy.
        ROW_UNIT: divides the first filters of segments.
        INTERPRETED: whether Triton's interpreter runs this.
    """
    job = tl.program_id(0)
    height = tl.load(geometry + WGRAD_HEIGHT).to(tl.int32)
    width = tl.load(geometry + WGRAD_WIDTH).to(tl.int32)
    images = tl.load(geometry + WGRAD_PIXELS).to(tl.int32) // (height * width)
    stride_h = tl.load(geometry + WGRAD_STRIDE_H).to(tl.int32)
    stride_w = tl.load(geometry + WGRAD_STRIDE_W).to(tl.int32)
    dilation_w = tl.load(geometry + WGRAD_DILATION_W).to(tl.int32)
    image_h = tl.load(geometry + WGRAD_IMAGE_H).to(tl.int32)
    image_w = tl.load(geometry + WGRAD_IMAGE_W).to(tl.int32)

    word = tl.load(words + job)
    shift_h, shift_w = tap_shift(word, geometry, dilation_w)
    c = channel_block(word) * BC
    f = tl.load(rows + tl.load(owners + job)) * ROW_UNIT

    # The rectangle of tiles that this job's taps reach x from.
    from_h = seen_from(shift_h, BH, stride_h)
    from_w = seen_from(shift_w + (TAPS - 1) * dilation_w, BW, stride_w)
    until_h = tl.minimum(seen_until(shift_h, BH, stride_h, image_h), height // BH)
    until_w = tl.minimum(seen_until(shift_w, BW, stride_w, image_w), width // BW)
    tiles_h = tl.maximum(until_h - from_h, 0)
    tiles_w = tl.maximum(until_w - from_w, 0)
    tiles = ((images + BI - 1) // BI) * tiles_h * tiles_w
    split = (tiles + tl.num_programs(1) - 1) // tl.num_programs(1)
    acc0 = tl.zeros((BF, BC), tl.float32)
    acc1 = acc0
    acc2 = acc0
    low = tl.program_id(1) * split
    for t in range(low, tl.minimum(low + split, tiles)):
        first_w = (from_w + t % tiles_w) * BW
        rest = t // tiles_w
        first_h = (from_h + rest % tiles_h) * BH
        image = (rest // tiles_h) * BI
        g = dyd.load([image, first_h, first_w, f]).reshape(BI * BH * BW, BF).T
        at_h = first_h * stride_h + shift_h
        at_w = first_w * stride_w + shift_w
        b = xd.load([image, at_h, at_w, c]).reshape(BI * BH * BW, BC)
        acc0 = multiply(g, b, acc0, "tf32", INTERPRETED)
        if TAPS == 3:
            b = xd.load([image, at_h, at_w + dilation_w, c]).reshape(BI * BH * BW, BC)
            acc1 = multiply(g, b, acc1, "tf32", INTERPRETED)
            b = xd.load([image, at_h, at_w + 2 * dilation_w, c]).reshape(BI * BH * BW, BC)
            acc2 = multiply(g, b, acc2, "tf32", INTERPRETED)

    store_slabs(partials, geometry, job, acc0, acc1, acc2, TAPS, BF, BC)
