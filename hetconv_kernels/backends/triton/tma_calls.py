# SPDX-License-Identifier: Apache-2.0
"""Calls on boxes: the host descriptors of the operands, and the launches that read them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import unit
from ..gpu.capture import upload
from .borders import borders
from .choice import folds
from .fprop_tma import fprop_kernel_tma
from .launch import Launch, interpreted
from .prepared import MOST_KEPT
from .tiles import Tile, box_stages, box_warps
from .wgrad_tma import wgrad_kernel_tma

if TYPE_CHECKING:
    from .calls import GatherCall
    from .wgrad_calls import WgradCall, WgradLaunch
    from .wgrad_lowering import Jobs


class Address:
    """Stands for a tensor in a descriptor that is kept, so that its memory is not.

    Attributes:
        dtype: of the tensor.
    """

    __slots__ = ("_place", "dtype")

    def __init__(self, tensor: Tensor) -> None:
        self._place, self.dtype = tensor.data_ptr(), tensor.dtype

    def data_ptr(self) -> int:
        """Returns where the tensor was."""
        return self._place


class Descriptor:
    """Makes the descriptors of one operand, one for each address; the rest is checked once.

    These are Triton's own, for launches that are left to it; see `prepared`.

    Args:
        tensor: an example.
        shape: of the view that is read or written.
        strides: of that view.
        block: its boxes.
    """

    def __init__(
        self, tensor: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]
    ) -> None:
        # An axis of one place is never stepped along; its stride only has to be a legal one: 16
        # bytes, and beyond the axes inside.
        legal = 16 // tensor.element_size()
        used, inner = [1], shape[-1]
        for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
            used.insert(0, stride if size > 1 else -(-inner // legal) * legal)
            inner = used[0] * size
        self._made = TensorDescriptor(tensor, list(shape), used, list(block))
        self._made.base = None
        self._interpreted = interpreted()
        self._kept: dict[int, Any] = {}

    def __call__(self, tensor: Tensor) -> Any:
        """Returns the descriptor of a tensor laid out like the example."""
        place = tensor.data_ptr()
        found = self._kept.get(place)
        if found is None:
            found = copy.copy(self._made)
            if self._interpreted:  # it reads the tensor itself
                found.base = tensor
                return found
            found.base = Address(tensor)
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[place] = found
        return found


def bind_tma(call: GatherCall, x: Tensor, y: Tensor) -> Callable[..., None]:
    """Makes what depends on the strides of x: descriptors, table and the kernel's constants."""
    lowering, problem, choice = call.lowering, call.problem, call.choice
    tile, box = choice.tile, choice.box
    assert box is not None
    axes = call.axes
    folded = folds(problem, tile, x.stride()) and box.rows * box.cols > 1
    heads = lowering.plan.segments.tolist() if lowering.rows is None else []
    y_unit = unit(16 // x.element_size(), y, heads)
    spread = any(axis.store != 1 for pair in axes for axis in pair)
    sizes = set((lowering.plan.segments[1:] - lowering.plan.segments[:-1]).tolist())
    # A TMA store has no mask: a segment that is not full would write over the next one's filters.
    whole = sizes == {tile.filters} and lowering.rows is None and not spread
    if folded:
        (n, c, h, w), (x_n, _, x_h, x_w) = x.shape, x.stride()
        shape = [n, h // 2, 2, w // 2, 2 * c]
        strides = [x_n, 2 * x_h, x_h, 2 * x_w, 1]
        read = Descriptor(x, shape, strides, [box.images, box.rows, 1, box.cols, tile.channels])
    else:
        read = _image(x, (*box, tile.channels))
    written = _image(y, (*box, tile.filters)) if whole else None
    slabs_read = _slabs_descriptor(call, tile)
    tiles = max(
        -(-problem.batch // box.images) * -(-rows.pixels // box.rows) * -(-cols.pixels // box.cols)
        for rows, cols in axes
    )
    depth = box_stages(tile, x.element_size(), call.spec)
    used = (tile.pixels + tile.filters) * tile.channels * x.element_size() * depth
    at_once = call.spec.processors * max(1, call.spec.shared // (used + 16384))
    grid = (min(tiles * lowering.segments, at_once), len(axes))
    constants = (
        *box,
        tile.filters,
        tile.channels,
        y_unit,
        folded,
        whole,
        lowering.rows is not None,
        problem.act,
        interpreted(),
    )
    warps = box_warps(tile, whole)
    lists = borders(lowering, axes, call.image, box)
    rows, table = call.rows(y_unit), call.table(x, y, (1, y_unit), lists.places)
    words, starts = upload(lists.words, call.device), upload(lists.starts, call.device)
    fixed = dict(enumerate((words, starts, rows, table), 5))
    described = {0: read, 1: slabs_read} | ({} if written is None else {2: written, 3: written})
    launch = Launch(fprop_kernel_tma, grid, constants, warps, depth, call.device, fixed, described)

    def start(
        x: Tensor,
        slabs: Tensor,
        y: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
    ) -> None:
        if whole:
            launch(x, slabs, y, residual, y, scale, shift, None)
        else:
            launch(x, slabs, None, None, y, scale, shift, residual)

    return start


def bind_wgrad_tma(call: WgradCall, jobs: Jobs, dy: Tensor, x: Tensor, before: int) -> WgradLaunch:
    """Makes what depends on the strides of dy and x, for one launch of wgrad's jobs."""
    box, tile = call.choice.box, call.choice.tiles[jobs.taps != 3]
    assert box is not None
    y_unit = unit(16 // x.element_size(), dy, jobs.plan.segments.tolist())
    constants = (*box, tile.filters, tile.channels, jobs.taps, y_unit, interpreted())
    tables = call.tables(jobs, dy, x, (1, y_unit), 0, before)
    described = {0: _image(dy, (*box, tile.filters)), 1: _image(x, (*box, tile.channels))}
    return call.launch(wgrad_kernel_tma, jobs, tile, constants, tables, described)


def _image(x: Tensor, block: Sequence[int]) -> Descriptor:
    """Describes a channels_last tensor as [N, H, W, C]."""
    (n, c, h, w), (x_n, _, x_h, x_w) = x.shape, x.stride()
    return Descriptor(x, [n, h, w, c], [x_n, x_h, x_w, 1], block)


def _slabs_descriptor(call: GatherCall, tile: Tile) -> Descriptor:
    rows = max(call.lowering.steps, 1) * tile.filters
    like = call.words.new_empty((rows, tile.channels), dtype=call.problem.dtype)
    block = [tile.filters, tile.channels]
    return Descriptor(like, [rows, tile.channels], [tile.channels, 1], block)
