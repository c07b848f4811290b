# SPDX-License-Identifier: Apache-2.0
"""Lowering of wgrad: its jobs, and where each weight's gradient lies among their results."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...masks import Int32Array, IntArray
from ...support import Support
from ..gpu.places import memory_places
from .lowering import (
    coarsened,
    only_live,
    slab_positions,
    unless_identity,
)
from .plan import Block, Plan
from .words import step_words


class Jobs(NamedTuple):
    """The jobs of one launch of wgrad's kernel.

    Attributes:
        plan: whose slabs they compute.
        taps: adjacent tap columns that one job computes together.
        words: of the first tap of each job, as in `Lowering`.
        owners: segment of each job.
        positions: flat dense position of each gradient; -1 is none.  # [jobs, taps, BF, BC]
    """

    plan: Plan
    taps: int
    words: Int32Array
    owners: Int32Array
    positions: IntArray

    @property
    def rows(self) -> Int32Array | None:
        """Filters of each segment, -1 filling up; None when they are in their own order."""
        return None if unless_identity(self.plan.rows) is None else self.plan.padded_rows

    def adjacent(self, unit: int) -> bool:
        """Whether every segment's filters are adjacent and begin at a multiple of `unit`.

        A descriptor reads nothing else: a box begins at a multiple of 16 bytes.
        """
        return self.rows is None and not (self.plan.segments % unit).any()


class WgradLowering:
    """A Support lowered to the jobs of wgrad.

    Whole rows of three taps share their reading of dy, the rest goes tap by tap. HetConv so becomes
    its own groups, three taps at a time, and one product for the centre tap of the other channels.

    Args:
        support: which weights have gradients.
        fused: the slab of jobs of three taps.
        single: the slab of jobs of one tap.
        reorder: whether filters with the same columns, and channels with the same readers, are
            brought together, at the cost of a gather of dy or of x where that changes their order.
        coarse: as in `Lowering`.

    Attributes:
        parts: the jobs; at most two, none for a Support without weights.
        filters: the order in which the filters of dy have to be read, None when it is their own.
        channels: the same for the channels of x.
    """

    def __init__(
        self,
        support: Support,
        fused: Block,
        single: Block,
        reorder: bool = False,
        coarse: bool = False,
    ) -> None:
        self.support, self.coarse = support, coarse
        whole = coarsened(support) if coarse else support
        self.filters: IntArray | None = None
        self.channels: IntArray | None = None
        flat = np.arange(whole.mask.size).reshape(whole.shape)
        if reorder:
            plan = Plan(whole, fused)
            self.filters, self.channels = unless_identity(plan.rows), unless_identity(plan.cols)
            flat = flat[plan.rows][:, plan.cols]
            whole = Support.from_mask(whole.mask[plan.rows][:, plan.cols])
        self._flat = flat.reshape(-1)
        self.parts = self._lower(whole, fused, single)

    @property
    def size(self) -> int:
        """The gradients that all jobs compute, dead ones included."""
        return sum(part.positions.size for part in self.parts)

    def places(self, form: str) -> Int32Array:
        """Lists where the gradient of each weight lies among the partials of one split; -1 is dead.

        Args:
            form: as in `Lowering.source`.

        Returns:
            A place for each entry of the canonical weight, in the order of its memory.  # int32
        """
        support = self.support
        size = support.live if form == "live" else int(np.prod(support.shape))
        places = np.full(size, -1, np.int32)
        before = 0
        for part in self.parts:
            flat = memory_places(part.positions.reshape(-1), support, form)
            known = flat >= 0
            places[flat[known]] = before + np.flatnonzero(known)
            before += flat.size
        return places

    def _lower(self, whole: Support, fused: Block, single: Block) -> list[Jobs]:
        parts, left = [], whole.mask.copy()
        if whole.kernel[1] == 3:
            plan = Plan(whole, fused, reorder=False)
            steps = plan.steps
            keys = np.stack([plan.owner, steps["channel"], steps["dy"]], axis=1)
            _, line, size = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
            line = line.reshape(-1)
            order = np.lexsort((steps["dx"], line))
            triples = order[size[line[order]] == 3].reshape(-1, 3)
            if len(triples):
                positions = slab_positions(plan)[triples]
                left.reshape(-1)[positions[positions >= 0]] = False
                parts.append(self._part(plan, 3, triples[:, 0], positions))
        if left.any():
            plan = Plan(Support.from_mask(left), single, reorder=False)
            positions = slab_positions(plan)[:, None]
            parts.append(self._part(plan, 1, np.arange(len(plan.steps)), positions))
        return parts

    def _part(self, plan: Plan, taps: int, firsts: IntArray, positions: IntArray) -> Jobs:
        steps = plan.steps[firsts]
        words = step_words(steps["channel"] // plan.block.channels, steps["dy"], steps["dx"])
        own = only_live(np.where(positions < 0, -1, self._flat[positions]), self.support)
        return Jobs(plan, taps, words, plan.owner[firsts].astype(np.int32), own)
