# SPDX-License-Identifier: Apache-2.0
"""Winograd's F(2x2, 3x3) in the native engine: for which calls, what it executes, how it errs.

Equations, counts and the derivation of the errors: docs/backends/cpu.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from ..pooling import Pool
from ..problem import Problem
from ..support import Support

# How much faster than the direct form it must be predicted to be chosen.
WINOGRAD_MARGIN = 1.1
# The pooling whose windows are the tiles: it is done on the way.
_TILE = Pool((2, 2), (2, 2), (0, 0))
# Roundings of one product beside its addition: of the input's transformation, two; of the weight's,
# one; and of the outputs' transformation, four.
_ROUNDINGS = 7


def suits(problem: Problem) -> bool:
    """Tells whether a call may be transformed; whether it pays is for the predictions to say.

    The weight must be kept, since transforming one takes longer than it saves, and the image in
    channels_last, for which the cost is measured. Windows that are not its tiles would be computed
    unpooled. Dense layers are left to PyTorch's own kernels: nothing was measured beside them.
    """
    return (
        problem.verb == "fprop"
        and not problem.strict
        and problem.frozen_weight
        and problem.dtype == torch.float32
        and problem.channels_last
        and (problem.pool is None or problem.pool == _TILE)
        and problem.support.kernel == (3, 3)
        and problem.geometry.stride == problem.geometry.dilation == (1, 1)
        and _is_sparse_with_whole_kernels(problem.support)
    )


def executed(plan: Any, problem: Problem) -> float:
    """Returns the plan's cost of one output pixel, with what tiles beyond the edges cost.

    Args:
        plan: the engine's, in the form ``"winograd"``.
        problem: the call; 7 × 7 outputs are 8 × 8 in tiles.
    """
    height, width = problem.output_size
    tiled = (height + height % 2) * (width + width % 2)
    return float(plan.cost + plan.winograd_cost * (tiled / max(1, height * width) - 1))


class Errors(NamedTuple):
    """How the form errs in comparison with the direct one.

    Attributes:
        expected: root mean square over the direct form's, for independent roundings and values.
        bound: the worst case over the direct form's worst case, for inputs up to one magnitude.
    """

    expected: float
    bound: float


def errors(support: Support) -> Errors:
    """Derives what the form's errors are in comparison with the direct form's.

    Of the filter that reads most: c channels with nine taps and r single products. In units of one
    rounding of one product, a direct sum of n products has the variance n² / 2 and the worst case
    n². Transformed, 9c products are nine sums of c, of 25 / 81 of that variance (rows of Bᵀ have
    two terms, the squares of G and A weigh the nine sums by 6.25), and 16 times the magnitude in
    the worst case.
    """
    whole = np.all(support.mask, axis=(2, 3))
    single = np.where(whole, 0, support.mask.sum((2, 3)))
    filter_ = int(support.mask.sum((1, 2, 3)).argmax())
    c, r = int(whole[filter_].sum()), int(single[filter_].sum())
    n = 9 * c + r
    variance = 25 * (c * c / 2 + _ROUNDINGS * c) + r * r / 2 + n
    worst = 16 * 9 * c * (c + _ROUNDINGS + 1) + r * (r + 1)
    return Errors(math.sqrt(variance / (n * n / 2)), worst / (n * n))


def note(problem: Problem, gain: float) -> str:
    """Says in a sentence that a layer is run this way, and what that means.

    Args:
        problem: the call.
        gain: predicted time of the direct form over this one's.
    """
    expected, bound = errors(problem.support)
    return (
        f"Winograd F(2x2, 3x3), predicted {gain:.2f} times as fast as direct sums; its rounding "
        f"error is expected at {expected:.2f} times theirs, and bounded by {bound:.1f} times their "
        "bound; hk.strict_accuracy() leaves it out."
    )


def _is_sparse_with_whole_kernels(support: Support) -> bool:
    key = "sparse with whole kernels"
    if key not in support.derived:
        whole = np.all(support.mask, axis=(2, 3))
        support.derived[key] = bool(whole.any() and not whole.all())
    return bool(support.derived[key])
