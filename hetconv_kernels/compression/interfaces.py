# SPDX-License-Identifier: Apache-2.0
"""Interfaces: which layers read the output of a layer, and so what goes with one of its filters.

Removing filter i of a layer is exact when every layer that reads channel i is known and drops it
too, and nothing mixes the channels in between. Where that does not hold (a residual sum, a
concatenation, the output of the network) the layer keeps its width, and a sentence says why.

Behind a residual sum a filter can still die, together with what the *next* layer reads of it: the
sum keeps its width, since the other summand and later layers need it, and both layers have dead
rows and columns.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, fx, nn

from ..graph.channels import Channels, is_depthwise
from ..graph.trace import trace
from ..masks import IntArray


@dataclass(frozen=True)
class Reader:
    """A layer that reads another one's output.

    Attributes:
        name: of the layer.
        repeat: its inputs for each channel: 1, or H·W after a flatten.
    """

    name: str
    repeat: int


@dataclass(frozen=True)
class Interfaces:
    """What is known of a network's widths.

    Attributes:
        readers: for each layer whose filters can be removed, all layers that read them.
        fixed: for each other layer, why its width stays.
        summed: for layers among the fixed ones whose output goes into a residual sum, those that
            read the sum next. Of the summands a reader is behind the deepest, the main path; one
            that no reader is behind, such as a down-sampling, is not here.
    """

    readers: dict[str, tuple[Reader, ...]]
    fixed: dict[str, str]
    summed: dict[str, tuple[Reader, ...]] = field(default_factory=dict)


class _Blocked(Exception):
    """The width of a layer is needed elsewhere; the text says where."""


def find_interfaces(
    model: nn.Module, layers: dict[str, nn.Conv2d | nn.Linear], example: Tensor
) -> Interfaces:
    """Finds the layers that read each layer, from the classes of channels that hang together.

    Args:
        model: the network; one that cannot be traced keeps all its widths.
        layers: the layers to look at.
        example: an input, for the shapes.
    """
    training = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in training:
            module.training = False
        known = _Known(Channels(trace(model, example)))
    except Exception as error:  # noqa: BLE001  # user code may raise anything while it is traced
        reason = f"the network cannot be traced ({(str(error).splitlines() or [''])[0]})"
        return Interfaces({}, dict.fromkeys(layers, reason))
    finally:
        for module, flag in training:
            module.training = flag
    readers: dict[str, tuple[Reader, ...]] = {}
    fixed: dict[str, str] = {}
    summed: dict[str, tuple[Reader, ...]] = {}
    for name in layers:
        try:
            readers[name] = known.readers(name)
        except _Blocked as reason:
            fixed[name] = str(reason)
            behind = known.summed(name)
            if behind:
                summed[name] = behind
    return Interfaces(readers, fixed, summed)


class _Known:
    """What the graph says of the layers' channels. Depthwise layers pass theirs on.

    Args:
        channels: of the network.
    """

    def __init__(self, channels: Channels) -> None:
        self.alias = channels.through_depthwise()
        self.frozen = {int(self.alias[c]): why for c, why in reversed(channels.frozen.items())}
        self.made: dict[str, IntArray] = {}
        self.read: dict[str, IntArray] = {}
        self.passing: set[str] = set()
        self.makers: dict[int, set[str]] = defaultdict(set)
        self.called = {str(n.target) for n in channels.traced.graph.nodes if n.op == "call_module"}
        for node, layer in channels.layers.items():
            name = str(node.target)
            if is_depthwise(layer.support):
                self.passing.add(name)
                continue
            self.made[name] = self._of(channels, node)
            self.read[name] = self._of(channels, channels.reader(node))
            for number in self.made[name]:
                self.makers[int(number)].add(name)
        given = [n for n in channels.traced.graph.nodes if n.op == "placeholder"]
        self.given = {int(c) for n in given if n in channels.wires for c in self._of(channels, n)}
        self.depth, self.before = _depths(channels.traced.graph, set(channels.layers))

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

    def summed(self, name: str) -> tuple[Reader, ...]:
        """Lists the layers that read a residual sum next behind a layer that feeds it."""
        made = self.made.get(name)
        if made is None or not any(
            len(self.makers[int(c)]) > 1 or int(c) in self.given for c in made
        ):
            return ()
        found = []
        for reader, read in self.read.items():
            repeat = len(read) // len(made)
            if not repeat or not np.array_equal(read, np.repeat(made, repeat)):
                continue
            makers = {maker for c in read for maker in self.makers[int(c)]}
            ahead = [maker for maker in makers if maker in self.before[reader]]
            if name in ahead and self.depth[name] == max(self.depth[maker] for maker in ahead):
                found.append(Reader(reader, repeat))
        return tuple(found)


def _depths(graph: fx.Graph, layers: set[fx.Node]) -> tuple[dict[str, int], dict[str, set[str]]]:
    """Counts the layers on the longest way to each layer, and names all that are before it."""
    depth: dict[fx.Node, int] = {}
    before: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        operands = node.all_input_nodes
        deepest = max((depth[n] for n in operands), default=0)
        names = frozenset().union(*(before[n] for n in operands))
        depth[node] = deepest + (node in layers)
        before[node] = names | {str(node.target)} if node in layers else names
    return (
        {str(node.target): depth[node] for node in layers},
        {str(node.target): set(before[node]) - {str(node.target)} for node in layers},
    )
