# SPDX-License-Identifier: Apache-2.0
"""Eights: which eight things stand together, where together they cost what any of them needs.

The wide kernel takes filters in segments of eight runs of eight, and channels in blocks of eight
chunks of eight; both are put together here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ...masks import BoolArray, IntArray

EIGHT = 8
# More kinds than these are not tried pair by pair, which takes time that grows with their square.
_MOST_KINDS = 256

# The cost of sets, each with what any member needs.  # bool [sets, ...] -> float [sets]
Cost = Callable[[BoolArray], npt.NDArray[np.float64]]


def cluster_by_eight(needs: BoolArray, cost: Cost) -> list[IntArray]:
    """Puts things into sets of at most eight, so that the sets together cost little.

    Things with the same needs fill whole sets; what is left over of each kind is merged, two sets
    at a time, the pair first that saves most. Where their own order costs no more, it is kept.

    Example: sixteen things of two kinds in turn are sorted by kind, and three of one kind share a
    set with the only one of another:

        >>> def count(sets): return sets.sum(axis=1).astype(float)
        >>> kinds = np.eye(2, dtype=bool)
        >>> [s.tolist() for s in eights(kinds[[0, 1] * 8], count)]
        [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
        >>> [s.tolist() for s in eights(kinds[[0, 0, 1, 0]], count)]
        [[0, 1, 2, 3]]

    Args:
        needs: what each thing needs.  # bool [things, ...]
        cost: of sets; it never grows by merging two of them.

    Returns:
        The things of each set, ascending; sets by their first thing.
    """
    count = len(needs)
    kinds: dict[bytes, int] = {}
    kind = np.array([kinds.setdefault(row.tobytes(), len(kinds)) for row in needs], np.int64)
    ways = [_cut(np.arange(count)), _cut(np.argsort(kind, kind="stable"))]
    if len(kinds) <= _MOST_KINDS:
        ways.append(_merged(needs, [np.flatnonzero(kind == k) for k in range(len(kinds))], cost))
    best = min(ways, key=lambda way: cost_together(needs, way, cost))
    return sorted((np.sort(members) for members in best), key=lambda members: int(members[0]))


def cost_together(needs: BoolArray, sets: Sequence[IntArray], cost: Cost) -> float:
    """Returns what sets cost together."""
    return float(cost(_together(needs, sets)).sum())


def _together(needs: BoolArray, sets: Sequence[IntArray]) -> BoolArray:
    """Returns what any member of each set needs.  # bool [sets, ...]"""
    found = np.zeros((len(sets), *needs.shape[1:]), bool)
    for index, members in enumerate(sets):
        found[index] = needs[members].any(axis=0)
    return found


def _cut(order: IntArray) -> list[IntArray]:
    return [order[begin : begin + EIGHT] for begin in range(0, len(order), EIGHT)]


def _merged(needs: BoolArray, kinds: Sequence[IntArray], cost: Cost) -> list[IntArray]:
    """Fills sets with things of one kind, and merges what is left over of them."""
    parts = [part for members in kinds for part in _cut(members)]
    full = [part for part in parts if len(part) == EIGHT]
    left = [part for part in parts if len(part) < EIGHT]
    if not left:
        return full
    union = _together(needs, left)
    size = np.array([len(part) for part in left])
    alone = cost(union)
    # What merging two sets saves; less than nothing where they do not fit together.
    saved = np.full((len(left), len(left)), -1.0)

    def renew(one: int) -> None:
        fits = (size + size[one] <= EIGHT) & (size > 0)
        fits[one] = False
        saving = np.where(fits, alone + alone[one] - cost(union | union[one]), -1.0)
        saved[one], saved[:, one] = saving, saving

    for one in range(len(left)):
        renew(one)
    while saved.max() >= 0:
        a, b = divmod(int(saved.argmax()), len(left))
        left[a], size[a], size[b] = np.concatenate([left[a], left[b]]), size[a] + size[b], 0
        union[a] |= union[b]
        alone[a] = cost(union[a : a + 1])[0]
        saved[b], saved[:, b] = -1.0, -1.0
        renew(a)
    return full + [part for part, members in zip(left, size, strict=True) if members]
