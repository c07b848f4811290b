# SPDX-License-Identifier: Apache-2.0
"""Sensitivity: how much each layer suffers from losing weights, and rates by layer from it.

Example: a network may keep a quarter of its weights. Layer a has 100 of them and loses 0.1 in the
loss at one half, 0.4 at a quarter; layer b has 900 and loses 0.01 and 0.04. Where both cost the
same, 0.05, a keeps 71 % (the way to one half is half gone, in the logarithm) and b 25 % or less.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..masks import BoolArray
from . import ranks
from .outside import OutsideLoop
from .run import Run

# The fractions of a layer's weights at which it is looked at, after 1.
DENSITIES = tuple(2.0**-k for k in range(1, 11))
# How many times sparser than all together a layer may be: a cost near nothing, on a few batches,
# says that a layer matters little, and not that it is needed for nothing.
_SPARSER = 8.0

Projection = Callable[[str, Tensor, float], BoolArray]


def costs(run: Run, names: Sequence[str], keep: Projection, batches: int) -> dict[str, list[float]]:
    """Measures what each layer costs at each of `DENSITIES`, when it alone is pruned.

    That is how much the mean loss of some training batches rises; without such batches, the error
    of the weights, ‖W − Π(W)‖ / ‖W‖. Call it in a round.

    Args:
        run: the network, in its masks.
        names: of the layers.
        keep: chooses what of a layer's weight stays at a density.
        batches: at most so many.

    Returns:
        For each layer the costs, by falling density.
    """
    looped = run.training.data is None or isinstance(run.training.data, OutsideLoop)
    data = [] if looped else list(itertools.islice(run.training.batches(0), batches))
    before = _loss(run, data)
    found: dict[str, list[float]] = {}
    for name in names:
        weight = run.layers[name].weight
        original, exact = weight.detach().clone(), run.weight(name)
        found[name] = []
        for density in DENSITIES:
            mask = torch.from_numpy(keep(name, exact, density)).reshape(weight.shape)
            if not data:
                lost = exact.masked_fill(mask, 0.0).norm() / exact.norm().clamp(min=1e-30)
                found[name].append(float(lost))
                continue
            with torch.no_grad():
                weight.mul_(mask.to(weight.device))
            found[name].append(_loss(run, data) - before)
            with torch.no_grad():
                weight.copy_(original)
    return found


def densities(
    cost: Mapping[str, Sequence[float]],
    sizes: Mapping[str, int],
    most: Mapping[str, float],
    total: float,
) -> dict[str, float]:
    """Divides what may stay so that the last weights of each layer cost the same.

    Between the measured densities the cost is interpolated in the logarithm of the density. Where
    the layers would have to go below the last one, all of them do by the same factor. None becomes
    more than eight times sparser than all together.

    Args:
        cost: of each layer at `DENSITIES`.
        sizes: weights of each layer.
        most: the density that each layer has, which is not exceeded.
        total: the fraction of all these weights that stays.

    Returns:
        For each layer the fraction that stays; at least one weight.
    """
    logarithms = np.log([1.0, *DENSITIES])
    curves = {name: np.maximum.accumulate([0.0, *values]) for name, values in cost.items()}
    # So that equal costs, such as none at all, still have an order.
    curves = {name: c + 1e-9 * np.arange(len(c)) for name, c in curves.items()}
    wanted = total * sum(sizes.values())

    def at(level: float) -> dict[str, float]:
        return {
            name: min(
                max(float(np.exp(np.interp(level, curve, logarithms))), total / _SPARSER),
                most[name],
            )
            for name, curve in curves.items()
        }

    def live(chosen: Mapping[str, float]) -> float:
        return sum(sizes[name] * density for name, density in chosen.items())

    low, high = 0.0, max(float(curve[-1]) for curve in curves.values())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if live(at(middle)) > wanted else (low, middle)
    chosen = at(high)
    factor = min(wanted / live(chosen), 1.0)
    return {name: max(density * factor, 1 / sizes[name]) for name, density in chosen.items()}


def _loss(run: Run, data: list[object]) -> float:
    """Returns the mean loss in evaluation mode; an infinite one is the largest number."""
    run.model.eval()
    total = 0.0
    for batch in data:
        total += run.training.loss(run.model, batch).item()
    mean = ranks.sum_over_ranks(total / max(len(data), 1)) / ranks.world_size()
    return float(np.nan_to_num(mean, nan=1e30, posinf=1e30))
