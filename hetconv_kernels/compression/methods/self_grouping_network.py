# SPDX-License-Identifier: Apache-2.0
"""SelfGrouping: self-grouping convolution on a whole network, with its schedules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from ...backends import get_backend
from ...errors import ArgumentError, SupportError, mismatch
from ...self_grouping import self_group
from ..method import STEM, Method, is_stem
from ..run import Run, WeightLayer
from ..schedule import check_count, check_fraction, rising


@dataclass(frozen=True)
class SelfGrouping(Method):
    """Self-grouping convolution on a network: rising percentiles, then (or between) fine-tuning.

    Source: Guo, Wu, Kittler, Feng, Neural Networks 132, 2020, arXiv 2009.13803.

    Deviations: a layer that a step would leave without any weight keeps the Support of the step
    before, and the report names it; a layer of fewer filters than ``clusters`` has as many clusters
    as filters. ``granularity``, ``tile``, ``adjacent`` and ``fill`` are ours: they make groups that
    hardware reads well.

    Attributes:
        target: the fraction of (filter, channel) pairs of convolutions to drop.
        fc_target: that of fully-connected layers, which bear less (0.6 at most in the paper).
        step: by which the fraction rises: 0.1, 0.2, … to the target.
        clusters: of filters in a layer.
        schedule: ``"G"`` drops in all steps and then trains; ``"LG"`` trains after each step too.
        local_epochs: of training after each step, for ``"LG"``.
        epochs: of training at the end.
        granularity: channels are kept or dropped in runs of this many (1 is the paper; 8, 16, 32).
        tile: clusters have a multiple of this many filters, all but one the same, and stay the
            same from step to step (0 is the paper: as k-means finds them).
        adjacent: that many filters that follow each other are in one cluster (1 is the paper).
        fill: the channels that a cluster keeps are a multiple of this, where that changes their
            number by a quarter at most (1 is the paper).
        stem: whether a convolution that reads an image is taken too.

    Raises:
        ArgumentError: a value out of range.
    """

    title: ClassVar[str] = "self-grouping"

    target: float = 0.7
    fc_target: float = 0.6
    step: float = 0.1
    clusters: int = 16
    schedule: str = "G"
    local_epochs: int = 20
    epochs: int = 90
    granularity: int = 1
    tile: int = 0
    adjacent: int = 1
    fill: int = 1
    stem: bool = False

    def __post_init__(self) -> None:
        rising(self.step, self.target)
        check_fraction("fc_target", self.fc_target)
        for name, least in (
            ("clusters", 1), ("local_epochs", 0), ("epochs", 0), ("granularity", 1), ("tile", 0),
            ("adjacent", 1), ("fill", 1),
        ):  # fmt: skip
            check_count(name, getattr(self, name), least)
        if self.schedule not in ("G", "LG"):
            raise ArgumentError(mismatch("schedule", repr(self.schedule), "'G' or 'LG'"))

    @classmethod
    def matched(cls, backend: str, **settings: Any) -> SelfGrouping:
        """Makes the method with groups that match the tiles of a backend. Ours, not the paper's.

        Args:
            backend: the name of one that is built here and has tiles.
            settings: the other attributes; ``granularity``, ``tile``, ``adjacent`` and ``fill`` win
                over the backend's.

        Raises:
            BackendError: there is no such backend in this installation.
            ArgumentError: it has no tiles, or a setting is out of range.
        """
        grain = getattr(get_backend(backend), "grain", None)
        if grain is None:
            raise ArgumentError(
                mismatch("backend", repr(backend), "one with tiles: 'cpu', 'triton' or 'cuda'",
                         "The others compute every group as part of a dense layer.")
            )  # fmt: skip
        own = dict(zip(("tile", "granularity", "adjacent", "fill"), grain, strict=False))
        if settings.get("tile", 0) % own.get("adjacent", 1):
            own["adjacent"] = 1  # which the tile that was asked for does not hold
        return cls(**(own | settings))

    def leaves_out(self, name: str, layer: WeightLayer) -> str | None:
        """Leaves out the stem, as the paper does."""
        return STEM if is_stem(layer) and not self.stem else None

    def run(self, run: Run) -> None:
        """Drops in steps, trains locally for ``"LG"``, and globally at the end."""
        before = 0.0
        for fraction in rising(self.step, self.target):
            what = f"group {100 * fraction:g} %"
            done = run.round(what, partial(self._step, run, fraction, before))
            for name in done["stopped"]:
                run.note(f"{name} would lose every weight at {100 * fraction:g} % and stays")
            if self.schedule == "LG":
                run.train(f"local after {100 * fraction:g} %", self.local_epochs)
            before = fraction
        run.train("global", self.epochs)

    def _step(self, run: Run, fraction: float, before: float) -> dict[str, Any]:
        stopped = []
        for name, layer in run.layers.items():
            limit = self.fc_target if isinstance(layer, nn.Linear) else self.target
            if min(before, limit) == min(fraction, limit):
                continue
            support = run.support(name)
            try:
                chosen = self_group(
                    run.weight(name),
                    100 * min(fraction, limit),
                    min(self.clusters, support.filters),
                    support,
                    run.seed,
                    granularity=self.granularity,
                    tile=self.tile,
                    adjacent=self.adjacent,
                    fill=self.fill,
                )
            except SupportError:
                stopped.append(name)
                continue
            run.choose(name, chosen.mask)
        return {"macs": run.macs(), "stopped": stopped}
