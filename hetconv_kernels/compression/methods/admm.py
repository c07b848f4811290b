# SPDX-License-Identifier: Apache-2.0
"""ADMM: pulls the weights towards the nearest sparse ones, then prunes; again at a higher rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, mismatch
from ...masks import BoolArray
from ..method import STEM, Method, is_stem
from ..projections import KINDS, keep_largest, project
from ..run import Run, WeightLayer
from ..schedule import check_count, check_fraction, check_positive
from ..sensitivity import costs, densities
from ..wildcards import check_patterns, first_that_fits

ALLOCATIONS = ("sensitivity", "uniform")


@dataclass(frozen=True)
class ADMM(Method):
    """Progressive weight pruning by the alternating direction method of multipliers.

    For one rate: Z = Π(W), U = 0; train on the loss plus Σ ρ/2·‖W − Z + U‖²; every ``admm_epochs``
    ρ ← 1.3·ρ, Z ← Π(W + U), U ← U + W − Z; at last drop what Π(W) drops and retrain with masked
    gradients. Progressively: from there again at the next, higher rate, pruned weights frozen. With
    a ``tolerance`` the best partial pruning is kept: a rate that costs too much is taken back, and
    rates between it and the last good one are tried from there.

    Source: Ye et al., "Progressive Weight Pruning of Deep Neural Networks using ADMM", 2018,
    arXiv 1810.07378.

    Deviations: the paper sets the rate of each layer by hand. Here it comes from the layer's
    sensitivity unless ``layer_rates`` names it: the last weight of each layer costs the same (see
    `sensitivity`). The structured projections are the same method with another Π, as later work of
    the authors does; they are what hardware reads well. The optimiser begins anew after each update
    of Z.

    Attributes:
        rates: the fractions of weights to have pruned, rising, one for each progressive step; of
            all layers together, or of each with ``allocation="uniform"``.
        fc_rates: those of fully-connected layers; by default they are among the others.
        allocation: ``"sensitivity"`` or ``"uniform"``.
        layer_rates: rates by the name of a layer, or a pattern such as ``"features.*"``, the first
            one that fits; as many as ``rates``. The others' do not change with them.
        projection: ``"irregular"`` (the paper), ``"kernels"``, ``"columns"``, ``"runs"``,
            ``"blocks"``, ``"filters"``, ``"channels"`` or ``"patterns"``, see
            `projections.keep_largest`.
        filters: filters in a column or block.
        channels: channels in a run or block.
        entries: taps that a pattern keeps.
        patterns: different patterns in a layer, at most.
        updates: of Z and U, for each rate.
        admm_epochs: of training between two updates (the paper: 20 for CIFAR, 10 for ImageNet).
        retrain_epochs: of training after each hard pruning.
        rho: the first ρ of each rate.
        layer_rho: that of layers by name or pattern.
        growth: what ρ is multiplied with at an update.
        rescale: whether U is divided by ``growth`` then, which keeps ρ·U.
        candidates: factors of ρ; each is tried from the same weights at each rate, and the most
            accurate partial pruning kept.
        tolerance: the loss of accuracy that a partial pruning may cost; None does not look.
        retries: rates between the last good one and one that cost too much, at most.
        sensitivity_batches: of training data, by whose loss sensitivity is measured.
        stem: whether a convolution that reads an image is taken too.

    Raises:
        ArgumentError: a value out of range.
    """

    title: ClassVar[str] = "ADMM"

    rates: Sequence[float] = (0.7, 0.9)
    fc_rates: Sequence[float] | None = None
    allocation: str = "sensitivity"
    layer_rates: Mapping[str, Sequence[float]] | None = None
    projection: str = "irregular"
    filters: int = 8
    channels: int = 8
    entries: int = 4
    patterns: int = 8
    updates: int = 5
    admm_epochs: int = 20
    retrain_epochs: int = 40
    rho: float = 1e-3
    layer_rho: Mapping[str, float] | None = None
    growth: float = 1.3
    rescale: bool = False
    candidates: Sequence[float] = (1.0,)
    tolerance: float | None = None
    retries: int = 3
    sensitivity_batches: int = 8
    stem: bool = False

    def __post_init__(self) -> None:
        lists = {"rates": self.rates, **(self.layer_rates or {})}
        if self.fc_rates is not None:
            lists["fc_rates"] = self.fc_rates
        for name, rates in lists.items():
            for rate in rates:
                check_fraction("a rate", rate)
            if not rates or any(a >= b for a, b in pairwise(rates)):
                raise ArgumentError(mismatch(name, list(rates), "one or more, rising"))
            if len(rates) != len(self.rates):
                raise ArgumentError(
                    mismatch(name, list(rates), f"as many as rates, {len(self.rates)}")
                )
        for name, options in (("projection", KINDS), ("allocation", ALLOCATIONS)):
            if getattr(self, name) not in options:
                raise ArgumentError(mismatch(name, repr(getattr(self, name)), f"one of {options}"))
        for name, least in (
            ("filters", 1), ("channels", 1), ("entries", 1), ("patterns", 1), ("updates", 1),
            ("admm_epochs", 0), ("retrain_epochs", 0), ("retries", 0), ("sensitivity_batches", 1),
        ):  # fmt: skip
            check_count(name, getattr(self, name), least)
        check_positive("growth", self.growth)
        for value in (self.rho, *(self.layer_rho or {}).values(), *self.candidates):
            check_positive("rho", value)
        if not self.candidates:
            raise ArgumentError(mismatch("candidates", [], "one or more factors of rho"))
        if self.tolerance is not None:
            check_positive("tolerance", self.tolerance, zero=True)

    def leaves_out(self, name: str, layer: WeightLayer) -> str | None:
        """Leaves out the stem."""
        return STEM if is_stem(layer) and not self.stem else None

    def check(self, run: Run) -> None:
        """Refuses patterns that fit no layer, and a search that nothing can judge."""
        super().check(run)
        check_patterns("layer_rates", self.layer_rates, run.layers)
        check_patterns("layer_rho", self.layer_rho, run.layers)
        if (self.tolerance is not None or len(self.candidates) > 1) and not run.training.can_judge:
            raise ArgumentError(
                mismatch(
                    "evaluate of ADMM", None, "a callable, since accuracy decides",
                    "Or set tolerance=None and one candidate.",
                )
            )  # fmt: skip

    def run(self, run: Run) -> None:
        """Goes through the rates; with a tolerance, until one cannot be kept."""
        baseline = run.evaluate("baseline") if self.tolerance is not None else None
        good = dict.fromkeys((*run.layers, "rates", "fc_rates"), 0.0)
        for step in range(len(self.rates)):
            wanted = {name: self._wanted(run, name, step) for name in good}
            if baseline is None:
                self._best(run, wanted)
                continue
            if not self._kept(run, wanted, baseline):
                self._between(run, good, wanted, baseline)
                return
            good = wanted

    def _wanted(self, run: Run, name: str, step: int) -> float:
        """Returns the rate of all layers, of the fully-connected ones, or of a single one."""
        if name == "fc_rates" and self.fc_rates is not None:
            return self.fc_rates[step]
        named = first_that_fits(name, self.layer_rates) if name in run.layers else None
        if named is not None:
            return named[step]
        linear = isinstance(run.layers.get(name), nn.Linear)
        return (self.fc_rates if linear and self.fc_rates is not None else self.rates)[step]

    def _kept(self, run: Run, wanted: dict[str, float], baseline: float) -> bool:
        """Tries a rate; takes it back where it costs more than the tolerance."""
        assert self.tolerance is not None
        at = _percent(wanted["rates"])
        run.round(f"keep before {at}", lambda: run.snapshot("good"))
        accuracy = self._best(run, wanted)
        assert accuracy is not None
        if accuracy >= baseline - self.tolerance:
            return True
        run.round(f"take back {at}", lambda: run.revert("good"))
        run.note(f"{at} cost {baseline - accuracy:.4g}, more than the tolerance: taken back")
        return False

    def _between(
        self, run: Run, good: dict[str, float], bad: dict[str, float], baseline: float
    ) -> None:
        """Tries rates between one that was kept and one that was not, halving the ratio."""
        for _ in range(self.retries):
            tried = {name: 1 - ((1 - good[name]) * (1 - bad[name])) ** 0.5 for name in good}
            good, bad = (tried, bad) if self._kept(run, tried, baseline) else (good, tried)

    def _best(self, run: Run, wanted: dict[str, float]) -> float | None:
        """Prunes to one rate by each of the candidates, and keeps the most accurate one."""
        at = _percent(wanted["rates"])
        rates = run.round(f"rates at {at}", lambda: self._rates(run, wanted))
        if len(self.candidates) == 1:
            self._prune_to(run, rates, at, self.candidates[0])
            return run.evaluate(f"accuracy at {at}") if self.tolerance is not None else None
        found: list[float] = []
        for factor in self.candidates:
            which = f"{at}, ρ·{factor:g}"
            begin = run.revert if found else run.snapshot
            run.round(f"begin {which}", partial(begin, "before"))
            self._prune_to(run, rates, which, factor)
            accuracy = run.evaluate(f"accuracy at {which}")
            assert accuracy is not None
            if not found or accuracy > max(found):
                run.round(f"best is {which}", lambda: run.snapshot("best"))
            found.append(accuracy)
        run.round(f"take the best at {at}", lambda: self._take(run))
        return max(found)

    def _take(self, run: Run) -> None:
        run.revert("best")
        for slot in ("best", "before"):
            run.forget(slot)

    def _rates(self, run: Run, wanted: dict[str, float]) -> dict[str, float]:
        """Divides the rates among the layers."""
        if self.allocation == "uniform":
            return {name: wanted[name] for name in run.layers}
        rates = {
            name: wanted[name]
            for name in run.layers
            if first_that_fits(name, self.layer_rates) is not None
        }
        free = [name for name in run.layers if name not in rates]
        linear = [name for name in free if isinstance(run.layers[name], nn.Linear)]
        parts = [(free, "rates")]
        if self.fc_rates is not None:
            parts = [([n for n in free if n not in linear], "rates"), (linear, "fc_rates")]

        def keep(name: str, weight: Tensor, density: float) -> BoolArray:
            return self._keep(name, weight, {name: 1 - density})

        cost = costs(run, free, keep, self.sensitivity_batches)
        for names, key in parts:
            if not names:
                continue
            found = densities(
                {name: cost[name] for name in names},
                {name: run.layers[name].weight.numel() for name in names},
                {name: float(run.mask(name).double().mean()) for name in names},
                1 - wanted[key],
            )
            rates |= {name: 1 - density for name, density in found.items()}
        return {name: rates[name] for name in run.layers}

    def _prune_to(self, run: Run, rates: dict[str, float], at: str, factor: float) -> None:
        """Prunes to one rate: the updates, hard pruning and retraining."""
        run.round(f"Z = Π(W), U = 0 at {at}", lambda: self._start(run, rates))
        rho = {
            name: factor * (first_that_fits(name, self.layer_rho) or self.rho)
            for name in run.layers
        }
        for update in range(1, self.updates + 1):

            def penalty(rho: dict[str, float] = rho) -> Tensor:
                return distance(run, rho)

            run.train(f"ADMM {update} at {at}", self.admm_epochs, penalty, decay=False)
            rho = {name: self.growth * value for name, value in rho.items()}
            run.round(f"update {update} of Z and U at {at}", lambda: self._update(run, rates))
        run.round(f"prune to {at}", lambda: self._prune(run, rates))
        run.train(f"retrain at {at}", self.retrain_epochs)

    def _keep(self, name: str, weight: Tensor, rates: dict[str, float]) -> BoolArray:
        return keep_largest(
            weight, rates[name], self.projection, self.filters, self.channels, self.entries,
            self.patterns,
        )  # fmt: skip

    def _start(self, run: Run, rates: dict[str, float]) -> None:
        for name in run.layers:
            weight = run.weight(name)
            run.tensors[f"z/{name}"] = _like(run, name, self._z(name, weight, rates))
            run.tensors[f"u/{name}"] = torch.zeros_like(run.layers[name].weight)

    def _update(self, run: Run, rates: dict[str, float]) -> dict[str, float]:
        """Updates Z and U; returns how far W is from Z, relative to W."""
        apart = total = 0.0
        for name in run.layers:
            weight = run.weight(name)
            u = run.tensors[f"u/{name}"].double().cpu()
            if self.rescale:
                u = u / self.growth
            z = self._z(name, weight + u, rates)
            run.tensors[f"z/{name}"] = _like(run, name, z)
            run.tensors[f"u/{name}"] = _like(run, name, u + weight - z)
            apart += float((weight - z).square().sum())
            total += float(weight.square().sum())
        return {"distance": (apart / max(total, 1e-30)) ** 0.5}

    def _z(self, name: str, weight: Tensor, rates: dict[str, float]) -> Tensor:
        return project(weight, self._keep(name, weight, rates))

    def _prune(self, run: Run, rates: dict[str, float]) -> dict[str, Any]:
        for name in run.layers:
            weight = run.weight(name)
            keep = self._keep(name, weight, rates)
            run.choose(name, keep & run.mask(name).cpu().numpy())
            del run.tensors[f"z/{name}"], run.tensors[f"u/{name}"]
        return {"macs": run.macs()}


def distance(run: Run, rho: Mapping[str, float]) -> Tensor:
    """Computes Σ ρ/2·‖W − Z + U‖² over the layers, each with its ρ."""
    terms = [
        rho[name] / 2
        * (layer.weight - run.tensors[f"z/{name}"] + run.tensors[f"u/{name}"]).square().sum()
        for name, layer in run.layers.items()
    ]  # fmt: skip
    return torch.stack(terms).sum()


def _percent(rate: float) -> str:
    return f"{100 * rate:.4g} %"


def _like(run: Run, name: str, value: Tensor) -> Tensor:
    return value.to(run.layers[name].weight)
