# SPDX-License-Identifier: Apache-2.0
"""ADMM: pulls the weights towards the nearest sparse ones, then prunes; again at a higher rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, mismatch
from ...masks import BoolArray
from ..base import STEM, Method, is_stem
from ..projections import KINDS, keep_largest, project
from ..run import Run, WeightLayer
from ..schedule import check_count, check_fraction, check_positive


@dataclass(frozen=True)
class ADMM(Method):
    """Progressive weight pruning by the alternating direction method of multipliers.

    For one rate: Z = Π(W), U = 0; train on the loss plus Σ ρ/2·‖W − Z + U‖²; every ``admm_epochs``
    ρ ← 1.3·ρ, Z ← Π(W + U), U ← U + W − Z; at last drop what Π(W) drops and retrain with masked
    gradients. Progressively: from there again at the next, higher rate, pruned weights frozen.

    Source: Ye et al., "Progressive Weight Pruning of Deep Neural Networks using ADMM", 2018,
    arXiv 1810.07378.

    Deviations: one rate for all convolutions and one for all fully-connected layers, where the
    paper sets it by layer (``skip`` and ``stem`` leave layers out). The structured projections are
    the same method with another Π, as later work of the authors does; they are what hardware reads
    well. The optimiser begins anew after each update of Z.

    Attributes:
        rates: the fractions of weights to have pruned, rising, one for each progressive step.
        fc_rates: those of fully-connected layers; by default ``rates``.
        projection: ``"irregular"`` (the paper), ``"kernels"``, ``"columns"`` or ``"blocks"``, see
            `projections.keep_largest`.
        filters: filters in a column or block.
        channels: channels in a block.
        updates: of Z and U, for each rate.
        admm_epochs: of training between two updates (the paper: 20 for CIFAR, 10 for ImageNet).
        retrain_epochs: of training after each hard pruning.
        rho: the first ρ of each rate.
        growth: what ρ is multiplied with at an update.
        rescale: whether U is divided by ``growth`` then, which keeps ρ·U.
        stem: whether a convolution that reads an image is taken too.

    Raises:
        ArgumentError: a value out of range.
    """

    title: ClassVar[str] = "ADMM"

    rates: Sequence[float] = (0.7, 0.9)
    fc_rates: Sequence[float] | None = None
    projection: str = "irregular"
    filters: int = 8
    channels: int = 8
    updates: int = 5
    admm_epochs: int = 20
    retrain_epochs: int = 40
    rho: float = 1e-3
    growth: float = 1.3
    rescale: bool = False
    stem: bool = False

    def __post_init__(self) -> None:
        lists = [self.rates] if self.fc_rates is None else [self.rates, self.fc_rates]
        for rates in lists:
            for rate in rates:
                check_fraction("a rate", rate)
            if not rates or any(a >= b for a, b in pairwise(rates)):
                raise ArgumentError(mismatch("rates", list(rates), "one or more, rising"))
        if len(lists[0]) != len(lists[-1]):
            raise ArgumentError(
                mismatch("fc_rates", list(lists[-1]), f"as many as rates, {len(lists[0])}")
            )
        if self.projection not in KINDS:
            raise ArgumentError(mismatch("projection", repr(self.projection), f"one of {KINDS}"))
        for name, least in (
            ("filters", 1), ("channels", 1), ("updates", 1), ("admm_epochs", 0),
            ("retrain_epochs", 0),
        ):  # fmt: skip
            check_count(name, getattr(self, name), least)
        check_positive("rho", self.rho)
        check_positive("growth", self.growth)

    def leaves_out(self, name: str, layer: WeightLayer) -> str | None:
        """Leaves out the stem."""
        return STEM if is_stem(layer) and not self.stem else None

    def run(self, run: Run) -> None:
        """Goes through the rates; each with its updates, hard pruning and retraining."""
        for step, rate in enumerate(self.rates):
            at = f"{100 * rate:g} %"
            run.round(f"Z = Π(W), U = 0 at {at}", partial(self._start, run, step))
            rho = self.rho
            for update in range(1, self.updates + 1):

                def penalty(rho: float = rho) -> Tensor:
                    return distance(run, rho)

                run.train(f"ADMM {update} at {at}", self.admm_epochs, penalty, decay=False)
                rho *= self.growth
                run.round(
                    f"update {update} of Z and U at {at}",
                    partial(self._update, run, step),
                )
            run.round(f"prune to {at}", partial(self._prune, run, step))
            run.train(f"retrain at {at}", self.retrain_epochs)

    def _keep(self, run: Run, name: str, weight: Tensor, step: int) -> BoolArray:
        linear = isinstance(run.layers[name], nn.Linear)
        rates = self.fc_rates if linear and self.fc_rates is not None else self.rates
        return keep_largest(weight, rates[step], self.projection, self.filters, self.channels)

    def _start(self, run: Run, step: int) -> None:
        for name in run.layers:
            weight = run.weight(name)
            run.tensors[f"z/{name}"] = _like(run, name, self._z(run, name, weight, step))
            run.tensors[f"u/{name}"] = torch.zeros_like(run.layers[name].weight)

    def _update(self, run: Run, step: int) -> dict[str, float]:
        """Updates Z and U; returns how far W is from Z, relative to W."""
        apart = total = 0.0
        for name in run.layers:
            weight = run.weight(name)
            u = run.tensors[f"u/{name}"].double().cpu()
            if self.rescale:
                u = u / self.growth
            z = self._z(run, name, weight + u, step)
            run.tensors[f"z/{name}"] = _like(run, name, z)
            run.tensors[f"u/{name}"] = _like(run, name, u + weight - z)
            apart += float((weight - z).square().sum())
            total += float(weight.square().sum())
        return {"distance": (apart / max(total, 1e-30)) ** 0.5}

    def _z(self, run: Run, name: str, weight: Tensor, step: int) -> Tensor:
        return project(weight, self._keep(run, name, weight, step))

    def _prune(self, run: Run, step: int) -> dict[str, Any]:
        for name in run.layers:
            weight = run.weight(name)
            keep = self._keep(run, name, weight, step)
            run.choose(name, keep & run.mask(name).cpu().numpy())
            del run.tensors[f"z/{name}"], run.tensors[f"u/{name}"]
        return {"macs": run.macs()}


def distance(run: Run, rho: float) -> Tensor:
    """Computes Σ ρ/2·‖W − Z + U‖² over the layers."""
    terms = [
        (layer.weight - run.tensors[f"z/{name}"] + run.tensors[f"u/{name}"]).square().sum()
        for name, layer in run.layers.items()
    ]
    return rho / 2 * torch.stack(terms).sum()


def _like(run: Run, name: str, value: Tensor) -> Tensor:
    return value.to(run.layers[name].weight)
