# SPDX-License-Identifier: Apache-2.0
"""Winograd's forms in the native engine: when, how much work, which errors.

F(2x2, 3x3) and F(4x4, 3x3) are for sparse 3 × 3 layers, F(3x3, 4x4) for the four phases of the
image that a 7 × 7 or 8 × 8 layer of stride 2 reads, as the first of many networks is. In bfloat16
F(2x2, 3x3) alone: what is transformed is rounded to it again, and the others' points would make
the error nearly three times as large.

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
# The forms of the engine's plans for 3 × 3 layers, and how many outputs a tile has along an axis;
# the same of the form for the phases of an image.
TILES = {"winograd 2x2": 2, "winograd 4x4": 4}
PHASES = {"winograd 3x3": 3}
# Of the former, those in bfloat16.
TILES_BFLOAT16 = {"winograd 2x2": 2}
# Of phases, a layer reads so many channels at most: a vector holds their four phases.
_FEW = 4
# The points by which each tile's transforms interpolate; infinity is one more.
_POINTS = dict.fromkeys((3, 4), (0.0, 0.75, -0.75, 1.5, -1.5)) | {2: (0.0, 1.0, -1.0)}
# Roundings of one product beside its addition, of the inputs' transformation, the weight's (one)
# and the outputs': along an axis one and two for tiles of two outputs, two and three for larger.
_ROUNDINGS = {2: 2 + 1 + 4, 3: 4 + 1 + 6, 4: 4 + 1 + 6}


def forms(problem: Problem) -> dict[str, int]:
    """Lists the forms a call may be run by, with their tiles; predictions say whether one pays.

    The weight must be kept, since transforming one takes longer than it saves, and the image in
    channels_last, for which the cost is measured. Windows that are not the tiles of a 3 × 3 layer
    would be computed unpooled. Dense 3 × 3 layers are left to PyTorch's own kernels: nothing was
    measured beside them.
    """
    plain = (
        problem.verb == "fprop"
        and not problem.strict
        and problem.frozen_weight
        and problem.dtype in (torch.float32, torch.bfloat16)
        and problem.channels_last
        and problem.geometry.dilation == (1, 1)
    )
    if plain and problem.geometry.stride == (1, 1) and problem.support.kernel == (3, 3):
        tiles = problem.pool is None or problem.pool == _TILE
        of_dtype = TILES if problem.dtype == torch.float32 else TILES_BFLOAT16
        return of_dtype if tiles and _is_sparse_with_whole_kernels(problem.support) else {}
    plain = plain and problem.dtype == torch.float32
    if plain and problem.geometry.stride == (2, 2) and set(problem.support.kernel) <= {7, 8}:
        few = problem.support.channels <= _FEW and len(problem.support.groups) == 1
        return PHASES if few else {}
    return {}


def tile_of(form: str) -> int:
    """Returns how many outputs a tile of a plan's form has along an axis; 0: it has no tiles."""
    return (TILES | PHASES).get(form, 0)


def taps(tile: int) -> int:
    """Returns how many taps of each channel, or phase of one, a tile's form takes along an axis."""
    return 4 if tile == 3 else 3


def executed(plan: Any, problem: Problem) -> float:
    """Returns the plan's cost of one output pixel, with what tiles beyond the edges cost.

    Args:
        plan: the engine's, in one of these forms.
        problem: the call; 7 × 7 outputs are 8 × 8 in tiles.
    """
    height, width = problem.output_size
    tile = tile_of(plan.form)
    tiled = math.ceil(height / tile) * math.ceil(width / tile) * tile * tile
    return float(plan.cost + plan.winograd_cost * (tiled / max(1, height * width) - 1))


class Transforms(NamedTuple):
    """The matrices of a tile of m outputs: y = outputs @ ((weights @ g) * (inputs @ d)), an axis.

    Attributes:
        inputs: Bᵀ.  # [m + r - 1, m + r - 1], for r taps
        weights: G.  # [m + r - 1, r]
        outputs: Aᵀ.  # [m, m + r - 1]
    """

    inputs: np.ndarray
    weights: np.ndarray
    outputs: np.ndarray


def transforms(tile: int) -> Transforms:
    """Returns what the engine transforms a tile by, as Toom and Cook interpolate polynomials.

    Args:
        tile: outputs along an axis, 2, 3 or 4.
    """
    r, side = taps(tile), tile + taps(tile) - 1
    points = np.array(_POINTS[tile])
    others = [np.delete(points, i) for i in range(len(points))]
    slopes = np.array([np.prod(x - rest) for x, rest in zip(points, others, strict=True)])
    inputs = np.zeros((side, side))
    for i, rest in enumerate(others):
        inputs[i, :-1] = np.poly(rest)[::-1]
    inputs[-1] = np.poly(points)[::-1]
    weights = np.vstack([np.vander(points, r, increasing=True) / slopes[:, None], np.eye(r)[-1:]])
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


def errors(support: Support, tile: int, dtype: torch.dtype = torch.float32) -> Errors:
    """Derives what a form's errors are in comparison with the direct form's.

    Of the filter that reads most: c channels (or phases) with all taps and r single products. In
    units of one rounding of one product, a direct sum of n products has the variance n² / 2 and the
    worst case n². Transformed, those of the c channels are sums of c at each position: the squares
    of Bᵀ, G and Aᵀ weigh their variance, the magnitudes of the same their worst case. In bfloat16 a
    direct sum is exact but for float32's roundings, and its result is rounded once: n, in units of
    a product. Transformed, both operands of each of the c products were rounded too.

    Args:
        support: of the layer, with 3 × 3 kernels; for tiles of three outputs 7 × 7 or 8 × 8.
        tile: outputs along an axis, 2, 3 or 4; of bfloat16 2.
        dtype: of the call, float32 or bfloat16.
    """
    filter_ = int(support.mask.sum((1, 2, 3)).argmax())
    mask = support.mask[filter_]
    n, roundings, by = int(mask.sum()), _ROUNDINGS[tile], transforms(tile)
    if tile in PHASES.values():
        c, r, taps_of = (
            4 * len(mask),
            0,
            [[len(range(i, k, 2)) for i in (0, 1)] for k in mask.shape[1:]],
        )
    else:
        whole = mask.all((1, 2))
        c, r, taps_of = int(whole.sum()), int(mask[~whole].sum()), [[3], [3]]
    # Of each number of taps along an axis: the rest of a phase is zero.
    spreads, sizes = [], []
    for kinds in taps_of:
        axes = [_axis(by, k) for k in kinds]
        spreads.append(np.mean([spread for spread, _ in axes]))
        sizes.append(max(size for _, size in axes))
    most_taps = max(taps_of[0]) * max(taps_of[1])
    if dtype == torch.bfloat16:
        added, most = math.prod(spreads) * 2 * c, math.prod(sizes) * most_taps * 2 * c
        return Errors(math.sqrt((n + added) / n), (n + most) / n)
    variance = math.prod(spreads) * (c * c / 2 + roundings * c) + r * r / 2 + n
    worst = math.prod(sizes) * most_taps * c * (c + roundings + 1) + r * (r + 1)
    return Errors(math.sqrt(variance / (n * n / 2)), worst / (n * n))


def _axis(by: Transforms, count: int) -> tuple[float, float]:
    """Weighs the variance and the worst case of one axis, of kernels with so many taps."""
    weights = by.weights[:, :count]
    squares = by.outputs**2 @ ((by.inputs**2).sum(1) * (weights**2).sum(1))
    sizes = np.abs(by.outputs) @ (np.abs(by.inputs).sum(1)[:, None] * np.abs(weights))
    return float(squares.mean()), float(sizes.max())


def note(problem: Problem, tile: int, gain: float) -> str:
    """Says in a sentence that a layer is run this way, and what that means.

    Args:
        problem: the call.
        tile: outputs along an axis, 2, 3 or 4.
        gain: predicted time of the direct form over this one's.
    """
    expected, bound = errors(problem.support, tile, problem.dtype)
    r, of = taps(tile), " of the image's four phases" if tile in PHASES.values() else ""
    return (
        f"Winograd F({tile}x{tile}, {r}x{r}){of}, predicted {gain:.2f} times as fast as direct "
        f"sums; its rounding error is expected at {expected:.2f} times theirs, and bounded by "
        f"{bound:.1f} times their bound; hk.strict_accuracy() leaves it out."
    )


def _is_sparse_with_whole_kernels(support: Support) -> bool:
    key = "sparse with whole kernels"
    if key not in support.derived:
        whole = np.all(support.mask, axis=(2, 3))
        support.derived[key] = bool(whole.any() and not whole.all())
    return bool(support.derived[key])
