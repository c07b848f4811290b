# SPDX-License-Identifier: Apache-2.0
"""WSP: removes the weak sub-network, the channels that neither side of an interface needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from ...errors import ArgumentError
from ...masks import BoolArray, FloatArray, IntArray
from ..interfaces import Reader
from ..method import Method
from ..run import Run
from ..schedule import check_count, check_fraction, weakest
from ..scores import incoming, outgoing

__all__ = ["WeakSubnetwork", "weak_channels"]


@dataclass(frozen=True)
class WeakSubnetwork(Method):
    """Weak sub-network pruning: one shot over all interfaces of a trained model, then fine-tuning.

    Channel i between layers l and l+1 has an outgoing score Σ|W_l[i]| and an incoming score
    Σ|W_l+1[:, i]|; it is weak when it is below the q-th percentile of *both* layers, and all weak
    channels go at once: q = 70 % removes about 56 %. Where several layers read a channel, its
    incoming score is the sum over them. Where a width cannot change (behind a residual sum, a gate,
    a concatenation or a shuffle) a layer is paired with those that read its channels next: their
    rows and columns die, and what is between keeps its width. Where a group normalisation is
    between them, the channels of a group have their mean scores and go together. Layers whose
    outputs are summed with equal rights, such as parallel branches, are one layer in this.

    Source: Guo, Wu, Kittler, Feng, "Weak sub-network pruning for strong and efficient neural
    networks", Neural Networks 144, 2021.

    Deviations: ``multiple`` is ours (1 is the paper). A layer that would lose all its channels
    keeps the ``least`` strongest.

    Attributes:
        percentile: q between convolutions, as a fraction; not the fraction that is removed.
        epochs: of training afterwards.
        multiple: what remaining widths are rounded up to a multiple of.
        least: filters that every layer keeps.
        fc_percentile: q between fully-connected layers; None is ``percentile``.
        conv_fc_percentile: q where a fully-connected layer reads a convolution; None is
            ``percentile``.
        residual: whether interfaces are pruned too whose width stays; their layers become Supports
            with dead rows and columns, where the others become smaller dense layers.

    Raises:
        ArgumentError: a value out of range.
    """

    title: ClassVar[str] = "WSP"
    removes_filters: ClassVar[bool] = True

    percentile: float = 0.7
    epochs: int = 90
    multiple: int = 1
    least: int = 1
    fc_percentile: float | None = None
    conv_fc_percentile: float | None = None
    residual: bool = True

    def __post_init__(self) -> None:
        for name in ("percentile", "fc_percentile", "conv_fc_percentile"):
            value = getattr(self, name)
            if value is not None or name == "percentile":
                check_fraction(name, value)
        check_count("epochs", self.epochs)
        check_count("multiple", self.multiple, 1)
        check_count("least", self.least, 1)

    def check(self, run: Run) -> None:
        """Refuses a network without an interface to prune."""
        super().check(run)
        check_interfaces(self.title, run, self.residual)

    def run(self, run: Run) -> None:
        """Removes the weak channels of all interfaces at once, then trains."""
        run.round("remove weak channels", lambda: self._remove(run))
        run.train("global", self.epochs)

    def _percentile(self, run: Run, name: str, readers: tuple[Reader, ...]) -> float:
        """Returns q for the interface behind a layer, by the kinds of layers on its two sides."""
        layers = [run.model.get_submodule(reader.name) for reader in readers]
        special = None
        if isinstance(run.layers[name], nn.Linear):
            special = self.fc_percentile
        elif any(isinstance(layer, nn.Linear) for layer in layers):
            special = self.conv_fc_percentile
        return self.percentile if special is None else special

    def _pairs(self, run: Run) -> list[tuple[list[str], tuple[Reader, ...]]]:
        """Lists the interfaces: the layers on the one side, mostly one, and on the other."""
        found = run.interfaces
        pairs = [([name], readers) for name, readers in found.readers.items()]
        if self.residual:
            parallel: dict[tuple[Reader, ...], list[str]] = {}
            for name, readers in found.behind.items():
                parallel.setdefault(readers, []).append(name)
            pairs += [(names, readers) for readers, names in parallel.items()]
        return pairs

    def _remove(self, run: Run) -> dict[str, Any]:
        found = run.interfaces
        chosen: dict[str, BoolArray] = {}
        for names, readers in self._pairs(run):  # all scores before any removal
            out = np.sum([outgoing(run.weight(name)) for name in names], axis=0)
            into, read = np.zeros_like(out), np.zeros(len(out), bool)
            for reader in readers:
                inputs = reader.of_filters(len(out))
                mine = inputs >= 0
                np.add.at(into, inputs[mine], incoming(run.weight(reader.name))[mine])
                read[inputs[mine]] = True
            if names[0] in found.units:
                units = np.array(found.units[names[0]])
                out, into = by_units(out, units), by_units(into, units)
            weak = np.zeros(len(out), bool)  # what none of the readers reads is somebody else's
            q = self._percentile(run, names[0], readers)
            weak[read] = weak_channels(out[read], into[read], q)
            alive = np.any([run.alive(name) for name in names], axis=0)
            multiple = self.multiple if names[0] in found.readers else 1  # the width stays
            filters = fit_width(weak, out + into, alive, multiple, self.least)
            chosen.update(dict.fromkeys(names, filters))
        for name, filters in chosen.items():
            run.remove(name, filters)
        removed = {name: int(filters.sum()) for name, filters in chosen.items()}
        return {"macs": run.macs(), "removed": removed}


def by_units(scores: FloatArray, units: IntArray) -> FloatArray:
    """Gives all filters of a unit their mean score, so that they go or stay together.

    Example: of the units 0, 0, 1 the scores 1, 3 and 5 become 2, 2 and 5.

    Args:
        scores: of the filters.  # float64 [F]
        units: the number of each filter's unit.  # int [F]
    """
    _, place = np.unique(units, return_inverse=True)
    sums, counts = np.bincount(place, scores), np.bincount(place)
    means: FloatArray = (sums / counts)[place]
    return means


def weak_channels(out: FloatArray, into: FloatArray, percentile: float) -> BoolArray:
    """Finds the channels below the percentile of both scores.  # [C], [C] -> bool [C]

    Example: the medians are 2.5 and 25; only the first channel is below both.

        >>> weak_channels(np.array([1.0, 2, 3, 4]), np.array([20.0, 30, 10, 40]), 0.5).tolist()
        [True, False, False, False]
    """
    result: BoolArray = (out < np.quantile(out, percentile)) & (
        into < np.quantile(into, percentile)
    )
    return result


def fit_width(
    remove: BoolArray, scores: FloatArray, alive: BoolArray, multiple: int, least: int
) -> BoolArray:
    """Takes back the strongest removals until the width fits.  # bool [F] -> bool [F]

    Args:
        remove: the filters to remove.
        scores: strength of the filters.
        alive: which are there.
        multiple: what the remaining width is to be a multiple of.
        least: filters that always remain.
    """
    wanted = remove & alive
    order = np.where(wanted, scores, np.inf)
    return weakest(order, alive, int(wanted.sum()), multiple, least) & wanted


def check_interfaces(title: str, run: Run, residual: bool = False) -> None:
    """Refuses a network in which no layer's width can be changed.

    Args:
        title: of the method.
        run: the network.
        residual: whether an interface behind a residual sum is enough.

    Raises:
        ArgumentError: there is none.
    """
    found = run.interfaces
    run.kept.update({name: f"width kept: {why}" for name, why in found.fixed.items()})
    if not found.readers and not (residual and found.behind):
        reasons = "; ".join(f"{n}: {why}" for n, why in list(found.fixed.items())[:3])
        raise ArgumentError(
            f"{title} removes whole filters, and finds no layer whose width can change ({reasons})."
        )
