# SPDX-License-Identifier: Apache-2.0
"""Projections: the nearest weights with a given number of live units, for ADMM.

A *unit* is what lives or dies together: a single weight, a kernel, a (channel, tap) column over
some filters, or a block of filters × channels. The nearest weights in the Euclidean sense keep the
units of largest energy (sum of squares).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, mismatch
from ..masks import BoolArray
from .scores import FloatArray

__all__ = ["KINDS", "keep_largest", "project"]

KINDS = ("irregular", "kernels", "columns", "blocks")


def keep_largest(
    weight: Tensor, pruned: float, kind: str = "irregular", filters: int = 8, channels: int = 8
) -> BoolArray:
    """Chooses the units that the projection Π keeps.  # [F, C, KH, KW] or [F, C] -> bool, same

    Exactly round((1 − ``pruned``)·units) stay; ties are decided by the order of the units. The last
    unit of a row may be smaller than the others where the sizes do not divide, and is ranked by
    its own energy.

    Args:
        weight: of one layer.
        pruned: the fraction of units to drop, 0 ≤ pruned < 1.
        kind: ``"irregular"`` (single weights, the paper), ``"kernels"`` (all taps of a filter and
            channel), ``"columns"`` (one channel and tap over ``filters`` filters) or ``"blocks"``
            (``filters`` filters × ``channels`` channels, all taps).
        filters: filters in a column or block.
        channels: channels in a block.

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
    group = {
        "irregular": (1, 1, 1),
        "kernels": (1, 1, taps),
        "columns": (filters, 1, 1),
        "blocks": (filters, channels, taps),
    }[kind]
    energy = squares
    for axis, size in enumerate(group):
        energy = np.add.reduceat(energy, np.arange(0, squares.shape[axis], size), axis=axis)
    kept = round((1 - pruned) * energy.size)
    keep = np.zeros(energy.size, bool)
    keep[np.argsort(-energy.ravel(), kind="stable")[:kept]] = True
    mask: BoolArray = keep.reshape(energy.shape)
    for axis, size in enumerate(group):
        mask = np.repeat(mask, size, axis=axis)
    mask = mask[tuple(slice(length) for length in squares.shape)]
    return mask.reshape(shape)


def project(weight: Tensor, mask: BoolArray) -> Tensor:
    """Zeroes what the projection drops; a copy."""
    return weight.detach() * torch.from_numpy(mask).to(weight.device)
