# SPDX-License-Identifier: Apache-2.0
"""Scores: how much each filter or channel of a layer matters. Small formulas on weights, no state.

All take dense weights [F, C, KH, KW] or [F, C] in which dropped entries are zero, and compute in
float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, mismatch
from ..masks import FloatArray


def outgoing(weight: Tensor) -> FloatArray:
    """Sums each filter's absolute weights, its ℓ1 norm.  # [F, C, ...] -> [F]"""
    result: FloatArray = _absolute(weight).reshape(len(weight), -1).sum(1)
    return result


def incoming(weight: Tensor, repeat: int = 1) -> FloatArray:
    """Sums the absolute weights that read each channel.  # [F, C·repeat, ...] -> [C]

    Args:
        weight: of the layer that reads.
        repeat: its inputs for each channel, H·W where a convolution is flattened.
    """
    array = _absolute(weight)
    f, inputs = array.shape[:2]
    if repeat < 1 or inputs % repeat:
        raise ArgumentError(mismatch("repeat", repeat, f"a positive divisor of {inputs}"))
    result: FloatArray = array.reshape(f, inputs // repeat, -1).sum(axis=(0, 2))
    return result


def correlation(weight: Tensor) -> FloatArray:
    """Correlates the flattened filters: |Pearson's ρ| of every pair.  # [F, C, ...] -> [F, F]

    A constant filter has no direction and correlates with none; the diagonal is zero.
    """
    rows = weight.detach().double().cpu().reshape(len(weight), -1).numpy()
    centred = rows - rows.mean(1, keepdims=True)
    norms = np.sqrt((centred**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = np.where(norms[:, None] > 0, centred / norms[:, None], 0.0)
    result: FloatArray = np.abs(unit @ unit.T)
    np.fill_diagonal(result, 0.0)
    return result


def pair_correlation(weight: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Correlates the given pairs, differentiably.  # [F, C, ...] -> [len(pairs)]"""
    rows = weight.reshape(len(weight), -1)
    rows = rows - rows.mean(1, keepdim=True)
    one, two = (rows[[pair[i] for pair in pairs]] for i in (0, 1))
    return torch.nn.functional.cosine_similarity(one, two, dim=1).abs()


def instability(before: Tensor, after: Tensor) -> FloatArray:
    """Measures how much each filter's ℓ1 norm changes: |‖w‖ − ‖w'‖| / ‖w‖.  # [F, ...]² -> [F]

    A filter that is zero in both is perfectly stable; one that leaves zero is not at all.
    """
    one, two = outgoing(before), outgoing(after)
    change = np.abs(one - two)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: FloatArray = np.where(change == 0, 0.0, change / one)
    return result


def _absolute(weight: Tensor) -> FloatArray:
    result: FloatArray = weight.detach().abs().double().cpu().numpy()
    return result
