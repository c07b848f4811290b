# SPDX-License-Identifier: Apache-2.0
"""Winograd's F(2x2, 3x3) and F(4x4, 3x3) in the native engine: when, how much work, which errors.

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
# The pooling whose windows make up the tiles: it is done on the way.
_TILE = Pool((2, 2), (2, 2), (0, 0))
# The forms of the engine's plans, and how many outputs a tile has along an axis.
TILES = {"winograd 2x2": 2, "winograd 4x4": 4}
# The points by which each tile's transforms interpolate; infinity is one more.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}
# Roundings of one product beside its addition, of the inputs' transformation, the weight's (one)
# and the outputs': along an axis one and two for tiles of two outputs, two and three for four.
_ROUNDINGS = {2: 2 + 1 + 4, 4: 4 + 1 + 6}


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
        plan: the engine's, in one of the TILES.
        problem: the call; 7 × 7 outputs are 8 × 8 in tiles.
    """
    height, width = problem.output_size
    tile = TILES[plan.form]
    tiled = math.ceil(height / tile) * math.ceil(width / tile) * tile * tile
    return float(plan.cost + plan.winograd_cost * (tiled / max(1, height * width) - 1))


class Transforms(NamedTuple):
    """The matrices of a tile of m outputs: y = outputs @ ((weights @ g) * (inputs @ d)), an axis.

    Attributes:
        inputs: Bᵀ.  # [m + 2, m + 2]
        weights: G.  # [m + 2, 3]
        outputs: Aᵀ.  # [m, m + 2]
    """

    inputs: np.ndarray
    weights: np.ndarray
    outputs: np.ndarray


def transforms(tile: int) -> Transforms:
    """Returns what the engine transforms a tile by, as Toom and Cook interpolate polynomials.

    Args:
        tile: outputs along an axis, 2 or 4.
    """
    points = np.array(_POINTS[tile])
    others = [np.delete(points, i) for i in range(len(points))]
    slopes = np.array([np.prod(x - rest) for x, rest in zip(points, others, strict=True)])
    inputs = np.zeros((tile + 2, tile + 2))
    for i, rest in enumerate(others):
        inputs[i, :-1] = np.poly(rest)[::-1]
    inputs[-1] = np.poly(points)[::-1]
    weights = np.vstack([np.vander(points, 3, increasing=True) / slopes[:, None], [0, 0, 1]])
    outputs = np.vander(points, tile, increasing=True).T
    infinity = np.eye(tile)[:, -1:]
    return Transforms(inputs, weights, np.hstack([outputs, infinity]))


class Errors(NamedTuple):
    """How the form errs in comparison with the direct one.

    Attributes:
        expected: root mean square over the direct form's, for independent roundings and values.
        bound: the worst case over the direct form's worst case, for inputs up to one magnitude.
    """

    expected: float
    bound: float


def errors(support: Support, tile: int) -> Errors:
    """Derives what a form's errors are in comparison with the direct form's.

    Of the filter that reads most: c channels with nine taps and r single products. In units of one
    rounding of one product, a direct sum of n products has the variance n² / 2 and the worst case
    n². Transformed, 9c products are sums of c at each position: the squares of Bᵀ, G and Aᵀ weigh
    their variance, the magnitudes of the same their worst case.

    Args:
        support: of the layer, with 3 × 3 kernels.
        tile: outputs along an axis, 2 or 4.
    """
    whole = np.all(support.mask, axis=(2, 3))
    single = np.where(whole, 0, support.mask.sum((2, 3)))
    filter_ = int(support.mask.sum((1, 2, 3)).argmax())
    c, r = int(whole[filter_].sum()), int(single[filter_].sum())
    n, roundings, by = 9 * c + r, _ROUNDINGS[tile], transforms(tile)
    squares = by.outputs**2 @ ((by.inputs**2).sum(1) * (by.weights**2).sum(1))
    sizes = np.abs(by.outputs) @ (np.abs(by.inputs).sum(1)[:, None] * np.abs(by.weights))
    spread, most = float(squares.mean() ** 2), float(sizes.max() ** 2)
    variance = spread * (c * c / 2 + roundings * c) + r * r / 2 + n
    worst = most * 9 * c * (c + roundings + 1) + r * (r + 1)
    return Errors(math.sqrt(variance / (n * n / 2)), worst / (n * n))


def note(problem: Problem, tile: int, gain: float) -> str:
    """Says in a sentence that a layer is run this way, and what that means.

    Args:
        problem: the call.
        tile: outputs along an axis, 2 or 4.
        gain: predicted time of the direct form over this one's.
    """
    expected, bound = errors(problem.support, tile)
    return (
        f"Winograd F({tile}x{tile}, 3x3), predicted {gain:.2f} times as fast as direct sums; its "
        f"rounding error is expected at {expected:.2f} times theirs, and bounded by {bound:.1f} "
        "times their bound; hk.strict_accuracy() leaves it out."
    )


def _is_sparse_with_whole_kernels(support: Support) -> bool:
    key = "sparse with whole kernels"
    if key not in support.derived:
        whole = np.all(support.mask, axis=(2, 3))
        support.derived[key] = bool(whole.any() and not whole.all())
    return bool(support.derived[key])
