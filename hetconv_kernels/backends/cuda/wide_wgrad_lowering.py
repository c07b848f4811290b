# SPDX-License-Identifier: Apache-2.0
"""Lowering of wgrad for wide groups: a Support as the jobs that ``csrc/cuda/wide_wgrad.h`` reads.

Filters and channels come in segments and blocks of eight eights, as in `wide_lowering`. A *product*
is the gradient of one segment by one block at one tap: 64 × 64 weights, of which dead ones are
thrown away. A *job* is what one block of threads computes from the same tiles: products of one
segment, as many as the registers of two warpgroups hold.

Example: HetConv with p=4 on 256 channels and filters has four segments. Each takes all nine taps of
its own 64 channels, and the centre of the other three blocks: one job of twelve products.

    >>> from hetconv_kernels import Support
    >>> from hetconv_kernels.backends.cuda.wide_lowering import wide_windows
    >>> from hetconv_kernels.problem import make_geometry
    >>> s = Support.het(256, 256, 3, p=4)
    >>> (window,), _ = wide_windows(make_geometry(s, 1, 1), (14, 14), False)
    >>> [len(job.products) for job in wide_jobs(wide_segments(s, window), 12, 4)]
    [12, 12, 12, 12]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...errors import ArgumentError, mismatch
from ...masks import BoolArray, Int32Array, IntArray
from ...support import Support
from ..gpu.places import memory_places
from .eights import EIGHT, cluster_by_eight
from .fields import WideUnread, WideWgradBlock, WideWgradJob, table_line
from .wide_lowering import COLUMNS, SLAB, WARPGROUPS, eight, segment_cost
from .windows import Window


class WideSegment(NamedTuple):
    """Filters that are computed together.

    Attributes:
        runs: the filters, divided by eight.
        blocks: the channels, divided by eight, of each block that they read.
        taps: that they read it at, counted as in the window.
    """

    runs: IntArray
    blocks: list[IntArray]
    taps: list[list[int]]


class WideJob(NamedTuple):
    """What one block of threads computes.

    Attributes:
        runs: the filters, divided by eight, of its segment.
        blocks: the channels, divided by eight, of each of its blocks.
        products: its block and tap, counted as in the window, of each product.
    """

    runs: IntArray
    blocks: list[IntArray]
    products: list[tuple[int, int]]


@dataclass(frozen=True)
class WideWgradTables:
    """The tables of one call, in the layout of wide_wgrad.h, all but the classes' lines.

    Attributes:
        jobs: filters / 8 of eight runs, -1 for none; first block and count.  # int32 [jobs, 10]
        blocks: channel / 8 of eight chunks, -1 for none; rows and columns of the halo that no
            product reads: above, below, left and right.  # int32 [blocks, 12]
        places: the unit that the tile's first pixel reads, `~` of such a one where there is no
            product.  # int32 [jobs, 2, products]
        taps: flat tap in the kernel of each product, -1 for none.  # int64 [jobs, 2, products]
        chunks: channel / 8 of the chunks of each product.  # int64 [jobs, 2, products, 8]
    """

    jobs: Int32Array
    blocks: Int32Array
    places: Int32Array
    taps: IntArray
    chunks: IntArray

    @property
    def most_blocks(self) -> int:
        """Blocks of the job that has most."""
        return int(self.jobs[:, WideWgradJob.JOB_COUNT].max())

    @property
    def size(self) -> int:
        """Gradients that one split of all jobs computes, dead ones included."""
        return self.places.size * SLAB

    def targets(self, support: Support, form: str) -> Int32Array:
        """Lists where each computed gradient lies in the memory of dw; -1 is dead.

        Args:
            support: of the layer.
            form: ``"contiguous"`` or ``"channels_last"`` for a dense dw, or ``"live"``.
        """
        # Of a product, as lanes hold it: [channel / 8][filter / 16][filter % 8]
        # [channel % 8 / 2][filter / 8 % 2][channel % 2].
        n, warp, g, t, h, i = np.ix_(*(range(size) for size in (8, 4, 8, 4, 2, 2)))
        runs = self.jobs[:, None, None, WideWgradJob.DY_CHUNK : WideWgradJob.JOB_BEGIN]
        run = np.broadcast_to(runs.astype(np.int64), self.chunks.shape)
        f_run, c_run = run[..., 2 * warp + h], self.chunks[..., n]
        known = (f_run >= 0) & (c_run >= 0)
        f, c = f_run * EIGHT + g, c_run * EIGHT + 2 * t + i
        tap = self.taps[..., None, None, None, None, None, None]
        f, c, tap, known = np.broadcast_arrays(f, c, tap, known & (tap >= 0))
        flat = np.full(f.shape, -1, np.int64)
        own = f[known], c[known], tap[known]
        mask = support.mask.reshape(support.filters, support.channels, -1)
        place = (own[0] * support.channels + own[1]) * mask.shape[2] + own[2]
        flat[known] = np.where(mask[own], place, -1)
        return memory_places(flat.reshape(-1), support, form)


def lower_wide_wgrad(
    jobs: Sequence[WideJob], window: Window, products: int, pitch: int
) -> WideWgradTables:
    """Makes the tables of jobs.

    Args:
        jobs: of the layer.
        window: the pixels that a tile reads.
        products: of each warpgroup; at least half of any job's.
        pitch: 16-byte units of a plane of x.
    """
    lines: list[list[int]] = []
    blocks: list[list[int]] = []
    shape = (len(jobs), WARPGROUPS, products)
    places, taps = np.zeros(shape, np.int32), np.full(shape, -1, np.int64)
    chunks = np.full((*shape, EIGHT), -1, np.int64)
    width = 1 + max((tap.kx for tap in window.taps), default=0)
    for number, job in enumerate(jobs):
        lines.append(
            table_line(
                WideWgradJob,
                DY_CHUNK=eight(job.runs),
                JOB_BEGIN=len(blocks),
                JOB_COUNT=len(job.blocks),
            )
        )
        for nth, members in enumerate(job.blocks):
            read = [window.taps[tap] for block, tap in job.products if block == nth]
            blocks.append(
                table_line(WideWgradBlock, X_CHUNK=eight(members), X_UNREAD=window.unread(read))
            )
        found = [
            nth * EIGHT * pitch + window.place(window.taps[tap], COLUMNS)
            for nth, tap in job.products
        ]
        places[number] = ~found[0]
        half = -(-len(found) // WARPGROUPS)
        for index, (nth, tap) in enumerate(job.products):
            at = (number, *divmod(index, half))
            places[at] = found[index]
            taps[at] = window.taps[tap].ky * width + window.taps[tap].kx
            chunks[at] = eight(job.blocks[nth])
    return WideWgradTables(
        np.array(lines, np.int32).reshape(-1, WideWgradJob.JOB_COUNT + 1),
        np.array(blocks, np.int32).reshape(-1, WideWgradBlock.X_UNREAD + len(WideUnread)),
        places,
        taps,
        chunks,
    )


def wide_segments(support: Support, window: Window) -> list[WideSegment]:
    """Divides a layer into segments and their blocks.

    Args:
        support: of the layer.
        window: the pixels that a tile reads.

    Raises:
        ArgumentError: channels or filters are no multiple of 8.
    """
    for name, count in (("filters", support.filters), ("channels", support.channels)):
        if count % EIGHT:
            raise ArgumentError(mismatch(name, count, f"a multiple of {EIGHT}", 'backend="triton"'))
    runs, chunks = support.filters // EIGHT, support.channels // EIGHT
    live = np.any(support.mask.reshape(runs, EIGHT, chunks, EIGHT, -1), axis=(1, 3))
    flat = [tap.ky * support.kernel[1] + tap.kx for tap in window.taps]
    found = []
    for members in cluster_by_eight(live, segment_cost):
        needs = live[members].any(axis=0)[:, flat]
        read = np.flatnonzero(needs.any(axis=1))
        blocks = [read[own] for own in cluster_by_eight(needs[read], _block_cost)]
        taps = [np.flatnonzero(needs[own].any(axis=0)).tolist() for own in blocks]
        found.append(WideSegment(members, blocks, taps))
    return found


def wide_jobs(segments: Sequence[WideSegment], capacity: int, most_blocks: int) -> list[WideJob]:
    """Divides segments into jobs.

    Args:
        segments: of the layer.
        capacity: products of a job.
        most_blocks: blocks of channels of a job.
    """
    jobs = []
    for runs, blocks, taps in segments:
        for parts in _packed(taps, capacity, most_blocks):
            products = [(nth, tap) for nth, (_, some) in enumerate(parts) for tap in some]
            jobs.append(WideJob(runs, [blocks[block] for block, _ in parts], products))
    return jobs


def _packed(
    taps: Sequence[list[int]], capacity: int, most_blocks: int
) -> list[list[tuple[int, list[int]]]]:
    """Packs the taps of blocks into jobs: whole blocks first, the rest where there is room.

    Example: two blocks of nine taps and three of one, in jobs of twelve:

        >>> nine = list(range(9))
        >>> jobs = _packed([nine, [4], [4], nine, [4]], 12, 4)
        >>> [[(block, len(own)) for block, own in job] for job in jobs]
        [[(0, 9), (1, 1), (2, 1), (4, 1)], [(3, 9)]]
    """
    count = max(-(-sum(map(len, taps)) // capacity), -(-len(taps) // most_blocks))
    jobs: list[list[tuple[int, list[int]]]] = [[] for _ in range(count)]

    def room(job: list[tuple[int, list[int]]]) -> int:
        left = capacity - sum(len(own) for _, own in job)
        return left if len(job) < most_blocks else 0

    left = []
    for block in sorted(range(len(taps)), key=lambda b: -len(taps[b])):
        fitting = [job for job in jobs if room(job) >= len(taps[block])]
        if fitting:
            fitting[0].append((block, taps[block]))
        else:
            left.append(block)
    for block in left:
        rest = taps[block]
        while rest:
            job = max(jobs, key=room)
            if not room(job):
                job = []
                jobs.append(job)
            size = room(job)
            job.append((block, rest[:size]))
            rest = rest[size:]
    return [job for job in jobs if job]


def _block_cost(needs: BoolArray) -> np.ndarray:
    """Counts the products of blocks, and what their halos cost.

    # bool [blocks, chunks, taps] -> float [blocks]
    """
    found: np.ndarray = needs.sum(axis=1) + 1.0
    return found
