# SPDX-License-Identifier: Apache-2.0
"""Lowering of wgrad: its jobs, and where each weight's gradient lies among their results."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np

from ...masks import BoolArray, Int32Array, IntArray
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
        steps: of the plan, those that each job computes together: adjacent tap columns.
            # [jobs, taps]
        words: of the first step of each job, as in `Lowering`.
        owners: segment of each job.
    """

    plan: Plan
    steps: IntArray
    words: Int32Array
    owners: Int32Array

    @property
    def taps(self) -> int:
        """Adjacent tap columns that one job computes together."""
        return self.steps.shape[1]

    @property
    def size(self) -> int:
        """The gradients that all jobs compute, dead ones included."""
        return self.steps.size * self.plan.block.filters * self.plan.block.channels

    @property
    def rows(self) -> Int32Array | None:
        """Filters of each segment, -1 filling up; None when they are in their own order."""
        return None if unless_identity(self.plan.rows) is None else self.plan.padded_rows

    def adjacent(self, unit: int) -> bool:
        """Whether every segment's filters are adjacent and begin at a multiple of `unit`.

        A descriptor reads nothing else: a box begins at a multiple of 16 bytes.
        """
        return self.rows is None and not (self.plan.segments % unit).any()


class FusedJobs(NamedTuple):
    """The jobs of three taps, and what they leave to jobs of one.

    Attributes:
        filters: the order in which the filters of dy have to be read, None when it is their own.
        channels: the same for the channels of x.
        jobs: of three taps; None if there are none.
        left: the weights that no such job has, in those orders; None if there are none.
    """

    filters: IntArray | None
    channels: IntArray | None
    jobs: Jobs | None
    left: Support | None


class WgradLowering:
    """A Support lowered to the jobs of wgrad.

    Whole rows of three taps share their reading of dy, the rest goes tap by tap. HetConv so becomes
    its own groups, three taps at a time, and one product for the centre tap of the other channels.
    Where each gradient lies is worked out when it is asked for: a choice among lowerings needs
    only the jobs.

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
        self.filters, self.channels, jobs, left = _fused_jobs_of(support, fused, reorder, coarse)
        self.parts = [] if jobs is None else [jobs]
        if left is not None:
            plan = Plan(left, single, reorder=False)
            self.parts.append(_jobs(plan, np.arange(len(plan.steps))[:, None]))

    @property
    def size(self) -> int:
        """The gradients that all jobs compute, dead ones included."""
        return sum(part.size for part in self.parts)

    def places(self, form: str) -> Int32Array:
        """Lists where the gradient of each weight lies among the partials of one split; -1 is dead.

        Args:
            form: as in `Lowering.source`.

        Returns:
            A place for each entry of the canonical weight, in the order of its memory.  # int32
        """
        support = self.support
        flat = np.arange(prod(support.shape)).reshape(support.shape)
        if self.filters is not None:
            flat = flat[self.filters]
        if self.channels is not None:
            flat = flat[:, self.channels]
        own = flat.reshape(-1)
        size = support.live if form == "live" else len(own)
        places = np.full(size, -1, np.int32)
        before = 0
        for part in self.parts:
            # Flat dense position of each gradient; -1 is none.  # [jobs, taps, BF, BC]
            positions = slab_positions(part.plan)[part.steps]
            positions = only_live(np.where(positions < 0, -1, own[positions]), support)
            found = memory_places(positions.reshape(-1), support, form)
            known = found >= 0
            places[found[known]] = before + np.flatnonzero(known)
            before += found.size
        return places


def _fused_jobs_of(support: Support, block: Block, reorder: bool, coarse: bool) -> FusedJobs:
    """Returns the jobs of three taps for a slab, and what they leave; kept with the Support."""
    key = ("triton fused jobs", block, reorder, coarse)
    found: FusedJobs | None = support.derived.get(key)
    if found is None:
        found = support.derived[key] = _fused_jobs(support, block, reorder, coarse)
    return found


def _fused_jobs(support: Support, block: Block, reorder: bool, coarse: bool) -> FusedJobs:
    whole = coarsened(support) if coarse else support
    filters = channels = None
    if reorder:
        plan = Plan(whole, block)
        filters, channels = unless_identity(plan.rows), unless_identity(plan.cols)
        whole = Support.from_mask(whole.mask[plan.rows][:, plan.cols])
    jobs, left = None, whole
    if whole.kernel[1] == 3:
        plan = Plan(whole, block, reorder=False)
        triples = _triples(plan)
        if len(triples):
            jobs = _jobs(plan, triples)
            left = Support.from_mask(whole.mask & ~_covered(plan, triples[:, 0]))
    return FusedJobs(filters, channels, jobs, left if left.live else None)


def _triples(plan: Plan) -> IntArray:
    """Lists the steps of a Plan that are three taps in a row.  # [jobs, 3]"""
    steps = plan.steps
    keys = np.stack([plan.owner, steps["channel"], steps["dy"]], axis=1)
    _, line, size = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    line = line.reshape(-1)
    order = np.lexsort((steps["dx"], line))
    return order[size[line[order]] == 3].reshape(-1, 3)


def _covered(plan: Plan, firsts: IntArray) -> BoolArray:
    """Tells which weights have a gradient in jobs of three taps, dead ones included.

    # bool [F, C, KH, 1]
    """
    _, channels, kh, _ = plan.support.shape
    by_segment = np.zeros((len(plan.segments) - 1, channels, kh), bool)
    steps = plan.steps[firsts]
    for offset in range(plan.block.channels):
        there = steps["count"] > offset
        read = steps["channel"][there] + offset
        by_segment[plan.owner[firsts][there], read, steps["dy"][there]] = True
    covered = np.empty((len(plan.rows), channels, kh, 1), bool)
    covered[plan.rows, :, :, 0] = np.repeat(by_segment, np.diff(plan.segments), axis=0)
    return covered


def _jobs(plan: Plan, steps: IntArray) -> Jobs:
    """Makes the jobs that compute these steps of a Plan.  # [jobs, taps]"""
    first = plan.steps[steps[:, 0]]
    words = step_words(first["channel"] // plan.block.channels, first["dy"], first["dx"])
    return Jobs(plan, steps, words, plan.owner[steps[:, 0]].astype(np.int32))
