# SPDX-License-Identifier: Apache-2.0
"""compact: removes dead filters and channels from a network, where that is exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import TraceError, VerificationError
from ..masks import BoolArray
from ..measure import stats, tables
from ..nn.base import ForcedBackend
from .channels import Channels
from .check import Match, verify
from .constants import ConstantChannels, constant_shift, constants, foldable
from .copying import copied
from .group_norm import of_class
from .layout import relayout, set_module
from .names import describe_node
from .parts import TracedParts, same_around, traced_parts
from .trace import FAILURES, as_inputs, check_network, record, trace

__all__ = ["CompactReport", "compact"]


class Shrunk(NamedTuple):
    """One layer that is smaller now.

    Attributes:
        name: of the layer.
        kind: the class that it has now.
        filters: before and after.
        channels: before and after.
        weights: live weights before and after.
    """

    name: str
    kind: str
    filters: tuple[int, int]
    channels: tuple[int, int]
    weights: tuple[int, int]


class Untraced(NamedTuple):
    """A module that was left as it is.

    Attributes:
        name: of the module; "the network" is the whole.
        reason: completes "left as it is because …".
    """

    name: str
    reason: str


class KeptChannels(NamedTuple):
    """Dead channels that had to stay.

    Attributes:
        name: of the layer.
        channels: how many.
        reason: completes "stayed because …".
    """

    name: str
    channels: int
    reason: str


@dataclass(frozen=True)
class CompactReport:
    """What `compact` did; ``str()`` is a table.

    Attributes:
        model: the smaller network: of the original's class with its names where only layers had
            to be replaced, else an ``fx.GraphModule``.
        shrunk: the layers that are smaller.
        stayed: dead channels that had to stay, and why.
        match: how far the outputs are from the original's; None where nothing changed. Where the
            network cannot be traced whole, it is that of the part that is farthest.
        untraced: what cannot be traced or made smaller, and why; where that is anything, the parts
            that can be traced were made smaller by themselves.
    """

    model: nn.Module
    shrunk: tuple[Shrunk, ...]
    stayed: tuple[KeptChannels, ...]
    match: Match | None
    untraced: tuple[Untraced, ...] = ()

    def __str__(self) -> str:
        before = sum(row.weights[0] for row in self.shrunk)
        after = sum(row.weights[1] for row in self.shrunk)
        lines = [
            f"{len(self.shrunk)} layers are smaller; their live weights {before:,} -> {after:,}"
        ]
        if self.match is not None:
            lines.append(f"outputs compared: {self.match}")
        if self.shrunk:
            rows = [(s.name, s.kind, *s.filters, *s.channels) for s in self.shrunk]
            header = ("layer", "is", "filters", "now", "channels", "now")
            lines += ["", tables.text_table(header, rows)]
        if self.stayed:
            lines += [
                "",
                tables.text_table(("dead, but stayed", "channels", "because"), self.stayed),
            ]
        if self.untraced:
            lines += ["", tables.text_table(("left as it is", "because"), self.untraced)]
        return "\n".join(lines)


def compact(model: nn.Module, example: Any) -> CompactReport:
    """Removes filters and channels that nothing depends on, and so makes a network smaller.

    A channel goes when every layer that reads it has no weight other than zero on it, or when it is
    constant and can be folded into the biases of those layers. That holds through residual sums
    (whose channels go together), concatenations, pooling, flattening (a channel is H·W features),
    depthwise and grouped layers, and group normalisation, whose groups go as a whole. The result is
    exact for every finite input, up to rounding. A constant that is not zero cannot be folded into
    a zero-padded layer, for at the border its part is another; there one of the constant channels
    stays and stands for the others, whose weights, in proportion, are added to its own. Layers
    whose groups become uneven keep a Support; all others are ordinary.

    Where the whole network cannot be traced, as a detector cannot, the largest parts that can be
    are made smaller, each by itself: what goes in and out of it keeps its channels.

    The original is not touched. The outputs of both are compared on the example and on noise; of
    parts, on what they are called with, and what is around them has to give the same bit for bit.

    Args:
        model: the network, in evaluation mode: constants go through batch normalisation.
        example: an input, or a tuple of inputs.

    Returns:
        The report, with the smaller network as ``report.model``; it can be trained further.

    Raises:
        InputTypeError: no nn.Module, or no tensor in the example.
        ArgumentError: the network is in training mode.
        TraceError: no part of the network can be traced.
        VerificationError: the outputs differ by more than rounding.
    """
    check_network(model)
    inputs = as_inputs(example)
    work = copied(model)
    found = traced_parts(work, inputs)
    if not found.parts:
        raise TraceError(found.untraced[""])
    if found.whole is None:
        return _in_parts(model, work, found, inputs)
    report, _ = shrink(work, inputs, found.whole.graph)
    if not report.shrunk:
        return report
    return replace(report, match=verify(model, report.model, inputs, "compact"))


def shrink(
    model: nn.Module, inputs: tuple[Any, ...], traced: fx.GraphModule | None = None
) -> tuple[CompactReport, fx.GraphModule]:
    """Does the work of `compact`, on the network itself and without comparing the outputs.

    Args:
        model: the network.
        inputs: arguments of its forward.
        traced: its graph, if that is known.

    Returns:
        The report, and the graph of the smaller network.
    """
    traced = trace(model, inputs) if traced is None else traced
    outcome = _smaller(Channels(traced))
    result: nn.Module = traced
    if (
        traced.meta["traced by"] == "torch.fx"
        and not outcome.changed
        and not isinstance(model, ForcedBackend)
    ):
        for name, module in outcome.replaced.items():
            set_module(model, name, of_class(model.get_submodule(name), module))
        result = model
    if outcome.replaced:
        record(traced, inputs)
    traced.eval()
    return CompactReport(result, outcome.shrunk, outcome.stayed, None), traced


class _Outcome(NamedTuple):
    """What became of a graph: its new modules, and whether anything but modules changed."""

    replaced: dict[str, nn.Module]
    changed: bool
    shrunk: tuple[Shrunk, ...]
    stayed: tuple[KeptChannels, ...]


def _smaller(channels: Channels) -> _Outcome:
    """Makes a traced network smaller, in place."""
    plan = _Plan(channels, constants(channels))
    layout = {node: np.flatnonzero(plan.kept[channels.of(node)]) for node in channels.wires}
    shifts = plan.fold()
    stayed = tuple(plan.stayed())
    replaced, changed = relayout(channels, layout, shifts)
    return _Outcome(replaced, changed, tuple(_shrunk(channels, replaced)), stayed)


def _in_parts(
    model: nn.Module, work: nn.Module, found: TracedParts, inputs: tuple[Any, ...]
) -> CompactReport:
    """Makes the parts of a copy smaller.

    Raises:
        VerificationError: what is around the parts does not give the same with the smaller ones.
    """
    shrunk: list[Shrunk] = []
    stayed: list[KeptChannels] = []
    untraced = [Untraced(name or "the network", why) for name, why in found.untraced.items()]
    matches, changed = [], []
    for part in found.parts:
        outcome = _smaller(Channels(part.graph, part.elsewhere))
        stayed += [row._replace(name=_within(part.name, row.name)) for row in outcome.stayed]
        if not outcome.replaced:
            continue
        if outcome.changed:
            untraced.append(Untraced(part.name, "its own code says how many channels there are"))
            continue
        old = {name: part.module.get_submodule(name) for name in outcome.replaced}
        try:
            for name, module in outcome.replaced.items():
                set_module(part.module, name, of_class(old[name], module))
            whole = model.get_submodule(part.name)
            matches += [verify(whole, part.module, call, "compact") for call in part.calls]
        except (VerificationError, *FAILURES) as error:
            for name, module in old.items():
                set_module(part.module, name, module)
            untraced.append(Untraced(part.name, str(error)))
        else:
            changed.append(part.name)
            shrunk += [row._replace(name=f"{part.name}.{row.name}") for row in outcome.shrunk]
    if changed and not same_around(model, work, changed, inputs):
        raise VerificationError(
            f"compact changes what is around {', '.join(changed)}: with the same outputs of these "
            "parts the network gives another result. The network was left as it was. Its code may "
            "read their weights or widths."
        )
    worst = max(matches, key=lambda match: match.error, default=None)
    return CompactReport(work, tuple(shrunk), tuple(stayed), worst, tuple(untraced))


def _within(part: str, described: str) -> str:
    """Names a layer, as a row of a part's report does, in the whole network."""
    what, of, name = described.partition(" of ")
    return f"{what}{of}{part}.{name}"


class _Plan:
    """What stays of a network's channels.

    Starts with all classes of channels and takes away what no reader needs, until nothing more
    goes: a filter that is gone reads nothing.

    Attributes:
        kept: the classes that something depends on.  # bool [classes]
    """

    def __init__(self, channels: Channels, known: dict[fx.Node, ConstantChannels]) -> None:
        self.channels, self.known = channels, known
        self.reads = {node: layer.reads for node, layer in channels.layers.items()}
        self.folds = {
            node: foldable(layer, known[channels.reader(node)])
            for node, layer in channels.layers.items()
        }
        self.stand_ins = self._stand_ins()
        self.kept = self._kept()

    def _columns(self, node: fx.Node) -> BoolArray:
        """Tells which channels a layer's filters that stay read.  # bool [C]"""
        rows = self.reads[node][self.kept[self.channels.of(node)]]
        return np.asarray(rows.any(0))

    def _border(self, node: fx.Node) -> BoolArray:
        """Tells which channels are constants that zero padding keeps from being folded."""
        constant = self.known[self.channels.reader(node)]
        return constant.known & ~self.folds[node] & np.isfinite(constant.value)

    def _stand_ins(self) -> dict[fx.Node, int]:
        """Picks for each padded layer the constant channel that stands for its other ones.

        Constants that are not zero are multiples of one another, borders included: the weights on
        all of them can be added up on one.
        """
        found = {}
        for node, layer in self.channels.layers.items():
            border = self._border(node) & self.reads[node].any(0)
            if layer.merges and border.sum() > 1:
                value = self.known[self.channels.reader(node)].value
                found[node] = int(np.where(border, np.abs(value), -1.0).argmax())
        return found

    def _kept(self) -> BoolArray:
        channels = self.channels
        standing = np.zeros(channels.count, bool)
        for node, place in self.stand_ins.items():
            standing[channels.of(channels.reader(node))[place]] = True
        for node in self.stand_ins:
            mergeable = self._border(node) & ~standing[channels.of(channels.reader(node))]
            self.folds[node] = self.folds[node] | mergeable
        fixed = np.zeros(channels.count, bool)
        fixed[list(channels.frozen)] = True
        self.kept = np.ones(channels.count, bool)
        while True:
            needed = fixed.copy()
            for node in channels.layers:
                columns, source = self._columns(node), channels.of(channels.reader(node))
                needed[source[columns & ~self.folds[node]]] = True
                if node in self.stand_ins and self._merged(node, columns).any():
                    needed[source[self.stand_ins[node]]] = True
            for node in channels.wires:  # no value may be without channels
                classes = channels.of(node)
                if len(classes) and not needed[classes].any():
                    needed[classes[0]] = True
            for unit in channels.units:
                needed[unit] |= needed[unit].any()
            needed &= self.kept
            if np.array_equal(needed, self.kept):
                return self.kept
            self.kept = needed

    def _merged(self, node: fx.Node, columns: BoolArray) -> BoolArray:
        """Tells which of the columns leave a layer only because another stands for them."""
        constant = self.known[self.channels.reader(node)]
        own = foldable(self.channels.layers[node], constant)
        merged: BoolArray = columns & self.folds[node] & ~own
        return merged

    def fold(self) -> dict[fx.Node, Tensor]:
        """Puts what goes into what stays: returns shifts of biases, and lets layers merge."""
        shifts: dict[fx.Node, Tensor] = {}
        channels = self.channels
        for node, layer in channels.layers.items():
            source = channels.reader(node)
            constant, gone = self.known[source], ~self.kept[channels.of(source)]
            away = np.flatnonzero(gone & foldable(layer, constant))
            shift = constant_shift(layer, constant, away)
            if shift is not None:
                shifts[node] = shift
            merged = np.flatnonzero(gone & self._merged(node, self._columns(node)))
            if len(merged):
                place = self.stand_ins[node]
                ratios = constant.value[merged] / constant.value[place]
                layer.merge(place, merged, torch.as_tensor(ratios))
        return shifts

    def stayed(self) -> Iterator[KeptChannels]:
        """Lists dead channels that stay, with the reason."""
        channels = self.channels
        reasons = channels.bound() | channels.frozen
        for node, layer in channels.layers.items():
            classes = channels.of(channels.reader(node))
            border = self._border(node) & self._columns(node) & self.kept[classes]
            if layer.padded and border.any():
                reason = "constant but not zero: its zero padding makes them differ at the border"
                yield KeptChannels(f"inputs of {describe_node(node)}", int(border.sum()), reason)
            dead = self.known[node].known & self.kept[channels.of(node)]
            if dead.any():
                why = {reasons.get(int(c)) for c in channels.of(node)[dead]}
                reason = "; ".join(sorted(w for w in why if w)) or (
                    "what they are added to or what reads them is not dead"
                )
                yield KeptChannels(f"filters of {describe_node(node)}", int(dead.sum()), reason)


def _shrunk(channels: Channels, replaced: dict[str, nn.Module]) -> list[Shrunk]:
    rows = []
    for node, layer in channels.layers.items():
        new = replaced.get(str(node.target))
        if new is None:
            continue
        f, c = _sizes(new)
        weights = (stats.live_weights(layer.module) or 0, stats.live_weights(new) or 0)
        kind = type(new).__name__
        rows.append(
            Shrunk(str(node.target), kind, (layer.filters, f), (layer.channels, c), weights)
        )
    return rows


def _sizes(module: nn.Module) -> tuple[int, int]:
    if hasattr(module, "out_channels"):
        return int(module.out_channels), int(module.in_channels)  # type: ignore[arg-type]
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
