# SPDX-License-Identifier: Apache-2.0
"""Cases of the wide kernel for `shim`, with tables that are made here by the words of wide.h.

The engine's own tables come from `wide_lowering`; these are another reading of the same header, so
that a mistake in both is needed for a wrong one to pass. Segments and blocks are 64 filters and
channels in their order; what has no live weight has no step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from shim import ACTS, CODES, Case, activate, height_width, last
from torch import Tensor

from hetconv_kernels.backends.cuda.fields import WideClass
from hetconv_kernels.testing import error_bound

COLUMNS, SLAB = 8, 4096


@dataclass(frozen=True)
class Layer:
    """A convolution: a mask, alike strides and paddings along both axes, and the size of x."""

    mask: np.ndarray  # bool [F, C, KH, KW]
    size: tuple[int, int]
    stride: int = 1
    padding: int = 1

    def output(self) -> tuple[int, int]:
        """Returns the size of y."""
        sizes = zip(self.size, self.mask.shape[2:], strict=True)
        height, width = ((n + 2 * self.padding - k) // self.stride + 1 for n, k in sizes)
        return height, width


@dataclass(frozen=True)
class Axis:
    """One axis of a class: taps by number and what they read, counted from `base`."""

    pixels: int
    load: int
    base: int
    taps: tuple[tuple[int, int], ...]  # tap of the kernel, offset from the base
    store: int
    first: int

    @property
    def reach(self) -> int:
        return max((offset for _, offset in self.taps), default=0) + 1


def axes(layer: Layer, axis: int, back: bool) -> list[Axis]:
    """Lists the classes along one axis."""
    kernel, stride, padding = layer.mask.shape[2 + axis], layer.stride, layer.padding
    if not back:
        taps = tuple((k, k) for k in range(kernel))
        return [Axis(layer.output()[axis], stride, -padding, taps, 1, 0)]
    found = []
    for residue in range(stride):
        reads = [
            (k, (residue + padding - k) // stride)
            for k in range(kernel)
            if (residue + padding - k) % stride == 0
        ]
        base = min((offset for _, offset in reads), default=0)
        pixels = -(-(layer.size[axis] - residue) // stride)
        moved = tuple((k, offset - base) for k, offset in reads)
        found.append(Axis(pixels, 1, base, moved, stride, residue))
    return found


def wide_case(
    layer: Layer,
    batch: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    back: bool = False,
    act: str = "none",
    epilogue: tuple[str, ...] = (),
    pixels: int = 64,
    images: int = 1,
    stages: int = 2,
    slots: int = 2,
    cluster: int = 1,
    grid: int = 2,
    flat: bool = False,
) -> Case:
    """Makes a case of fprop or dgrad; `epilogue` out of scale, shift and residual.

    `flat` flattens rows, for layers whose pixels read neighbours.
    """
    mask = layer.mask.transpose(1, 0, 2, 3) if back else layer.mask
    filters, channels = mask.shape[:2]
    read, written = layer.size, layer.output()
    if back:
        read, written = written, read
    classes = [(r, c) for r in axes(layer, 0, back) for c in axes(layer, 1, back)]
    apart = []
    if flat:
        ((rows, cols),) = classes
        apart = [_apart(rows, read[0], 4), _apart(cols, read[1], 8)]
        images = batch
    tables = _tables(mask, classes, back, pixels, images, read, apart)
    x = torch.randn(batch, channels, *read).to(dtype)
    w = torch.randn(layer.mask.shape).to(dtype)
    w = torch.where(torch.as_tensor(layer.mask), w, torch.zeros((), dtype=dtype))
    extras = {name: torch.randn(filters) for name in ("scale", "shift") if name in epilogue}
    if "residual" in epilogue:
        extras["residual"] = torch.randn(batch, filters, *written).to(dtype)
    exact, most = (_apply(layer, *pair, back) for pair in ((x, w), (x.abs(), w.abs())))
    for name, of in (("exact", False), ("most", True)):
        value = most if of else exact
        terms = {k: v.double().abs() if of else v.double() for k, v in extras.items()}
        if "scale" in terms:
            value = value * terms["scale"][:, None, None]
        if "shift" in terms:
            value = value + terms["shift"][:, None, None]
        if "residual" in terms:
            value = value + terms["residual"]
        if name == "exact":
            exact = value
        else:
            most = value
    bound = 1.2 * error_bound(most, channels * mask[0, 0].size, dtype)
    plane = max(line[WideClass.HALO_H] * line[WideClass.ROW_PITCH] for line in tables["classes"])
    plane += (1 - plane) % 8
    numbers = {
        "kind": 2,
        "dtype": CODES[dtype],
        "w_dtype": CODES[dtype],
        "act": ACTS.index(act),
        "x_n": height_width((channels, *read)),
        "x_h": read[1] * channels,
        "x_w": channels,
        "y_n": height_width((filters, *written)),
        "y_h": written[1] * filters,
        "y_w": filters,
        "batch": batch,
        "image_h": read[0],
        "image_w": read[1],
        "class_count": len(tables["classes"]),
        "pairs": len(tables["rows"]),
        "pixels": pixels,
        "flat_pitch": apart[1] if flat else 0,
        "plane_pitch": plane,
        "stages": stages,
        "slots": slots,
        "cluster": cluster,
        "grid": grid,
        "shared": stages * plane * 128 + slots * 16384 + 18432 + 16 * (stages + 2 * slots + 1),
    }
    arrays: dict[str, Any] = {
        "x": last(x),
        "w": w,
        "result": torch.full((batch, *written, filters), torch.nan).to(dtype),
        **tables,
        **{name: last(t) if t.dim() == 4 else t for name, t in extras.items()},
    }
    name = f"{layer.mask.shape} {layer} {batch} {dtype} back={back} {act} {epilogue} {pixels}"
    expected = activate(act, exact)
    return Case(name, numbers, arrays, last(expected), last(bound), dtype)


def _tables(
    mask: np.ndarray,
    classes: list[tuple[Axis, Axis]],
    back: bool,
    pixels: int,
    images: int,
    image: tuple[int, int],
    apart: list[int],
) -> dict[str, np.ndarray]:
    rows_of_tile = pixels // COLUMNS
    filters, channels = mask.shape[:2]
    segments, blocks = -(-filters // 64), -(-channels // 64)
    pairs = -(-segments // 2)
    lines: dict[str, list[list[int]]] = {"classes": [], "heads": [], "blocks": []}
    steps, source = [], []
    for rows, cols in classes:
        several = images if -(-rows.pixels // rows_of_tile) == 1 else 1
        pitch = rows_of_tile
        if several > 1:
            needed = (rows.pixels - 1) * rows.load + rows.reach + min(rows.base, 0)
            pitch = -(-max(image[0] - rows.base, needed) // rows.load)
            several = min(several, 1 + (rows_of_tile - rows.pixels) // pitch)
        halo_w = 7 * cols.load + cols.reach
        half = 0 if cols.load == 1 else -(-halo_w // 2)
        row_pitch = halo_w if cols.load == 1 else 2 * half
        tiles = -(-rows.pixels // rows_of_tile), -(-cols.pixels // 8)
        halo_h = (rows_of_tile - 1) * rows.load + rows.reach
        if apart:
            several, pitch, row_pitch = images, *apart
            tiles = -(-images * pitch * row_pitch // pixels), 1
            halo_h = -(-(pixels + (rows.reach - 1) * row_pitch + cols.reach - 1) // 8)
        lines["classes"].append(
            [
                *(rows.pixels, cols.pixels, *tiles),
                *(several, pitch, rows.load, cols.load, rows.base, cols.base),
                *(halo_h, *((8, 8) if apart else (halo_w, row_pitch)), half),
                *(rows.store, cols.store, rows.first, cols.first),
            ]
        )
        for pair in range(pairs):
            lines["heads"].append([len(lines["blocks"]), blocks])
            for block in range(blocks):
                chunks = [c if c < channels // 8 else -1 for c in range(8 * block, 8 * block + 8)]
                line = list(chunks)
                for segment in (2 * pair, 2 * pair + 1):
                    part = mask[64 * segment : 64 * segment + 64, 64 * block : 64 * block + 64]
                    begin = len(steps)
                    for ky, y in rows.taps:
                        for kx, x in cols.taps:
                            if part.size == 0 or not part[:, :, ky, kx].any():
                                continue
                            column = x % cols.load * half + x // cols.load
                            steps.append(y * row_pitch + column)
                            source.append(_slab(mask, back, segment, block, ky, kx))
                    line += [begin, len(steps) - begin]
                lines["blocks"].append([*line, *_unread(mask, pair, block, rows, cols)])
    first = np.arange(pairs * 16).reshape(pairs, 2, 8) * 8
    return {
        **{name: np.array(table, np.int32) for name, table in lines.items()},
        "steps": np.array(steps, np.int32),
        "rows": np.where(first < filters, first, -1).astype(np.int32),
        "source": np.concatenate(source).astype(np.int32),
    }


def _apart(axis: Axis, size: int, least: int) -> int:
    """Searches how near rows, or images, may follow each other, see wide.h."""

    def shared(pitch: int) -> bool:
        ends = [i + offset for i in range(axis.pixels) for _, offset in axis.taps]
        padding = lambda k: not 0 <= axis.base + k < size  # noqa: E731
        return all(padding(k) and axis.base + k - pitch < 0 for k in ends if k >= pitch)

    pitch = max(least, axis.pixels, size - axis.base)
    while not shared(pitch):
        pitch += 1
    return pitch


def _unread(mask: np.ndarray, pair: int, block: int, rows: Axis, cols: Axis) -> list[int]:
    """Counts rows above and below, columns left and right, that no weight of a block is for."""
    live = mask[128 * pair : 128 * pair + 128, 64 * block : 64 * block + 64]
    found = []
    for axis, others, along in ((rows, cols, 0), (cols, rows, 1)):
        read = [
            offset
            for k, offset in axis.taps
            for other, _ in others.taps
            if live[:, :, *((k, other) if along == 0 else (other, k))].any()
        ]
        found += [min(read), axis.reach - 1 - max(read)] if read else [0, 0]
    return found


def _slab(mask: np.ndarray, back: bool, segment: int, block: int, ky: int, kx: int) -> np.ndarray:
    """Lists where one step's weights lie in the dense weight."""
    k, half, f8, f1, c1 = np.ix_(*(range(n) for n in (4, 2, 8, 8, 8)))
    f, c = 64 * segment + f8 * 8 + f1, 64 * block + k * 16 + half * 8 + c1
    f, c = np.broadcast_arrays(f, c)
    inside = (f < mask.shape[0]) & (c < mask.shape[1])
    f, c = np.where(inside, f, 0), np.where(inside, c, 0)
    outer, inner, count = (c, f, mask.shape[0]) if back else (f, c, mask.shape[1])
    height, width = mask.shape[2:]
    place = ((outer * count + inner) * height + ky) * width + kx
    found: np.ndarray = np.where(inside, place, -1).reshape(-1)
    return found


def _apply(layer: Layer, x: Tensor, w: Tensor, back: bool) -> Tensor:
    x, w = x.double(), w.double()
    how = {"stride": layer.stride, "padding": layer.padding}
    if not back:
        return torch.nn.functional.conv2d(x, w, **how)
    shape = (len(x), layer.mask.shape[1], *layer.size)
    found: Tensor = torch.nn.grad.conv2d_input(shape, w, x, **how)
    return found
