# SPDX-License-Identifier: Apache-2.0
"""ChannelWalk: follows the wires of a traced network's channels from node to node.

What wires and classes are: see `channels`. A node whose operation nobody knows freezes what it
reads and gives; one that only moves channels is run on their numbers.
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..masks import IntArray
from ..nn import SupportConv2d, SupportLinear
from .alias import is_after
from .convert import _shared_parameters, _what_would_be_lost
from .frozen_norm import is_frozen_norm
from .layout import adapted
from .names import (
    BINARY,
    EACH,
    MOVES,
    NORMALISATIONS,
    SIZES,
    SPATIAL,
    describe_node,
    module_of,
    name_of,
)
from .numbered import call, numbered, numbers_of
from .plain import Keep, _plain
from .take import LayerMatrix, Norm
from .wires import Wires


@dataclass(frozen=True)
class Move:
    """Where a move takes its channels from.

    Attributes:
        operands: the nodes that it reads.
        source: for each channel of the result (of each part, where it gives several) the number of
            the channel, the operands' counted through; -1 is a channel of zeros.  # int [C]
        parts: whether it gives several values.
    """

    operands: tuple[fx.Node, ...]
    source: tuple[IntArray, ...]
    parts: bool


class ChannelWalk:
    """The wires of a traced network, and what each node does with them.

    Args:
        traced: what `trace` gave.
        elsewhere: why layers cannot be replaced that are used outside of the graph too, by name.

    Attributes:
        wires: of each node whose value has channels, the wire of each.  # int [C]
        layers: the convolutions and fully connected layers, by node.
        norms: the batch normalisations, by node.
        group_norms: the group normalisations, by node.
        moves: the moves, by node.
        channelwise: the other nodes that treat every channel by itself.
        known: which wires are tied, and which are frozen.
        units: wires that can only be removed together, and the normalisation that binds them.
    """

    def __init__(
        self, traced: fx.GraphModule, elsewhere: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._elsewhere = elsewhere
        self.wires: dict[fx.Node, IntArray] = {}
        self.layers: dict[fx.Node, LayerMatrix] = {}
        self.norms: dict[fx.Node, Norm] = {}
        self.group_norms: dict[fx.Node, nn.GroupNorm] = {}
        self.moves: dict[fx.Node, Move] = {}
        self.channelwise: set[fx.Node] = set()
        self._parts: dict[fx.Node, tuple[IntArray, ...]] = {}
        # Values of other ranks that only moves made of one with channels: that one, and the moves.
        self._between: dict[fx.Node, tuple[fx.Node, tuple[fx.Node, ...]]] = {}
        self.known = Wires()
        self.units: list[tuple[IntArray, fx.Node]] = []
        self._calls = Counter(n.target for n in traced.graph.nodes if n.op == "call_module")
        self._shared = _shared_parameters(traced)
        for node in traced.graph.nodes:
            self._visit(node)

    def source(self, view: fx.Node) -> tuple[fx.Node, IntArray | None]:
        """Follows a view to the node that owns its memory.

        Returns:
            The owner, and for each channel of the view its number there; None where they are not
            channels of the owner.
        """
        if is_after(view):
            return self.source(view.args[0])  # type: ignore[arg-type]
        operand = view.meta.get("alias")
        size = np.arange(len(self.wires[view])) if view in self.wires else None
        if operand is None:
            return view, size
        owner, read = self.source(operand)
        taken: IntArray | None = None
        if view in self.moves and not self.moves[view].parts:
            taken = self.moves[view].source[0]
            taken = taken if self.moves[view].operands == (operand,) else None
        elif view in self.channelwise:
            taken = size
        elif view in self.moves:
            return owner, read  # the parts know more
        elif operand in self._parts and isinstance(view.args[1], int):
            parts = operand.args[0] if is_after(operand) else operand
            move = self.moves.get(parts)
            taken = None if move is None else move.source[view.args[1]]
        if read is None or taken is None or (taken < 0).any():
            return owner, None
        return owner, read[taken]

    def _visit(self, node: fx.Node) -> None:
        name, shape = name_of(node), node.meta.get("shape")
        if node.op in ("placeholder", "get_attr"):
            if shape is not None and len(shape) in (2, 4) and node.op == "placeholder":
                self._new(node, shape[1])
                self._freeze(node, "it is a channel of the input")
            return
        if self._shuffle(node, name):
            return
        operands = [n for n in node.all_input_nodes if n in self.wires or n in self._parts]
        owners = [self._between[n][0] for n in node.all_input_nodes if n in self._between]
        if not (operands or owners) or ("value" in node.meta and name in SIZES):
            return
        if owners:  # tokens, for example: a value of another rank, and no move reads it
            self._opaque(node, [*operands, *owners])
            return
        known = shape is not None and (
            self._after(node)
            or self._layer(node)
            or self._channelwise(node, name)
            or self._binary(node, name, operands)
            or (name in MOVES and self._move(node, name, operands))
            or self._normalised(node, name)
        )
        if not known:
            self._opaque(node, operands)

    def _after(self, node: fx.Node) -> bool:
        """Keeps the wires of a tensor that was changed in place; the change froze what it mixed."""
        if not is_after(node):
            return False
        args: Any = node.args
        tensor = args[0]
        if tensor in self._parts:
            self._parts[node] = self._parts[tensor]
        elif tensor in self.wires:
            self.wires[node] = self.wires[tensor]
        else:
            return False
        if len(args) == 3 and self.source(args[2])[1] is None:
            self._freeze(node, f"{describe_node(args[1])} changes it through a view")
        return True

    def _layer(self, node: fx.Node) -> bool:
        module = module_of(node)
        source = node.args[0] if node.args else None
        if module is None or source not in self.wires:
            return False
        assert isinstance(source, fx.Node)
        size = len(self.wires[source])
        conv = isinstance(module, nn.Conv2d | SupportConv2d)
        if conv or isinstance(module, nn.Linear | SupportLinear):
            rank = 4 if conv else 2
            layer = LayerMatrix(module) if self._is_plain(module) else None
            if layer is None or len(source.meta["shape"]) != rank or layer.channels != size:
                return False
            self.layers[node] = layer
            self._new(node, layer.filters)
        elif type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) or is_frozen_norm(module):
            if module.running_mean is None or len(module.running_mean) != size:  # type: ignore[arg-type]
                return False
            self.norms[node] = module  # type: ignore[assignment]
            self.wires[node] = self.wires[source]
        elif type(module) is nn.GroupNorm and module.num_channels == size:
            self.group_norms[node] = module
            self.wires[node] = self.wires[source]
            self.units.append((self.wires[source].reshape(module.num_groups, -1), node))
        else:
            return False
        for reason in self._fixed(node, module):
            self._freeze(node, reason)
            self._freeze(source, reason)
        return True

    @staticmethod
    def _is_plain(module: nn.Module) -> bool:
        if isinstance(module, SupportConv2d | SupportLinear):
            return module._owns_weight
        kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
        answer = _plain(module, kind)
        return answer is not None and not isinstance(answer, Keep)

    def _fixed(self, node: fx.Node, module: nn.Module) -> Iterator[str]:
        """Says why a layer cannot be replaced by a smaller one."""
        if self._calls[node.target] > 1:
            yield f"{node.target} is called {self._calls[node.target]} times"
        if str(node.target) in self._elsewhere:
            yield f"{node.target} stays as it is: {self._elsewhere[str(node.target)]}"
        for reason in _what_would_be_lost(module, self._shared):
            yield f"{node.target} stays as it is: {reason}"

    def _channelwise(self, node: fx.Node, name: str) -> bool:
        sources = [n for n in node.all_input_nodes if n in self.wires]
        if name in ("pad", "constant_pad_nd") and len(_pads(node)) <= 4:
            name = "avg_pool2d"  # works on every channel by itself, like a pooling
        if name not in EACH | SPATIAL or len(sources) != 1 or len(node.all_input_nodes) != 1:
            return False
        shape = node.meta["shape"]
        wires = self.wires[sources[0]]
        if len(shape) not in (2, 4) or shape[1] != len(wires):
            return False
        if name == "mean" and not self._keeps_channels(node, sources[0]):
            return False
        self.wires[node] = wires
        self.channelwise.add(node)
        return True

    def _keeps_channels(self, node: fx.Node, source: fx.Node) -> bool:
        numbers = numbered(np.arange(len(self.wires[source])), source.meta["shape"]).float()
        result = call(node, {source: numbers})
        return torch.equal(result, numbered(np.arange(result.shape[1]), result.shape).float())

    def _binary(self, node: fx.Node, name: str, operands: list[fx.Node]) -> bool:
        tensors = [n for n in node.all_input_nodes if "shape" in n.meta]
        shape = node.meta["shape"]
        if name not in BINARY or tensors != operands or any(n in self._parts for n in operands):
            return False
        sizes = {len(self.wires[n]) for n in operands}
        if len(shape) not in (2, 4) or sizes != {shape[1]}:
            return False
        if any(len(n.meta["shape"]) != len(shape) for n in operands):
            return False
        first = self.wires[operands[0]]
        for other in operands[1:]:
            self.known.tie(first, self.wires[other])
        self.wires[node] = first
        self.channelwise.add(node)
        return True

    def _normalised(self, node: fx.Node, name: str) -> bool:
        """Follows channels through normalisations that nothing can be taken out of."""
        source = node.args[0] if node.args else None
        if name not in NORMALISATIONS or source not in self.wires:
            return False
        assert isinstance(source, fx.Node)
        if node.meta["shape"] != source.meta["shape"]:
            return False
        self.wires[node] = self.wires[source]
        self._freeze(node, f"{describe_node(node)} may mix its channels")
        return True

    # Moves ------------------------------------------------------------------------------------

    def _shuffle(self, node: fx.Node, name: str) -> bool:
        """Follows channels through values of five dimensions, as a channel shuffle makes."""
        shape, source = node.meta.get("shape"), node.args[0] if node.args else None
        if name not in MOVES | {"contiguous"} or not isinstance(source, fx.Node):
            return False
        begin = self._between.get(source, (source, ()) if source in self.wires else None)
        if begin is None or not isinstance(shape, tuple | torch.Size) or not shape:
            return False
        if isinstance(shape[0], tuple) or (len(shape) in (2, 4) and source in self.wires):
            return False
        owner, moves = begin[0], (*begin[1], node)
        if len(shape) not in (2, 4):
            self._between[node] = owner, moves
            return True
        numbers = numbered(np.arange(len(self.wires[owner])), owner.meta["shape"])
        for move in moves:
            numbers = call(move, {operand_of(move): numbers})
        found = numbers_of(numbers)
        if found is None:
            self._opaque(node, [owner])
            return True
        self.wires[node] = self._carry(self.wires[owner], found)
        for fixed in (owner, node):
            self._freeze(fixed, f"{describe_node(moves[0])} counts channels")
        return True

    def _move(self, node: fx.Node, name: str, operands: list[fx.Node]) -> bool:
        if any(n in self._parts for n in operands):
            if node.target is not operator.getitem or not isinstance(node.args[1], int):
                return False
            self.wires[node] = self._parts[operands[0]][node.args[1]]
            return True
        if any("shape" in n.meta and n not in self.wires for n in node.all_input_nodes):
            return False
        if name in ("pad", "constant_pad_nd") and not _pads_with_zeros(node):
            return False
        numbers, first = {}, 1
        for operand in operands:
            size = len(self.wires[operand])
            numbers[operand] = numbered(np.arange(first, first + size), operand.meta["shape"])
            first += size
        result = call(node, numbers)
        several = isinstance(result, tuple | list)
        sources = [numbers_of(part) for part in (result if several else (result,))]
        if any(source is None for source in sources):
            return False
        move = Move(tuple(operands), tuple(s - 1 for s in sources if s is not None), several)
        read = np.concatenate([self.wires[n] for n in operands])
        found = tuple(self._carry(read, source) for source in move.source)
        self.moves[node] = move
        if several:
            self._parts[node] = found
        else:
            self.wires[node] = found[0]
        sizes = [np.arange(len(self.wires[n])) for n in operands]
        if adapted(node, move, sizes, None if several else np.arange(len(found[0]))) is None:
            self.known.freeze(np.concatenate(found), f"{describe_node(node)} counts channels")
            for operand in operands:
                self._freeze(operand, f"{describe_node(node)} counts channels")
        return True

    def _carry(self, wires: IntArray, source: IntArray) -> IntArray:
        """Follows a move; channels of zeros get wires of their own."""
        zeros = source < 0
        carried = wires[np.where(zeros, 0, source)]
        carried[zeros] = self.known.new(int(zeros.sum()))
        return carried

    def _opaque(self, node: fx.Node, operands: list[fx.Node]) -> None:
        """Freezes what an operation reads and gives when nothing is known about it."""
        reason = (
            "it is a channel of the output"
            if node.op == "output" or node.target is OrderedDict
            else f"{describe_node(node)} may mix its channels"
        )
        for operand in operands:
            self._freeze(operand, reason)
        shape = node.meta.get("shape")
        if node.op == "output" or shape is None:
            return
        if shape and isinstance(shape[0], tuple):
            sizes = [s[1] if len(s) in (2, 4) else 0 for s in shape]
            self._parts[node] = tuple(self.known.new(size) for size in sizes)
            self.known.freeze(np.concatenate(self._parts[node]), reason)
        elif len(shape) in (2, 4):
            self._new(node, shape[1])
            self._freeze(node, reason)

    # Wires ------------------------------------------------------------------------------------

    def _new(self, node: fx.Node, count: int) -> None:
        self.wires[node] = self.known.new(count)

    def _freeze(self, node: fx.Node, reason: str) -> None:
        for wires in self._parts.get(node, (self.wires.get(node),)):
            self.known.freeze(wires, reason)


def operand_of(node: fx.Node) -> fx.Node:
    """Returns the node that a layer, a normalisation or a move reads first."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _pads(node: fx.Node) -> tuple[int, ...]:
    module = module_of(node)
    if module is not None:
        return tuple(module.padding)  # type: ignore[arg-type]
    return tuple(node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ()))  # type: ignore


def _pads_with_zeros(node: fx.Node) -> bool:
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    if name_of(node) == "constant_pad_nd":
        given = {"value": node.args[2] if len(node.args) > 2 else 0}
    return given.get("mode", "constant") == "constant" and given.get("value") in (None, 0)
