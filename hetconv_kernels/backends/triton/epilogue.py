# SPDX-License-Identifier: Apache-2.0
"""The epilogue of fprop's kernels: scale, shift, residual and activation of a tile, then its store.

A tile has its filters on one axis and its pixels on the other; AXIS is that of the pixels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fields import FIRST_H, FIRST_W, STORE_H, STORE_W, Y_C, Y_H, Y_N, Y_W


@triton.jit
def activate(z, ACT: tl.constexpr):
    """Applies an activation in float32."""
    if ACT == "relu":
        z = tl.where(z < 0, 0.0, z)  # as PyTorch: NaN stays NaN
    elif ACT == "relu6":
        z = tl.where(z < 0, 0.0, z)
        z = tl.where(z > 6, 6.0, z)
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    elif ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def segment_filters(rows, segment, BF: tl.constexpr, ROW_UNIT: tl.constexpr, SCATTER: tl.constexpr):
    """Returns the filters of a segment, and which of its tile's there are."""
    if SCATTER:
        f = tl.load(rows + segment * BF + tl.arange(0, BF))
        known = f >= 0
    else:
        f = tl.load(rows + segment) * ROW_UNIT + tl.arange(0, BF)
        known = f < tl.load(rows + segment + 1) * ROW_UNIT
    return f, known


@triton.jit
def scaled(acc, f, known, scale, shift, AXIS: tl.constexpr):
    """Scales and shifts the filters of a tile."""
    if scale is not None:
        factor = tl.load(scale + f, mask=known, other=0.0).to(tl.float32)
        acc = acc * tl.expand_dims(factor, AXIS)
    if shift is not None:
        term = tl.load(shift + f, mask=known, other=0.0).to(tl.float32)
        acc = acc + tl.expand_dims(term, AXIS)
    return acc


@triton.jit
def places_written(table, image, i, j, ROW_UNIT: tl.constexpr):
    """Returns where in y the first filter of the pixels of a class stands."""
    row = i * tl.load(table + STORE_H).to(tl.int32) + tl.load(table + FIRST_H).to(tl.int32)
    col = j * tl.load(table + STORE_W).to(tl.int32) + tl.load(table + FIRST_W).to(tl.int32)
    return (
        image.to(tl.int64) * tl.load(table + Y_N)
        + row * tl.load(table + Y_H)
        + col * tl.load(table + Y_W)
    ) * ROW_UNIT


@triton.jit
def store_tile(
    acc,
    y,
    table,
    rows,
    segment,
    image,
    i,
    j,
    inside,
    scale,
    shift,
    residual,
    BF: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    LAST: tl.constexpr,
    SCATTER: tl.constexpr,
    ACT: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Finishes a tile and stores it by pointers.

    Args:
        acc: sums of products.  # float32 [BF, pixels] or, where AXIS is 0, [pixels, BF]
        y: result.
        table: `geometry.GATHER_LINE` of the tile's class.
        rows: as in the kernels.
        segment: of the tile's filters.
        image: of each pixel, as are the next three.
        i: its row in its class.
        j: its column there.
        inside: whether there is such a pixel.
        scale: per filter, or None.  # [F]
        shift: per filter, or None.  # [F]
        residual: laid out as y, or None.
        BF: filters of a tile.
        ROW_UNIT: divides the strides of y and the first filters of segments.
        LAST: whether the filters of y are adjacent in memory.
        SCATTER: whether a segment's filters are listed one by one.
        ACT: the activation.
        AXIS: that of the pixels in `acc`.
    """
    f, known = segment_filters(rows, segment, BF, ROW_UNIT, SCATTER)
    out = tl.expand_dims(places_written(table, image, i, j, ROW_UNIT), 1 - AXIS)
    if LAST:
        target = out + tl.expand_dims(f, AXIS)
    else:
        target = out + tl.expand_dims(f, AXIS) * tl.load(table + Y_C)
    written = tl.expand_dims(inside, 1 - AXIS) & tl.expand_dims(known, AXIS)
    acc = scaled(acc, f, known, scale, shift, AXIS)
    if residual is not None:
        acc = acc + tl.load(residual + target, mask=written, other=0.0).to(tl.float32)
    acc = activate(acc, ACT)
    tl.store(y + target, acc.to(y.dtype.element_ty), mask=written)
