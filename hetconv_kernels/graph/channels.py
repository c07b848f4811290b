# SPDX-License-Identifier: Apache-2.0
"""Channels: which channels of a traced network hang together, and who reads them.

Every channel of every value carries a *wire*. A convolution makes new wires, one for each filter;
normalisation, activation and pooling pass theirs on; a sum ties the wires of its operands, pair by
pair; concatenation, flattening, slices and paddings put wires elsewhere (they are run on the
numbers of the channels, so a flattened channel is H·W features with one wire). Wires that are tied
are one *class*: such channels can only be removed, or moved, together.

Example: ``y = conv2(relu(conv1(x))) + x`` on two channels. x carries wires 0, 1; conv1 makes 2, 3;
conv2 makes 4, 5; the sum ties 4 to 0 and 5 to 1. The classes are {0, 4}, {1, 5}, {2} and {3}, and
the input freezes the first two: only the filters of conv1 can go.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from torch import fx

from ..masks import IntArray
from ..support import Support
from .channel_walk import ChannelWalk, operand_of
from .names import describe_node


class Channels:
    """The channels of a traced network.

    Args:
        traced: what `trace` gave.
        elsewhere: why layers cannot be replaced that are used outside of the graph too, by name.

    Attributes:
        wires, layers, norms, group_norms, moves, channelwise: those of its `ChannelWalk`.
        frozen: the classes that cannot be removed or moved, and why.
        units: classes that can only be removed together, and not moved: the groups of a group
            normalisation.
    """

    def __init__(
        self, traced: fx.GraphModule, elsewhere: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.traced = traced
        self._walk = walk = ChannelWalk(traced, elsewhere)
        self.wires, self.moves, self.channelwise = walk.wires, walk.moves, walk.channelwise
        self.layers, self.norms, self.group_norms = walk.layers, walk.norms, walk.group_norms
        self.classes, self.count = walk.known.classes()
        self.frozen = walk.known.reasons(self.classes)
        self.units = tuple(row for wires, _ in walk.units for row in self.classes[wires])

    def of(self, node: fx.Node) -> IntArray:
        """Returns the class of each channel of a node's value.  # int [C]"""
        return self.classes[self.wires[node]]

    def reader(self, node: fx.Node) -> fx.Node:
        """Returns the node whose channels a layer or normalisation reads."""
        return operand_of(node)

    def bound(self) -> dict[int, str]:
        """Says of each class that is in a unit which normalisation binds it."""
        return {
            int(number): f"{describe_node(node)} normalises groups of channels, which go together"
            for wires, node in self._walk.units
            for number in self.classes[wires].flatten()
        }

    def members(self) -> dict[int, list[tuple[str, int]]]:
        """Lists for each class the channels in it, as (name of the layer, filter)."""
        found: dict[int, list[tuple[str, int]]] = {}
        for node in self.layers:
            for place, number in enumerate(self.of(node)):
                found.setdefault(int(number), []).append((describe_node(node), place))
        return found

    def through_depthwise(self) -> IntArray:
        """Renumbers the classes so that a depthwise layer's channel and its filter have one number.

        # int [classes]: the number that stands for each class
        """
        alias = np.arange(self.count)

        def find(number: int) -> int:
            while alias[number] != number:
                number = int(alias[number])
            return number

        for node, layer in self.layers.items():
            if is_depthwise(layer.support):
                pairs = zip(self.of(self.reader(node)), self.of(node), strict=True)
                for channel, filter_ in pairs:
                    alias[find(int(filter_))] = find(int(channel))
        return np.array([find(number) for number in range(self.count)])

    def source(self, view: fx.Node) -> tuple[fx.Node, IntArray | None]:
        """Follows a view to the node that owns its memory, see `ChannelWalk.source`."""
        return self._walk.source(view)


def is_depthwise(support: Support) -> bool:
    """Whether filter i reads channel i alone, for several of them."""
    return support.uniform_groups == support.channels == support.filters > 1
