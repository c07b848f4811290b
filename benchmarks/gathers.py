# SPDX-License-Identifier: Apache-2.0
"""What share of products is useful on self-grouped layers, by what is gathered and multiplied.

    python -m benchmarks.gathers

A matrix instruction multiplies a tile of filters by the channels that any of them keeps, gathered
so many at a time, in steps of sixteen. Filters may stand in any order, and channels in their own or
in one that is chosen for the layer; of several orders the best is counted, so more may be possible,
though hardly much. Nothing is run: live weights are counted against multiplied ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from benchmarks.supports import self_grouped, trained
from hetconv_kernels import Support
from hetconv_kernels.backends.cuda.scattered_lowering import lower_scattered, scattered_jobs
from hetconv_kernels.masks import BoolArray, IntArray

_STEP = 16
_ROWS, _TOGETHER = (64, 32, 16, 8), (8, 4, 2, 1)


def useful(support: Support, rows: int, together: int, reordered: bool) -> float:
    """Returns the share of multiplied weights that are live, at the best order tried.

    Args:
        support: of whole kernels.
        rows: filters of a tile.
        together: neighbouring channels that are gathered at a time.
        reordered: whether channels may be brought into another order, one for the whole layer.
    """
    keep = np.any(support.mask, axis=(2, 3))
    if reordered:
        keep = keep[:, channel_order(keep, together)]
    eights = np.any(keep.reshape(len(keep), -1, together), axis=2)
    found = []
    for order in filter_orders(keep):
        tiles = [order[begin : begin + rows] for begin in range(0, len(order), rows)]
        channels = [int(eights[tile].any(axis=0).sum()) * together for tile in tiles]
        found.append(sum(-(-count // _STEP) * _STEP * rows for count in channels))
    return float(keep.sum()) / min(found)


def filter_orders(keep: BoolArray) -> Iterator[IntArray]:
    """Lists orders with the filters of a group together, like groups beside each other."""
    groups: dict[bytes, list[int]] = {}
    for filter_, row in enumerate(keep):
        groups.setdefault(row.tobytes(), []).append(filter_)
    members = list(groups.values())
    yield np.concatenate([np.array(own) for own in members])
    for first in range(len(members)):
        left = [number for number in range(len(members)) if number != first]
        order = [first]
        while left:
            last = keep[members[order[-1]][0]]
            order.append(min(left, key=lambda n: int((keep[members[n][0]] ^ last).sum())))
            left.remove(order[-1])
        yield np.concatenate([np.array(members[number]) for number in order])


def channel_order(keep: BoolArray, together: int) -> IntArray:
    """Puts channels beside each other that the same filters keep, one after another."""
    left, order = set(range(keep.shape[1])), []
    while left:
        first = max(sorted(left), key=lambda c: int(keep[:, c].sum()))
        union = keep[:, first].copy()
        order.append(first)
        left.remove(first)
        for _ in range(min(together - 1, len(left))):
            best = min(sorted(left), key=lambda c: int((union | keep[:, c]).sum()))
            union |= keep[:, best]
            order.append(best)
            left.remove(best)
    return np.array(order)


def useful_back(support: Support, rows: int) -> float:
    """Returns the share of multiplied weights that are live for dgrad, whose rows are channels.

    Each channel reads the groups of filters that keep it, whole and one after another. Tiles are
    filled one channel at a time, by the one that adds fewest filters.
    """
    keep = np.any(support.mask, axis=(2, 3))
    groups, sizes = np.unique(keep, axis=0, return_counts=True)
    reads = groups.T  # [channels, groups]
    left, multiplied = list(np.argsort(-(reads @ sizes), kind="stable")), 0
    while left:
        union = np.zeros(len(groups), bool)
        for _ in range(min(rows, len(left))):
            best = min(left, key=lambda channel: int((union | reads[channel]) @ sizes))
            union |= reads[best]
            left.remove(best)
        multiplied += rows * -(-int(union @ sizes) // _STEP) * _STEP
    return float(keep.sum()) / max(multiplied, 1)


def alone(support: Support, rows: int) -> float:
    """Returns the share of multiplied weights that are live, each group in tiles of its own."""
    groups, sizes = np.unique(np.any(support.mask, axis=(2, 3)), axis=0, return_counts=True)
    channels = groups.sum(axis=1)
    multiplied = -(-sizes // rows) * rows * (-(-channels // _STEP) * _STEP)
    return float(sizes @ channels) / max(int(multiplied.sum()), 1)


def least_steps(support: Support, rows: int = 8) -> int:
    """Counts the steps of sixteen channels that no division into tiles of filters can go below.

    A tile with filters of some groups has the steps of all channels that any of these keeps. How
    many tiles of each set of groups there are, and how the filters of a group are dealt to them,
    is a linear program once both may be fractions, and its optimum is a bound. A tile has at most
    `rows` filters, and of a group no more than the group has.

    Example: two groups of four filters with sixteen channels each, none in common, are two steps
    in one tile or in two; three filters more than a tile holds want a step more:

        >>> keep = np.eye(2, dtype=bool).repeat(16, axis=1)
        >>> least_steps(Support.self_grouped(np.arange(8) % 2, keep, 3))
        2
        >>> least_steps(Support.self_grouped((np.arange(11) > 3).astype(int), keep, 3))
        2
        >>> least_steps(Support.self_grouped((np.arange(13) > 3).astype(int), keep, 3))
        3

    Args:
        support: of whole kernels, 16 groups at most: their sets are listed.
        rows: filters of a tile.
    """
    groups, sizes = np.unique(np.any(support.mask, axis=(2, 3)), axis=0, return_counts=True)
    kept = [int("".join("01"[one] for one in group.astype(int)), 2) for group in groups]
    every, union = range(len(kept)), [0] * (1 << len(kept))
    for members in range(1, len(union)):
        last = (members & -members).bit_length() - 1
        union[members] = union[members & (members - 1)] | kept[last]
    steps = [-(-channels.bit_count() // _STEP) for channels in union]
    # A set that could take one group more for nothing is that larger one.
    larger = [[s | 1 << g for g in every if not s >> g & 1] for s in range(len(union))]
    sets = [s for s in range(1, len(union)) if all(steps[one] > steps[s] for one in larger[s])]
    tiles = len(sets)  # then how many filters of a group are in the tiles of a set
    dealt = [(tile, g) for tile, members in enumerate(sets) for g in every if members >> g & 1]
    # Line, variable, factor: together at most nothing.
    limits = [(tile, tile, -float(rows)) for tile in range(tiles)]
    line = tiles
    for place, (tile, g) in enumerate(dealt):
        limits.append((tile, tiles + place, 1.0))
        if sizes[g] < rows:
            limits += [(line, tiles + place, 1.0), (line, tile, -float(sizes[g]))]
            line += 1
    lines, variables, factors = zip(*limits, strict=True)
    count = tiles + len(dealt)
    bound = coo_matrix((factors, (lines, variables)), shape=(line, count)).tocsr()
    owners = np.array([g for _, g in dealt]), np.arange(tiles, count)
    whole = coo_matrix((np.ones(len(dealt)), owners), shape=(len(kept), count)).tocsr()
    cost = np.array([steps[members] for members in sets] + [0] * len(dealt), float)
    found = linprog(cost, bound, np.zeros(line), whole, sizes, method="highs-ipm")
    assert found.status == 0, found.message
    return int(np.ceil(found.fun - 1e-6))


def plan_steps(support: Support) -> int:
    """Counts the steps that the kernel for scattered groups takes, all channels in one block."""
    return len(lower_scattered(support, scattered_jobs(support), support.channels, 1, 16).steps)


def main() -> int:
    """Prints a table for each layer."""
    for channels in (128, 256, 512):
        for name, support in (
            ("random weights", self_grouped(70, channels, channels, 3, seed=0)),
            ("trained", trained(70, channels, channels)),
        ):
            print(f"{channels} channels and filters, 70 % dropped, {name}:")
            print("  filters   channels gathered at a time: in their order | in a chosen one")
            print("   a tile " + "  ".join(" ".join(f"{n:>5}" for n in _TOGETHER) for _ in "12"))
            for rows in _ROWS:
                shares = [
                    [useful(support, rows, together, reordered) for together in _TOGETHER]
                    for reordered in (False, True)
                ]
                print(
                    f"   {rows:>6} "
                    + "  ".join(" ".join(f"{share:5.2f}" for share in half) for half in shares)
                )
            keep = np.any(support.mask, axis=(2, 3))
            sets = np.unique(np.unique(keep, axis=0), axis=1).shape[1]
            print(f"   sets of groups that channels are in: {sets}")
            print(
                f"   dgrad, tiles of 8 channels and single filters: {useful_back(support, 8):.2f}"
            )
            print(f"   tiles of 8 filters of one group alone: {alone(support, 8):.2f}")
            least, own = least_steps(support), plan_steps(support)
            print(
                f"   steps of tiles of 8 filters, single channels: {own}, no fewer than {least} "
                f"are possible, of which {keep.sum() / (least * _STEP * 8):.2f} is useful"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
