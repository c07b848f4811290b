# SPDX-License-Identifier: Apache-2.0
"""Play and Prune: the user names an error tolerance, and two players spend it."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from ...masks import BoolArray, FloatArray
from ..method import Method
from ..run import Run
from ..schedule import check_count, check_fraction, check_positive, weakest
from ..scores import outgoing
from .wsp import check_interfaces

__all__ = ["PlayAndPrune", "headroom", "next_pressure"]


@dataclass(frozen=True)
class PlayAndPrune(Method):
    """Play and Prune: adaptive filter pruning under a controller that watches the accuracy.

    The filter pruner (AFP) puts an ℓ1 penalty λ on the α of filters of least ℓ1 norm in each layer
    for a few epochs, and removes those whose norm is under the layer's threshold W. The controller
    (PRC) measures the headroom T = max(0, accuracy − (baseline − ε)) / ε, at most 1, and sets the
    pressure s ← δ·T·s, that scales λ, W and α: it rises while the tolerance is hardly touched, and
    falls as it is spent. A round that ends under baseline − ε is taken back, and the next one
    tries half the pressure.

    Source: Singh, Verma, Rai, Namboodiri, "Play and Prune: Adaptive Filter Pruning for Deep Model
    Compression", IJCAI 2019, arXiv 1905.04446. Our reading; no code was published.

    Deviations: T is taken as a fraction of ε, since multiplied on and on by a T of a few
    hundredths, λ and W would vanish within two rounds whatever the accuracy; no round halves the
    pressure more than once. W is found anew in each round, since norms lie so close together that
    a factor on the first one soon takes all filters of a layer, or none. The ℓ1 penalty is
    decoupled from the loss and the optimiser, as AdamW decouples the decay: after each step the
    pressed weights come closer to zero by the same amount, such that a round takes λ·min(s, 1) of
    their mean magnitude where the loss does not oppose, whatever the number of steps and the
    learning rate. Norms are means over a filter's live weights, so that filters that lost channels
    are not pruned for that. ``multiple`` is ours (1 is the paper).

    Attributes:
        tolerance: ε, the loss of accuracy that may be spent.
        fraction: α, of the filters of each layer that a round puts under pressure; α·s at most ½.
        penalty: λ, the fraction of their mean magnitude that the filters under pressure lose in a
            round, where the loss does not oppose.
        threshold: the quantile of a layer's norms that W is found at, by binary search, before
            the filters are pressed; at most ½ with the pressure.
        delta: δ, what the pressure rises by while all of the tolerance is left.
        prune_epochs: of training under the penalty, in each round.
        recover_epochs: of training without it after each removal, at a learning rate that falls as
            at the end: the baseline that the round is held to was trained so.
        retries: rounds in a row that may be taken back, or remove nothing, before pruning ends.
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
    penalty: float = 0.5
    threshold: float = 0.1
    delta: float = 1.5
    prune_epochs: int = 2
    recover_epochs: int = 2
    retries: int = 3
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
            ("prune_epochs", 0), ("recover_epochs", 0), ("retries", 0), ("epochs", 0),
            ("rounds", 1), ("multiple", 1), ("least", 1),
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
        pressure, idle = 1.0, 0
        owed: dict[str, int] = {}
        for number in range(1, self.rounds + 1):
            run.round(f"keep before {number}", lambda: run.snapshot("good"))
            done = self._round(run, number, pressure, owed)
            accuracy = run.evaluate(f"accuracy after {number}")
            assert accuracy is not None
            worse = accuracy < baseline - self.tolerance
            if worse:
                run.round(f"take back {number}", lambda: run.revert("good"))
                run.note(f"round {number} cost more than the tolerance and was taken back")
                vain, owed = True, {}
            else:
                # What a multiple holds back for the next round is progress too.
                held = sum(done["owed"].values()) > sum(owed.values())
                vain, owed = not (sum(done["removed"].values()) or held), done["owed"]
            idle = idle + 1 if vain else 0
            pressure = next_pressure(
                pressure, headroom(accuracy, baseline, self.tolerance), self.delta
            )
            run.round(f"pressure after {number}", partial(float, pressure))
            if idle > self.retries:
                run.note(f"{idle} rounds in a row could not remove a filter within the tolerance")
                break
            if not worse and done["macs"] <= (1 - self.target) * dense:
                break
        run.train("global", self.epochs)

    def _round(
        self, run: Run, number: int, pressure: float, owed: dict[str, int]
    ) -> dict[str, Any]:
        """Presses, drops and recovers."""
        chosen = run.round(f"choose {number}", lambda: self._choose(run, owed, pressure))
        total = self.penalty * min(pressure, 1.0)
        press = _Press(run, chosen, total / max(self.prune_epochs, 1))
        run.train(
            f"press {number}", self.prune_epochs, after_step=press.step, decay=False,
            after_epoch=press.end,
        )  # fmt: skip
        limits = {name: found["threshold"] for name, found in chosen.items()}
        done: dict[str, Any] = run.round(f"drop {number}", lambda: self._drop(run, limits))
        run.train(f"recover {number}", self.recover_epochs)
        return done

    def _choose(self, run: Run, owed: dict[str, int], pressure: float) -> dict[str, dict[str, Any]]:
        """Chooses whom to press: a fraction, and those whom a multiple held back last time.

        Returns:
            For each layer the filters, the mean magnitude of their weights, and the threshold.
        """
        share, quantile = (min(part * pressure, 0.5) for part in (self.fraction, self.threshold))
        chosen = {}
        for name in run.interfaces.readers:
            norms, alive = mean_norms(run, name), run.alive(name)
            count = owed.get(name, 0) + max(int(share * alive.sum()), 1)
            pressed = weakest(norms, alive, count, least=self.least)
            chosen[name] = {
                "filters": np.flatnonzero(pressed).tolist(),
                "magnitude": float(norms[pressed].mean()) if pressed.any() else 0.0,
                "threshold": threshold_of(norms[alive], quantile),
            }
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


def threshold_of(norms: FloatArray, quantile: float, steps: int = 50) -> float:
    """Finds, by binary search, the norm that this fraction of the filters lies under.

    >>> threshold_of(np.array([1.0, 2.0, 3.0, 4.0]), 0.5)
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


def next_pressure(pressure: float, left: float, delta: float) -> float:
    """Returns what comes after a round: δ·T times as much, and half of it at least.

    >>> next_pressure(1.0, 1.0, 1.5), next_pressure(1.0, 0.5, 1.5), next_pressure(1.0, 0.0, 1.5)
    (1.5, 0.75, 0.5)

    Args:
        pressure: of the round.
        left: T, the fraction of the tolerance that is left; 0 where the round is taken back.
        delta: δ.
    """
    return pressure * max(delta * left, 0.5)


class _Press:
    """Takes an ℓ1 norm down by equal steps: the proximal operator of the penalty, after each step.

    An epoch takes the same whatever its number of batches, which is that of the epoch before, or
    that of the data where they have a length. What an epoch's steps left is taken at its end.

    Args:
        run: whose weights are pressed.
        chosen: the filters of each layer, and what of each weight is to go by a ``share`` of 1.
        share: of that magnitude, for an epoch.
    """

    _BATCHES = "batches of an epoch"  # among the tensors of the run, so that a kill forgets nothing

    def __init__(self, run: Run, chosen: dict[str, dict[str, Any]], share: float) -> None:
        self._run, self._chosen, self._share = run, chosen, share
        self._steps, self._taken = 0, 0.0

    def step(self) -> None:
        """Takes an equal part of the epoch's share."""
        self._steps += 1
        data: Any = self._run.training.data
        known = self._run.tensors.get(self._BATCHES)
        if known is not None:
            batches = int(known)
        elif isinstance(data, Sized):
            batches = len(data)
        else:
            return
        self._take(min(self._steps / max(batches, 1), 1.0))

    def end(self) -> None:
        """Takes what is left of the epoch's share."""
        self._take(1.0)
        self._run.tensors[self._BATCHES] = torch.tensor(self._steps)
        self._steps, self._taken = 0, 0.0

    @torch.no_grad()
    def _take(self, part: float) -> None:
        share, self._taken = self._share * (part - self._taken), part
        for name, chosen in self._chosen.items():
            weight = self._run.layers[name].weight
            rows = weight[chosen["filters"]]
            weight[chosen["filters"]] = rows.sign() * (
                rows.abs() - share * chosen["magnitude"]
            ).clamp(min=0)
