# SPDX-License-Identifier: Apache-2.0
"""Sensitivity: how much each layer suffers from losing weights, and rates by layer from it.

Example: a network may keep 250 of 1,000 weights. Layer a has 100, and costs 0.1 each time that they
are halved; layer b has 900 and costs 0.05. The last weight of both costs the same where a has twice
as many as b, 167 and 83; so a keeps all that it has, and b 150, a sixth.
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
_STEPS = 401  # densities that are tried: a hundredth and three quarters apart

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
    """Divides what may stay so that the costs of all layers together are the least.

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
    wanted = total * sum(sizes.values())
    grids, curves = {}, {}
    for name, values in cost.items():
        every = np.exp(np.linspace(0.0, logarithms[-1], _STEPS))
        least = min(max(total / _SPARSER, every[-1]), most[name])
        grid = np.array([most[name], *every[(every < most[name]) & (every > least)], least])
        rising = np.maximum.accumulate([0.0, *values])
        grids[name] = grid
        curves[name] = np.interp(-np.log(grid), -logarithms, rising)

    def at(price: float) -> dict[str, float]:
        return {
            name: float(grid[np.argmin(curves[name] + price * sizes[name] * grid)])
            for name, grid in grids.items()
        }

    def live(chosen: Mapping[str, float]) -> float:
        return sum(sizes[name] * density for name, density in chosen.items())

    # The price of a weight, in the logarithm, at which as many are left as may be.
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if live(at(np.exp(middle))) > wanted else (low, middle)
    few = at(np.exp(high))
    many = at(np.exp(low)) if low > -40.0 else dict(most)
    chosen = few
    first, last = 0.0, 1.0  # from many to few: a layer may drop by a step between two prices
    for _ in range(60):
        middle = (first + last) / 2
        chosen = {n: many[n] ** (1 - middle) * few[n] ** middle for n in few}
        first, last = (middle, last) if live(chosen) > wanted else (first, middle)
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
