# SPDX-License-Identifier: Apache-2.0
"""Interfaces: which layers read the output of a layer, and so what goes with one of its filters.

Removing filter i of a layer is exact when every layer that reads channel i is known and drops it
too, and nothing mixes the channels in between. Where that does not hold (a residual sum, a
concatenation, the output of the network) the layer keeps its width, and a sentence says why.

A network that cannot be traced whole, such as a detector, is looked at part by part
(`graph.parts`): what goes in and out of a part keeps its channels.

Where a width stays, a filter can still die together with what the *next* layers read of it: both
have dead rows and columns, and whatever is between them is as it was. That holds behind a residual
sum, whose other summand and later layers need its width, behind a gate, a concatenation, a channel
shuffle and a group normalisation.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, fx, nn

from ..graph.channels import Channels, is_depthwise
from ..graph.names import name_of
from ..graph.parts import traced_parts
from ..masks import IntArray


@dataclass(frozen=True)
class Reader:
    """A layer that reads another one's output.

    Attributes:
        name: of the layer.
        repeat: its inputs for each channel: 1, or H·W after a flatten.
        inputs: for each of its inputs the filter that it reads, -1 for another layer's; None where
            it reads all in order, each ``repeat`` times.
    """

    name: str
    repeat: int
    inputs: tuple[int, ...] | None = None

    def of_filters(self, filters: int) -> IntArray:
        """Returns for each input the filter that it reads, -1 for another layer's.

        Args:
            filters: of the layer that is read.
        """
        if self.inputs is not None:
            return np.array(self.inputs, dtype=np.int64)
        return np.repeat(np.arange(filters), self.repeat)


@dataclass(frozen=True)
class Interfaces:
    """What is known of a network's widths.

    Attributes:
        readers: for each layer whose filters can be removed, all layers that read them.
        fixed: for each other layer, why its width stays.
        behind: for layers among the fixed ones, those that read their channels next. Of several
            summands a reader is behind the deepest, the main path, or all of the deepest; one that
            no reader is behind, such as a down-sampling or what makes a gate, is not here.
        units: for layers among those, whose filters a group normalisation binds, the number of each
            filter's group: where whole groups go, the width can change.
    """

    readers: dict[str, tuple[Reader, ...]]
    fixed: dict[str, str]
    behind: dict[str, tuple[Reader, ...]] = field(default_factory=dict)
    units: dict[str, tuple[int, ...]] = field(default_factory=dict)


# What can be done about layers that are in no graph.
_WAY = (
    "Methods that keep filters work without a graph (HetConv, self-grouping, ADMM, frequency), and "
    "code without branches on values, in a module of its own, can be traced by itself"
)


class _Blocked(Exception):
    """The width of a layer is needed elsewhere; the text says where."""


def find_interfaces(
    model: nn.Module, layers: dict[str, nn.Conv2d | nn.Linear], example: Tensor
) -> Interfaces:
    """Finds the layers that read each layer, from the classes of channels that hang together.

    Args:
        model: the network; what of it cannot be traced keeps its widths.
        layers: the layers to look at.
        example: an input, for the shapes.
    """
    training = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in training:
            module.training = False
        found = traced_parts(model, (example,))
        known = {part.name: _Known(Channels(part.graph, part.elsewhere)) for part in found.parts}
    except Exception as error:  # noqa: BLE001  # user code may raise anything while it is traced
        reason = f"the network cannot be traced ({(str(error).splitlines() or [''])[0]})"
        return Interfaces({}, dict.fromkeys(layers, f"{reason}. {_WAY}"))
    finally:
        for module, flag in training:
            module.training = flag
    result = Interfaces({}, {})
    for name in layers:
        part = found.part_of(name)
        if part is None:
            result.fixed[name] = f"{found.why_not(name)}. {_WAY}"
        else:
            _look_up(name, part.name, known[part.name], result)
    return result


def _look_up(name: str, part: str, known: _Known, found: Interfaces) -> None:
    """Enters what is known of a layer in its part of the network."""
    prefix = f"{part}." if part else ""

    def named(readers: tuple[Reader, ...]) -> tuple[Reader, ...]:
        return tuple(replace(reader, name=prefix + reader.name) for reader in readers)

    own = name.removeprefix(prefix)
    try:
        found.readers[name] = named(known.readers(own))
    except _Blocked as reason:
        found.fixed[name] = f"{reason} (of the part {part!r})" if part else str(reason)
        if own in known.next:
            found.behind[name] = named(known.next[own])
            units = known.units_of(own)
            if units is not None:
                found.units[name] = units


class _Known:
    """What the graph says of the layers' channels. Depthwise layers pass theirs on.

    Args:
        channels: of the network.
    """

    def __init__(self, channels: Channels) -> None:
        self.alias = channels.through_depthwise()
        fixed = channels.bound() | channels.frozen
        self.frozen = {int(self.alias[c]): why for c, why in reversed(fixed.items())}
        self.units = {
            int(self.alias[c]): number for number, unit in enumerate(channels.units) for c in unit
        }
        self.made: dict[str, IntArray] = {}
        self.read: dict[str, IntArray] = {}
        self.passing: set[str] = set()
        self.makers: dict[int, set[str]] = defaultdict(set)
        self.called = {str(n.target) for n in channels.traced.graph.nodes if n.op == "call_module"}
        names = Counter(str(node.target) for node in channels.layers)
        self.often = {name for name, calls in names.items() if calls > 1}
        for node, layer in channels.layers.items():
            name = str(node.target)
            if is_depthwise(layer.support):
                self.passing.add(name)
                continue
            self.made[name] = self._of(channels, node)
            self.read[name] = self._of(channels, channels.reader(node))
            for number in self.made[name]:
                self.makers[int(number)].add(name)
        shown = [
            n for n in channels.traced.graph.nodes if n.op == "output" or n.target is OrderedDict
        ]
        self.shown = {
            int(c)
            for n in shown
            for operand in n.all_input_nodes
            if operand in channels.wires
            for c in self._of(channels, operand)
        }
        self.depth, self.before = _depths(channels.traced.graph, set(channels.layers))
        self.next = self._behind()

    def _of(self, channels: Channels, node: fx.Node) -> IntArray:
        result: IntArray = self.alias[channels.of(node)]
        return result

    def readers(self, name: str) -> tuple[Reader, ...]:
        """Lists the layers that read a layer's output.

        Raises:
            _Blocked: its width is needed elsewhere.
        """
        if name in self.passing:
            raise _Blocked("it is depthwise: its channels are those of its input")
        if name not in self.made:
            seen = name in self.called
            raise _Blocked("its channels cannot be followed" if seen else "it is called 0 times")
        made = self.made[name]
        partners = sorted({other for c in made for other in self.makers[int(c)]} - {name})
        if partners:
            raise _Blocked(f"its output is part of a residual sum, with that of {partners[0]!r}")
        if len(np.unique(made)) < len(made):
            raise _Blocked("its output is part of a residual sum with itself")
        reason = next((self.frozen[int(c)] for c in made if int(c) in self.frozen), None)
        if reason is not None:
            raise _Blocked(reason)
        found = []
        for reader, read in self.read.items():
            if not np.isin(read, made).any():
                continue
            repeat = len(read) // len(made)
            if not np.array_equal(read, np.repeat(made, repeat)):
                raise _Blocked(f"its output is part of a concatenation that {reader!r} reads")
            found.append(Reader(reader, repeat))
        if not found:
            raise _Blocked("no layer reads its output")
        return tuple(found)

    def units_of(self, name: str) -> tuple[int, ...] | None:
        """Returns the group that each filter of a layer is normalised in; None if some are not."""
        units = tuple(self.units.get(int(number), -1) for number in self.made[name])
        return None if -1 in units else units

    def _behind(self) -> dict[str, tuple[Reader, ...]]:
        """Lists for each layer those that read its channels next, on the longest way.

        A channel that the network's output shows is nobody's to drop.
        """
        found: dict[str, list[Reader]] = defaultdict(list)
        for reader, read in self.read.items():
            before = self.before[reader]
            inputs: dict[str, IntArray] = {}
            for number in set(np.unique(read).tolist()) - self.shown:
                ahead = [m for m in self.makers[number] if m in before and m not in self.often]
                deepest = max((self.depth[maker] for maker in ahead), default=0)
                for maker in ahead:
                    if self.depth[maker] < deepest:
                        continue
                    mine = np.flatnonzero(self.made[maker] == number)
                    if len(mine) == 1:  # and not in a sum with others of its own
                        places = inputs.setdefault(maker, np.full(len(read), -1))
                        places[read == number] = mine[0]
            for maker, places in inputs.items():
                repeat = len(read) // len(self.made[maker])
                whole = repeat and np.array_equal(
                    places, np.repeat(np.arange(len(self.made[maker])), repeat)
                )
                found[maker].append(
                    Reader(reader, repeat)
                    if whole
                    else Reader(reader, 1, tuple(int(place) for place in places))
                )
        return {name: tuple(readers) for name, readers in found.items()}


def _depths(graph: fx.Graph, layers: set[fx.Node]) -> tuple[dict[str, int], dict[str, set[str]]]:
    """Counts the layers on the longest way to each layer, and names all that are before it.

    What makes a gate is on no way: it says how much of a channel passes, not what is in it.
    """
    depth: dict[fx.Node, int] = {}
    before: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        operands = _without_gates(node)
        deepest = max((depth[n] for n in operands), default=0)
        names = frozenset().union(*(before[n] for n in operands))
        depth[node] = deepest + (node in layers)
        before[node] = names | {str(node.target)} if node in layers else names
    return (
        {str(node.target): depth[node] for node in layers},
        {str(node.target): set(before[node]) - {str(node.target)} for node in layers},
    )


def _without_gates(node: fx.Node) -> list[fx.Node]:
    """Lists what a node reads, without factors of one pixel where another one is an image."""
    operands = node.all_input_nodes
    if name_of(node) != "mul":
        return operands
    shapes = {n: tuple(n.meta.get("shape") or ()) for n in operands}
    images = [n for n, shape in shapes.items() if shape[2:] not in ((), (1, 1))]
    return images or operands
