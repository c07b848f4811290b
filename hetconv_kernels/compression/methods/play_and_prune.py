# SPDX-License-Identifier: Apache-2.0
"""Play and Prune: the user names an error tolerance, and two players spend it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...masks import BoolArray
from ..base import Method
from ..run import Run
from ..schedule import check_count, check_fraction, check_positive, weakest
from ..scores import FloatArray, outgoing
from .wsp import check_interfaces

__all__ = ["PlayAndPrune", "headroom"]


@dataclass(frozen=True)
class PlayAndPrune(Method):
    """Play and Prune: adaptive filter pruning under a controller that watches the accuracy.

    The filter pruner (AFP) puts an ℓ1 penalty λ on the α of filters of least ℓ1 norm in each layer
    for a few epochs, and removes those whose norm is under the layer's threshold W. The controller
    (PRC) measures the headroom T = max(0, accuracy − (baseline − ε)), and sets λ ← T·λ and
    W ← δ·T·W, so that the pressure falls to zero as the tolerance ε is spent.

    Source: Singh, Verma, Rai, Namboodiri, "Play and Prune: Adaptive Filter Pruning for Deep Model
    Compression", IJCAI 2019, arXiv 1905.04446. Our reading; no code was published.

    Deviations: λ and W on the right are the first ones, and T is taken as a fraction of ε, at most
    1: multiplied on and on by a T of a few hundredths, both would vanish within two rounds whatever
    the accuracy. Norms are means over a
    filter's live weights, so that filters that lost channels are not pruned for that. A round that
    ends below baseline − ε is taken back after ``recover_epochs`` did not mend it. ``multiple`` is
    ours (1 is the paper).

    Attributes:
        tolerance: ε, the loss of accuracy that may be spent.
        fraction: α, of the filters of each layer that a round puts under pressure.
        penalty: the first λ.
        threshold: the quantile of norms that the first W is found at, by binary search.
        delta: δ.
        prune_epochs: of training under the penalty, in each round.
        recover_epochs: of training without it after each removal.
        rounds: at most so many.
        target: the fraction of MACs that is enough; pruning ends there too.
        epochs: of training at the end.
        multiple: what remaining widths are multiples of; what does not go in one round goes later.
        least: filters that every layer keeps.

    Raises:
        ArgumentError: a value out of range.
    """

    title: ClassVar[str] = "Play and Prune"
    needs_accuracy: ClassVar[bool] = True
    removes_filters: ClassVar[bool] = True

    tolerance: float = 0.01
    fraction: float = 0.1
    penalty: float = 1e-3
    threshold: float = 0.1
    delta: float = 1.0
    prune_epochs: int = 2
    recover_epochs: int = 2
    rounds: int = 50
    target: float = 0.9
    epochs: int = 90
    multiple: int = 1
    least: int = 2

    def __post_init__(self) -> None:
        check_positive("tolerance", self.tolerance)
        for name in ("fraction", "threshold", "target"):
            check_fraction(name, getattr(self, name))
        check_positive("penalty", self.penalty, zero=True)
        check_positive("delta", self.delta)
        for name, least in (
            ("prune_epochs", 0), ("recover_epochs", 0), ("epochs", 0), ("rounds", 1),
            ("multiple", 1), ("least", 1),
        ):  # fmt: skip
            check_count(name, getattr(self, name), least)

    def check(self, run: Run) -> None:
        """Refuses a network without a width that can be changed."""
        super().check(run)
        check_interfaces(self.title, run)

    def run(self, run: Run) -> None:
        """Plays rounds until the tolerance is spent or the target reached, then trains."""
        baseline = run.evaluate("baseline")
        assert baseline is not None
        dense = run.round("work at the start", run.macs)
        first = run.round("first thresholds", lambda: self._first(run))
        pressure = 1.0
        owed: dict[str, int] = {}
        for number in range(1, self.rounds + 1):
            run.round(f"keep before {number}", lambda: run.snapshot("good"))
            chosen = run.round(f"choose {number}", partial(self._choose, run, owed))
            strength = self.penalty * pressure

            def penalty(chosen: Any = chosen, strength: float = strength) -> Tensor:
                return strength * magnitude(run, chosen)

            run.train(f"press {number}", self.prune_epochs, penalty, decay=False)
            limits = {name: self.delta * pressure * limit for name, limit in first.items()}
            done = run.round(f"drop {number}", partial(self._drop, run, limits))
            owed = done["owed"]
            run.train(f"recover {number}", self.recover_epochs, decay=False)
            accuracy = run.evaluate(f"accuracy after {number}")
            assert accuracy is not None
            if accuracy < baseline - self.tolerance:
                run.round(f"take back {number}", lambda: run.revert("good"))
                run.note(f"round {number} cost more than the tolerance and was taken back")
                break
            pressure = headroom(accuracy, baseline, self.tolerance)
            if pressure == 0:
                run.note(f"the tolerance was spent after {number} rounds")
                break
            if done["macs"] <= (1 - self.target) * dense:
                break
        run.train("global", self.epochs)

    def _first(self, run: Run) -> dict[str, float]:
        return {
            name: first_threshold(mean_norms(run, name), self.threshold)
            for name in run.interfaces.readers
        }

    def _choose(self, run: Run, owed: dict[str, int]) -> dict[str, list[int]]:
        """Chooses whom to press: a fraction, and those whom a multiple held back last time."""
        chosen = {}
        for name in run.interfaces.readers:
            alive = run.alive(name)
            count = owed.get(name, 0) + max(int(self.fraction * alive.sum()), 1)
            chosen[name] = np.flatnonzero(
                weakest(mean_norms(run, name), alive, count, least=self.least)
            ).tolist()
        return chosen

    def _drop(self, run: Run, limits: dict[str, float]) -> dict[str, Any]:
        removed, owed = {}, {}
        for name, limit in limits.items():
            norms, alive = mean_norms(run, name), run.alive(name)
            under: BoolArray = (norms < limit) & alive
            filters = weakest(norms, alive, int(under.sum()), self.multiple, self.least) & under
            run.remove(name, filters)
            removed[name] = int(filters.sum())
            # A filter under its limit that stays is not pressed for in vain: the next are too.
            owed[name] = int(under.sum()) - removed[name]
        return {"macs": run.macs(), "removed": removed, "owed": owed}


def headroom(accuracy: float, baseline: float, tolerance: float) -> float:
    """Returns what is left of the tolerance, as a fraction from 0 to 1.

    >>> headroom(0.94, 0.95, 0.02), headroom(0.99, 0.95, 0.02), headroom(0.90, 0.95, 0.02)
    (0.5, 1.0, 0.0)
    """
    left = max(0.0, accuracy - (baseline - tolerance))
    return round(min(left / tolerance, 1.0), 9)


def mean_norms(run: Run, name: str) -> FloatArray:
    """Returns each filter's ℓ1 norm by its number of live weights.  # [F]"""
    mask = run.mask(name)
    live = mask.reshape(len(mask), -1).sum(1).cpu().numpy()
    result: FloatArray = outgoing(run.weight(name)) / np.maximum(live, 1)
    return result


def first_threshold(norms: FloatArray, quantile: float, steps: int = 50) -> float:
    """Finds, by binary search, the norm that this fraction of the filters lies under.

    >>> first_threshold(np.array([1.0, 2.0, 3.0, 4.0]), 0.5)
    2.0...
    """
    low, high = 0.0, float(norms.max())
    for _ in range(steps):
        middle = (low + high) / 2
        if (norms < middle).mean() < quantile:
            low = middle
        else:
            high = middle
    return high


def magnitude(run: Run, chosen: dict[str, list[int]]) -> Tensor:
    """Sums the absolute weights of the chosen filters of all layers."""
    terms = [run.layers[name].weight[rows].abs().sum() for name, rows in chosen.items() if rows]
    return torch.stack(terms).sum() if terms else torch.zeros((), device=run.device)
