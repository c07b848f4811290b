# SPDX-License-Identifier: Apache-2.0
"""Filter correlation: makes alike filters still more alike, and drops one of each pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...masks import BoolArray, FloatArray
from ..method import Method
from ..run import Run
from ..schedule import check_count, check_fraction, check_positive, removable, share
from ..scores import correlation, outgoing, pair_correlation
from ..tolerance import Goal, until
from .wsp import check_interfaces

__all__ = ["FilterCorrelation", "most_correlated"]

FilterPair = tuple[int, int]


@dataclass(frozen=True)
class FilterCorrelation(Method):
    """Filter-correlation compression: what a filter knows, its most correlated partner knows too.

    An episode: in each layer the filter pairs of largest |Pearson correlation| are chosen; a few
    epochs on the loss plus λ·Σ exp(−|ρ|) make their members alike; of each pair the member of
    smaller ℓ1 norm goes; the network is fine-tuned. Episodes repeat within the accuracy tolerance.
    The mean |ρ| of the pairs before and after that training is in the report's history.

    Source: Singh, Verma, Rai, Namboodiri, "Leveraging filter correlations for deep model
    compression", WACV 2020, arXiv 1811.10559. Our reading; no code was published.

    Deviations: the penalty is Σ exp(−|ρ|) over the pairs, where the paper has exp(−Σ|ρ|). For one
    pair they are the same. For the 51 pairs of a layer of 512 filters the paper's is e⁻¹² at
    |ρ| = 0.23, and so is what pulls each pair; of the sum, each pair is pulled as if it were alone,
    at any width and depth. A filter is in one pair only. ``multiple`` is ours (1 is the paper).

    Attributes:
        fraction: of the filters of a layer that an episode removes (the paper: at most 5–10 %).
        least_correlation: pairs below it are left alone.
        weight: λ of the penalty.
        pair_epochs: of training with the penalty.
        tune_epochs: of fine-tuning after each removal.
        tolerance: the loss of accuracy that ends the episodes.
        target: the fraction of MACs that is enough; the episodes end there too.
        episodes: at most so many.
        epochs: of training at the end.
        multiple: what remaining widths are multiples of; what does not go at once goes later.
        least: filters that every layer keeps.

    Raises:
        ArgumentError: a value out of range.
    """

    title: ClassVar[str] = "filter correlation"
    needs_accuracy: ClassVar[bool] = True
    removes_filters: ClassVar[bool] = True

    fraction: float = 0.1
    least_correlation: float = 0.1
    weight: float = 1.0
    pair_epochs: int = 3
    tune_epochs: int = 10
    tolerance: float = 0.01
    target: float = 0.9
    episodes: int = 50
    epochs: int = 90
    multiple: int = 1
    least: int = 2

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction)
        check_fraction("least_correlation", self.least_correlation)
        check_positive("weight", self.weight, zero=True)
        for name in ("pair_epochs", "tune_epochs", "epochs"):
            check_count(name, getattr(self, name))
        check_count("multiple", self.multiple, 1)
        check_count("least", self.least, 1)
        self._goal()

    def _goal(self) -> Goal:
        return Goal(self.tolerance, self.target, self.episodes)

    def check(self, run: Run) -> None:
        """Refuses a network without a width that can be changed."""
        super().check(run)
        check_interfaces(self.title, run)

    def run(self, run: Run) -> None:
        """Repeats episodes, takes back one that costs too much, trains at the end."""
        owed: dict[str, int] = {}
        until(run, self._goal(), lambda number: self._episode(run, number, owed))
        run.train("global", self.epochs)

    def _episode(self, run: Run, number: int, owed: dict[str, int]) -> bool:
        chosen = run.round(f"pairs {number}", lambda: self._pairs(run, owed))
        owed.update(chosen["owed"])
        pairs: dict[str, list[FilterPair]] = chosen["pairs"]
        if not any(pairs.values()):
            if chosen["highest"] is not None and chosen["highest"] < self.least_correlation:
                run.note(
                    f"the largest correlation of two filters is {chosen['highest']:.3f}, and "
                    f"least_correlation={self.least_correlation:g} excludes every pair: lower it "
                    "to go on"
                )
            return False

        def penalty() -> Tensor:
            return self.weight * alike(run, pairs)

        run.train(f"make alike {number}", self.pair_epochs, penalty, decay=False)
        removed = run.round(f"drop {number}", lambda: self._drop(run, chosen))
        run.train(f"tune {number}", self.tune_epochs)
        return bool(sum(removed["removed"].values()))

    def _pairs(self, run: Run, owed: dict[str, int]) -> dict[str, Any]:
        """Chooses as many pairs as filters can go, so that widths fit and none is trained idly."""
        widths = {name: int(run.alive(name).sum()) for name in run.interfaces.readers}
        counts, owed = share(widths, self.fraction, owed, self.multiple, self.least)
        found: dict[str, list[FilterPair]] = {}
        highest = [0.0]
        for name, count in counts.items():
            matrix, alive = correlation(run.weight(name)), run.alive(name)
            pairs = most_correlated(matrix, alive, count, self.least_correlation)
            if count:
                highest.append(float(matrix[np.ix_(alive, alive)].max()))
            going = removable(widths[name], len(pairs), self.multiple, self.least)
            found[name] = pairs[:going]
            owed[name] += count - going
        return {
            "pairs": found,
            "owed": owed,
            "highest": max(highest) if any(counts.values()) else None,
            "mean |ρ|": mean_correlation(run, found),
        }

    def _drop(self, run: Run, before: dict[str, Any]) -> dict[str, Any]:
        pairs: dict[str, list[FilterPair]] = before["pairs"]
        alike_now = mean_correlation(run, pairs)
        removed = {}
        for name, chosen in pairs.items():
            if not chosen:
                continue
            filters = np.zeros(len(run.alive(name)), bool)
            filters[smaller_members(chosen, outgoing(run.weight(name)))] = True
            run.remove(name, filters)
            removed[name] = len(chosen)
        return {
            "macs": run.macs(),
            "removed": removed,
            "mean |ρ| before": before["mean |ρ|"],
            "mean |ρ| after": alike_now,
        }


def most_correlated(
    matrix: FloatArray, alive: BoolArray, count: int, least: float = 0.0
) -> list[FilterPair]:
    """Chooses disjoint pairs of the largest correlations, largest first.

    Args:
        matrix: |ρ| of all filters.  # [F, F]
        alive: which filters are still there.  # bool [F]
        count: at most so many pairs.
        least: pairs below it are not chosen.
    """
    rows, columns = np.triu_indices(len(matrix), 1)
    values = matrix[rows, columns]
    pairs: list[FilterPair] = []
    used = ~np.asarray(alive)
    for index in np.argsort(-values, kind="stable"):
        one, two = int(rows[index]), int(columns[index])
        if len(pairs) == count or values[index] < least:
            break
        if not (used[one] or used[two]):
            used[one] = used[two] = True
            pairs.append((one, two))
    return pairs


def smaller_members(pairs: list[FilterPair], norms: FloatArray) -> list[int]:
    """Returns of each pair the filter of smaller ℓ1 norm; the second one when they tie."""
    return [one if norms[one] < norms[two] else two for one, two in pairs]


def alike(run: Run, pairs: dict[str, list[FilterPair]]) -> Tensor:
    """Computes Σ exp(−|ρ|) over all pairs, which falls as pairs become alike.

    Example: two pairs of |ρ| = 0 give 2, and the slope for each is −1, whatever the other does; of
    exp(−Σ|ρ|) a pair's slope would fall by a factor e with each pair that is alike already.
    """
    terms = [
        torch.exp(-pair_correlation(run.layers[name].weight, chosen)).sum()
        for name, chosen in pairs.items()
        if chosen
    ]
    return torch.stack(terms).sum()


def mean_correlation(run: Run, pairs: dict[str, list[FilterPair]]) -> float | None:
    """Averages |ρ| over all pairs; None where there is none."""
    values = [
        pair_correlation(run.weight(name), chosen) for name, chosen in pairs.items() if chosen
    ]
    return float(torch.cat(values).mean()) if values else None
