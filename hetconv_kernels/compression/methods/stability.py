# SPDX-License-Identifier: Apache-2.0
"""Stability: the filters that an extra regulariser changes most are removed first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import ArgumentError, mismatch
from ..method import Method
from ..run import Run
from ..schedule import check_count, check_fraction, check_positive, share, weakest
from ..scores import instability, outgoing
from ..tolerance import Goal, until
from .wsp import check_interfaces

REGULARISERS = ("l1", "l2")
SCORES = ("instability", "norm")


@dataclass(frozen=True)
class Stability(Method):
    """Stability-based filter pruning: what a filter's norm does under a second regulariser.

    A step trains the network from the same point twice, on the same batches, without and with an
    extra regulariser, and scores filter j by |‖w_j‖₁ − ‖w'_j‖₁| / ‖w_j‖₁. The least stable, those
    of the largest change, go; the network trained without the regulariser is fine-tuned.

    Source: Singh, Kadi, Verma, Namboodiri, "Stability Based Filter Pruning for Accelerating Deep
    CNNs", WACV 2019, arXiv 1811.08321. Our reading; no code was published.

    Deviations: the steps repeat within an accuracy tolerance. ``score="norm"`` removes by ℓ1 norm
    instead, for comparison. ``multiple`` is ours (1 is the paper).

    Attributes:
        fraction: of the filters of a layer that a step removes.
        regulariser: ``"l1"`` or ``"l2"``, of the second training.
        weight: of that regulariser.
        score: ``"instability"`` or ``"norm"``.
        probe_epochs: of each of the two trainings.
        tune_epochs: of fine-tuning after each removal.
        tolerance: the loss of accuracy that ends the steps.
        target: the fraction of MACs that is enough; the steps end there too.
        steps: at most so many.
        epochs: of training at the end.
        multiple: what remaining widths are multiples of; what does not go in one step goes later.
        least: filters that every layer keeps.

    Raises:
        ArgumentError: a value out of range.
    """

    title: ClassVar[str] = "stability"
    needs_accuracy: ClassVar[bool] = True
    removes_filters: ClassVar[bool] = True

    fraction: float = 0.1
    regulariser: str = "l1"
    weight: float = 1e-4
    score: str = "instability"
    probe_epochs: int = 2
    tune_epochs: int = 10
    tolerance: float = 0.01
    target: float = 0.9
    steps: int = 50
    epochs: int = 90
    multiple: int = 1
    least: int = 2

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction)
        check_positive("weight", self.weight)
        for name, options in (("regulariser", REGULARISERS), ("score", SCORES)):
            if getattr(self, name) not in options:
                raise ArgumentError(mismatch(name, repr(getattr(self, name)), f"one of {options}"))
        for name, least in (
            ("probe_epochs", 1), ("tune_epochs", 0), ("epochs", 0), ("multiple", 1), ("least", 1),
        ):  # fmt: skip
            check_count(name, getattr(self, name), least)
        self._goal()

    def _goal(self) -> Goal:
        return Goal(self.tolerance, self.target, self.steps)

    def check(self, run: Run) -> None:
        """Refuses a network without a width that can be changed."""
        super().check(run)
        check_interfaces(self.title, run)

    def run(self, run: Run) -> None:
        """Repeats steps, takes back one that costs too much, trains at the end."""
        owed: dict[str, int] = {}
        until(run, self._goal(), lambda number: self._step(run, number, owed))
        run.train("global", self.epochs)

    def _step(self, run: Run, number: int, owed: dict[str, int]) -> bool:
        run.round(f"same point {number}", lambda: run.snapshot("point"))
        with run.same_draws():

            def penalty() -> Tensor:
                return self.weight * regulariser(run, self.regulariser)

            run.train(f"with {number}", self.probe_epochs, penalty, decay=False)
        run.round(f"remember {number}", lambda: self._remember(run))
        with run.same_draws():
            run.train(f"without {number}", self.probe_epochs, decay=False)
        done = run.round(f"drop {number}", lambda: self._drop(run, owed))
        owed.update(done["owed"])
        run.train(f"tune {number}", self.tune_epochs)
        return bool(sum(done["removed"].values()))

    def _remember(self, run: Run) -> None:
        for name in run.interfaces.readers:
            run.tensors[f"with/{name}"] = run.layers[name].weight.detach().clone()
        run.revert("point")
        run.forget("point")

    def _drop(self, run: Run, owed: dict[str, int]) -> dict[str, Any]:
        widths = {name: int(run.alive(name).sum()) for name in run.interfaces.readers}
        removed, owed = share(widths, self.fraction, owed, self.multiple, self.least)
        for name in run.interfaces.readers:
            plain, alive = run.weight(name), run.alive(name)
            if self.score == "norm":
                scores = outgoing(plain)
            else:
                scores = -instability(plain, run.tensors[f"with/{name}"])
            run.remove(name, weakest(np.asarray(scores), alive, removed[name]))
        run.forget("with")
        return {"macs": run.macs(), "removed": removed, "owed": owed}


def regulariser(run: Run, kind: str) -> Tensor:
    """Sums the absolute or the squared weights of all layers."""
    weights = [layer.weight for layer in run.layers.values()]
    terms = [w.abs().sum() if kind == "l1" else w.square().sum() for w in weights]
    return torch.stack(terms).sum()
