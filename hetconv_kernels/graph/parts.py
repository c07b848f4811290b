# SPDX-License-Identifier: Apache-2.0
"""parts: the largest parts of a network that can be traced, where the whole cannot.

A detector cannot be traced: its code loops over boxes. Its backbone can, and so can the towers of
its heads. Such a part is called as a function, so its inner widths are its own affair; what goes in
and out of it keeps its channels.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import HetconvError, TraceError
from .convert import _shared_parameters
from .hooks import LayerCall, calls_of, copy_of, hooked
from .trace import trace

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class TracedPart:
    """A part of a network that was traced by itself.

    Attributes:
        name: of the module; "" is the whole network.
        module: the part.
        graph: what `trace` gave for its first call.
        calls: the arguments of each call.
        elsewhere: why layers of the part cannot be replaced, by their names in it: something
            outside of the part uses them too.
    """

    name: str
    module: nn.Module
    graph: fx.GraphModule
    calls: tuple[Arguments, ...]
    elsewhere: Mapping[str, str]


@dataclass(frozen=True)
class TracedParts:
    """What of a network can be traced.

    Attributes:
        parts: the largest that can; the whole network alone where it can.
        untraced: why others cannot, by their names.
    """

    parts: tuple[TracedPart, ...]
    untraced: Mapping[str, str]

    @property
    def whole(self) -> TracedPart | None:
        """The network itself, if it could be traced."""
        return next((part for part in self.parts if not part.name), None)

    def part_of(self, layer: str) -> TracedPart | None:
        """Returns the part that a layer is in."""
        names = {part.name: part for part in self.parts}
        return next((names[above] for above in _above(layer) if above in names), None)

    def why_not(self, layer: str) -> str:
        """Says why a layer is in no part: the reason of the smallest module around it."""
        near = next((a for a in _above(layer) if a in self.untraced), "")
        return f"{near or 'the network'!r} cannot be traced ({self.untraced[near]})"


def _above(name: str) -> Iterator[str]:
    """Lists a module and those that it is in, from the inside."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


@torch.no_grad()
def traced_parts(model: nn.Module, inputs: Arguments) -> TracedParts:
    """Finds the largest parts of a network that can be traced.

    The whole network, where it can be. Otherwise each child that it calls is tried on what it is
    called with, and so on down; layers by themselves are no parts. A part may be called several
    times, as the tower of a detector's head is for each of the feature maps.

    Args:
        model: the network, in evaluation mode; hooks apart, it is not changed.
        inputs: the arguments of its forward.
    """
    walk = _Walk(model)
    walk.visit("", model, [LayerCall(inputs, {})])
    if walk.untraced:
        walk.look_around(inputs)
    return TracedParts(tuple(walk.parts), walk.untraced)


@dataclass
class _Walk:
    root: nn.Module
    parts: list[TracedPart] = field(default_factory=list)
    untraced: dict[str, str] = field(default_factory=dict)

    def visit(self, name: str, module: nn.Module, calls: list[LayerCall]) -> None:
        """Traces a module, or what it calls."""
        try:
            given = [_positional(module, call) for call in calls]
            graph = trace(module, given[0])
        except HetconvError as error:
            self.untraced[name] = str(error)
        else:
            self.parts.append(TracedPart(name, module, graph, tuple(given), {}))
            return
        below = dict(children(name, module))

        def run() -> None:
            for call in calls:
                module(*copy.deepcopy(call.arguments), **copy.deepcopy(call.keywords))

        for path, seen in calls_of(below, run).items():
            if not seen:
                self.untraced[path] = "it is not called"
            elif any(True for _ in below[path].children()):
                self.visit(path, below[path], seen)

    def look_around(self, inputs: Arguments) -> None:
        """Notes which layers of the parts are used outside of them too."""
        counts: Counter[int] = Counter()
        modules = {id(module): module for module in self.root.modules()}

        def count(key: int, call: LayerCall) -> None:
            counts[key] += 1

        with hooked(modules, count):
            self.root(*copy.deepcopy(inputs))
        shared = _shared_parameters(self.root)
        for place, part in enumerate(self.parts):
            inside = Counter(str(n.target) for n in part.graph.graph.nodes if n.op == "call_module")
            elsewhere: dict[str, str] = {}
            for name, calls in inside.items():
                layer = part.graph.get_submodule(name)
                if counts[id(layer)] != calls * counts[id(part.module)]:
                    elsewhere[name] = f"it is called outside of {part.name!r} too"
                elif any(id(p) in shared for p in layer.parameters()):
                    elsewhere[name] = "a parameter of it is shared with another module"
            self.parts[place] = TracedPart(
                part.name, part.module, part.graph, part.calls, elsewhere
            )


def children(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Lists the children of a module; in the place of a mere list of modules, what is in it."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if type(child).forward is nn.Module.forward:
            yield from children(path, child)
        else:
            yield path, child


def _positional(module: nn.Module, call: LayerCall) -> Arguments:
    """Gives a call's arguments by their places.

    Raises:
        TraceError: some have none.
    """
    bound = inspect.signature(module.forward).bind(*call.arguments, **call.keywords)
    if bound.kwargs:
        raise TraceError(f"it is called with keyword arguments ({', '.join(bound.kwargs)})")
    return bound.args


@torch.no_grad()
def same_around(before: nn.Module, after: nn.Module, names: list[str], inputs: Arguments) -> bool:
    """Tells whether two networks give the same, bit by bit, if some of their parts do.

    The outputs that the first network's parts give are put in the place of the second's. So code
    that turns small differences into large ones, such as a choice among boxes, is compared too.

    Args:
        before: a network.
        after: another one.
        names: of the parts, which both have.
        inputs: the arguments of their forward.
    """
    given: dict[str, list[Any]] = {name: [] for name in names}

    def note(name: str, call: LayerCall, output: Any) -> None:
        given[name].append(pytree.tree_map(_copy, output))

    with hooked({name: before.get_submodule(name) for name in names}, _nothing, note):
        wanted = before(*copy.deepcopy(inputs))
    turns = {name: iter(outputs) for name, outputs in given.items()}
    handles = []
    try:
        for name in names:
            turn = turns[name]
            handles.append(
                after.get_submodule(name).register_forward_hook(_instead(turn), prepend=True)
            )
        found = after(*copy.deepcopy(inputs))
    finally:
        for handle in handles:
            handle.remove()
    pairs = zip(pytree.tree_leaves(wanted), pytree.tree_leaves(found), strict=False)
    count = len(pytree.tree_leaves(wanted)) == len(pytree.tree_leaves(found))
    return count and all(torch.equal(one, two) for one, two in pairs if isinstance(one, Tensor))


def _instead(turn: Iterator[Any]) -> Callable[..., Any]:
    return lambda module, args, output: next(turn, output)


def _copy(leaf: Any) -> Any:
    return copy_of(leaf) if isinstance(leaf, Tensor) else leaf


def _nothing(name: str, call: LayerCall) -> None:
    """Is called before a part runs."""
