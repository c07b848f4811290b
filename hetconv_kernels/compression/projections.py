# SPDX-License-Identifier: Apache-2.0
"""Projections: the nearest weights with a given number of live units, for ADMM.

A *unit* is what lives or dies together: a single weight, a kernel, a filter, a channel, a
(channel, tap) column over some filters, a run of channels, a block of filters × channels, or the
taps of a kernel that a pattern keeps. The nearest weights in the Euclidean sense keep the units of
largest energy (sum of squares).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, mismatch
from ..masks import BoolArray, FloatArray

__all__ = ["KINDS", "keep_largest", "project"]

KINDS = (
    "irregular", "kernels", "columns", "runs", "blocks", "filters", "channels", "patterns",
)  # fmt: skip


def keep_largest(
    weight: Tensor,
    pruned: float,
    kind: str = "irregular",
    filters: int = 8,
    channels: int = 8,
    entries: int = 4,
    patterns: int = 8,
) -> BoolArray:
    """Chooses the units that the projection Π keeps.  # [F, C, KH, KW] or [F, C] -> bool, same

    Exactly round((1 − ``pruned``)·units) stay, and at least one, since a layer without a weight
    gives nothing; ties are decided by the order of the units. The last
    unit of a row may be smaller than the others where the sizes do not divide, and is ranked by
    its own energy.

    Args:
        weight: of one layer.
        pruned: the fraction of units to drop, 0 ≤ pruned < 1.
        kind: ``"irregular"`` (single weights, the paper), ``"kernels"`` (all taps of a filter and
            channel), ``"columns"`` (one channel and tap over ``filters`` filters), ``"runs"``
            (``channels`` channels of one filter and tap), ``"blocks"`` (``filters`` filters ×
            ``channels`` channels, all taps), ``"filters"``, ``"channels"`` (whole ones) or
            ``"patterns"`` (see `pattern_taps`; at least the other taps of all kernels go, and
            what more is to go goes in whole kernels).
        filters: filters in a column or block.
        channels: channels in a run or block.
        entries: taps that a pattern keeps; kernels with no more are single weights.
        patterns: different patterns in a layer, at most.

    Raises:
        ArgumentError: an unknown kind or a value out of range.
    """
    if kind not in KINDS:
        raise ArgumentError(mismatch("kind of projection", repr(kind), f"one of {KINDS}"))
    if not 0 <= pruned < 1:
        raise ArgumentError(mismatch("pruned", pruned, "a fraction, 0 <= pruned < 1"))
    squares: FloatArray = weight.detach().double().square().cpu().numpy()
    shape = squares.shape
    squares = squares.reshape(*shape[:2], -1)
    taps = squares.shape[2]
    if kind == "patterns" and taps > entries:
        chosen = pattern_taps(squares.reshape(-1, taps), entries, patterns)
        energy = np.where(chosen, squares.reshape(-1, taps), 0.0).sum(1)
        kept = min(max(round((1 - pruned) * squares.size / entries), 1), len(energy))
        return (chosen & _largest(energy, kept)[:, None]).reshape(shape)
    group = {
        "patterns": (1, 1, 1),
        "irregular": (1, 1, 1),
        "kernels": (1, 1, taps),
        "columns": (filters, 1, 1),
        "runs": (1, channels, 1),
        "filters": (1, shape[1], taps),
        "channels": (shape[0], 1, taps),
        "blocks": (filters, channels, taps),
    }[kind]
    energy = squares
    for axis, size in enumerate(group):
        energy = np.add.reduceat(energy, np.arange(0, squares.shape[axis], size), axis=axis)
    kept = max(round((1 - pruned) * energy.size), 1)
    mask: BoolArray = _largest(energy.ravel(), kept).reshape(energy.shape)
    for axis, size in enumerate(group):
        mask = np.repeat(mask, size, axis=axis)
    mask = mask[tuple(slice(length) for length in squares.shape)]
    return mask.reshape(shape)


def pattern_taps(squares: FloatArray, entries: int, patterns: int) -> BoolArray:
    """Gives each kernel the pattern, of few in a layer, that keeps most of its energy.

    A kernel's own pattern is the centre tap and its other largest taps, ``entries`` in all. The
    layer's patterns are those that most kernels have for their own.

    Source: Niu et al., "PatDNN", ASPLOS 2020, arXiv 2001.00138; Ma et al., "PCONV", AAAI 2020,
    arXiv 1909.05073.

    Args:
        squares: of the weights, a row for each kernel.  # [F·C, T]
        entries: taps that a pattern keeps.
        patterns: at most so many different ones.

    Returns:
        Which taps each kernel keeps.  # bool [F·C, T]
    """
    ranked = squares.copy()
    if squares.shape[1] % 2:  # others have no centre
        ranked[:, squares.shape[1] // 2] = np.inf
    order = np.argsort(-ranked, axis=1, kind="stable")[:, :entries]
    own = np.zeros(squares.shape, bool)
    np.put_along_axis(own, order, True, axis=1)
    every, counts = np.unique(own, axis=0, return_counts=True)
    library = every[np.argsort(-counts, kind="stable")[:patterns]]
    result: BoolArray = library[np.argmax(squares @ library.T.astype(np.float64), axis=1)]
    return result


def _largest(energy: FloatArray, count: int) -> BoolArray:
    """Marks the largest numbers, the first ones where they tie.  # [N] -> bool [N]"""
    keep = np.zeros(energy.size, bool)
    keep[np.argsort(-energy, kind="stable")[:count]] = True
    return keep


def project(weight: Tensor, mask: BoolArray) -> Tensor:
    """Zeroes what the projection drops; a copy."""
    return weight.detach() * torch.from_numpy(mask).to(weight.device)
