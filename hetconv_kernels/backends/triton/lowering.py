# SPDX-License-Identifier: Apache-2.0
"""Lowering: a Plan as the integer tables that the kernels read, and where each weight is packed.

A step is one tap and one whole block of channels; its slab is [filters, channels]. dgrad lowers the
transposed Support. At a stride its pixels fall into residue classes: row i of dx meets tap k only
where (i + pad − d·k) mod stride = 0, so class r has the taps with d·k mod stride = r, and within it
dx is a stride-1 gather of dy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...masks import Int32Array, IntArray
from ...support import Support
from ..gpu.axes import Residue
from ..gpu.places import memory_places
from .plan import Block, Plan
from .words import step_words


class Lowering:
    """A Support lowered to the tables of fprop's kernel.

    Args:
        support: what is convolved with; for dgrad the layer's own, which is transposed here.
        filters: rows of a slab.
        channels: columns of a slab.
        reorder: whether channels with the same readers are brought together, at the cost of a
            gather of the activations where that changes their order.
        classes: for dgrad, the residue classes of rows and of columns.
        coarse: whether all filters read what any of them reads, the rest being explicit zeros;
            exact for finite values, and faster where many ragged groups fill tiles badly.

    Attributes:
        plan: the Plan that this is a form of.
        words: of the steps (see `words`), and a spare one.
        starts: first step of each segment, class by class, and the end.
        gather: the order in which channels have to be read, None when it is their own.
        rows: filters of each segment, -1 filling up; None when they are in their own order.
    """

    def __init__(
        self,
        support: Support,
        filters: int,
        channels: int,
        reorder: bool = True,
        classes: tuple[Sequence[Residue], Sequence[Residue]] | None = None,
        coarse: bool = False,
    ) -> None:
        self.support, self.transposed, self.coarse = support, classes is not None, coarse
        block = Block(filters, channels, align=channels)
        lowered = support.transpose() if self.transposed else support
        if coarse:
            lowered = coarsened(lowered)
        self.plan = Plan(lowered, block, reorder=reorder)
        kh, kw = support.kernel
        steps, self.segments = self.plan.steps, len(self.plan.segments) - 1
        if classes is None:
            kind, row, col = np.zeros(len(steps), np.int64), steps["dy"], steps["dx"]
            self.classes = 1
        else:
            class_h, place_h = _places(classes[0], kh)
            class_w, place_w = _places(classes[1], kw)
            dy, dx = kh - 1 - steps["dy"], kw - 1 - steps["dx"]  # transposing flipped them
            kind, row, col = class_h[dy] * len(classes[1]) + class_w[dx], place_h[dy], place_w[dx]
            self.classes = len(classes[0]) * len(classes[1])
        owner = kind * self.segments + self.plan.owner
        self._order = np.argsort(owner, kind="stable")
        blocks = steps["channel"] // channels
        words = step_words(blocks, row, col)[self._order]
        self.words: Int32Array = np.append(words, np.int32(0))
        counts = np.bincount(owner, minlength=self.classes * self.segments)
        self.starts: Int32Array = np.append(0, np.cumsum(counts)).astype(np.int32)
        self.gather = unless_identity(self.plan.cols)
        self.rows = None if unless_identity(self.plan.rows) is None else self.plan.padded_rows

    @property
    def steps(self) -> int:
        """How many steps, and slabs, there are."""
        return len(self.plan.steps)

    def source(self, form: str) -> Int32Array:
        """Lists where each packed weight lies in the memory of the canonical weight; -1 is a zero.

        Args:
            form: ``"contiguous"`` or ``"channels_last"`` for a dense weight, or ``"live"``.

        Returns:
            One place for each element of the slabs.  # int32 [steps, filters, channels]
        """
        found = slab_positions(self.plan)[self._order]
        if self.transposed:
            found = _untransposed(found, self.support)
        found = only_live(found, self.support)
        return memory_places(found, self.support, form)


def coarsened(support: Support) -> Support:
    """Returns the Support whose every filter reads what any filter of this one reads."""
    mask = support.mask
    return Support.from_mask(np.broadcast_to(mask.any(axis=0), mask.shape), "coarsened")


def only_live(positions: IntArray, support: Support) -> IntArray:
    """Takes out the positions of dead weights, which a coarsened Plan has slots for."""
    live = support.mask.reshape(-1)[positions] & (positions >= 0)
    return np.where(live, positions, -1)


def slab_positions(plan: Plan) -> IntArray:
    """Lists the flat dense position of each weight of whole slabs; -1 is a zero.

    # int [steps, filters, channels]
    """
    counts = plan.steps["count"].astype(np.int64)
    found = np.full((len(counts), plan.block.filters, plan.block.channels), -1)
    step = np.repeat(np.arange(len(counts)), counts)
    column = np.arange(len(step)) - np.repeat(np.cumsum(counts) - counts, counts)
    found[step, :, column] = plan.slab_source.reshape(-1, plan.block.filters)
    return found


def _untransposed(positions: IntArray, support: Support) -> IntArray:
    """Turns positions in the transposed, flipped weight into those in the weight itself."""
    f, c, kh, kw = support.shape
    own = np.arange(f * c * kh * kw).reshape(f, c, kh, kw)
    flat = np.ascontiguousarray(own.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]).reshape(-1)
    return np.where(positions < 0, -1, flat[positions])


def _places(classes: Sequence[Residue], taps: int) -> tuple[IntArray, IntArray]:
    """Returns the class of each tap of an axis, and its place among the taps of that class."""
    owner, place = np.zeros(taps, np.int64), np.zeros(taps, np.int64)
    for number, residue in enumerate(classes):
        for index, tap in enumerate(residue.taps):
            owner[tap], place[tap] = number, index
    return owner, place


def unless_identity(order: IntArray) -> IntArray | None:
    """Returns an order; None where it changes nothing."""
    return None if np.array_equal(order, np.arange(len(order))) else order
