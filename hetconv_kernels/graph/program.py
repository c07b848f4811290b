# SPDX-License-Identifier: Apache-2.0
"""Programs: a recorded network as native steps on planned memory, run by one call.

While a network is recorded, a `Tape` of the engine notes what each step of the graph called: the
same call, without its addresses, is the step of the program. So a program computes what the layers
do one by one, bit for bit. Sums, activations, max-pooling, concatenation and upsampling to the
nearest pixel have native steps of their own, views need none, and everything else is called as the
graph says, on tensors over the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..arena import Arena, Lifetime, assign_offsets, fresh
from .seen import Spec


class Frame(Arena):
    """The arena of one running program, and the values that lie in it.

    Attributes:
        values: by number of the graph's step; what is computed in a call is None here.
        address: of the first byte.
    """

    def __init__(
        self, lifetimes: Sequence[Lifetime], views: Sequence[View], steps: int, workers: int = 1
    ) -> None:
        super().__init__(lifetimes, workers)
        self.address = self.memory.data_ptr() + self.first
        self.values: list[Any] = [None] * steps
        with torch.inference_mode(False):
            for view in views:
                leaves = [self._at(spec, life) for spec, life in view.leaves]
                self.values[view.number] = pytree.tree_unflatten(leaves, view.structure)

    def _at(self, spec: Spec, life: int) -> Tensor:
        start = self.first + self.places[life] + spec.offset
        size = spec.dtype.itemsize
        flat = self.memory[start : start + spec.extent * size].view(spec.dtype)
        return flat.as_strided(spec.shape, spec.stride)

    def holds(self, value: Tensor) -> bool:
        """Tells whether a tensor lies here."""
        return value.untyped_storage()._cdata == self.memory.untyped_storage()._cdata


class View(NamedTuple):
    """A value that lies in the arena: its tensors, each with the number of its lifetime."""

    number: int
    leaves: tuple[tuple[Spec, int], ...]
    structure: Any


class Native(NamedTuple):
    """Native steps that follow one another.

    Attributes:
        program: runs them.
        outside: steps of the graph whose values it reads or writes beside the arena.
        checked: those of them that were called and may have given something else, and what it was.
        fresh: results that are the caller's: number of the step, shape, dtype, format.
        first: number of the graph's step that it begins with.
        done: steps whose values nothing reads after it.
        numbers: for each native step, which of the graph's steps it is.
    """

    program: Any
    outside: tuple[int, ...]
    checked: tuple[tuple[int, Spec], ...]
    fresh: tuple[tuple[int, tuple[int, ...], torch.dtype, torch.memory_format], ...]
    first: int
    done: tuple[int, ...]
    numbers: tuple[int, ...]


class _Parts:
    """A native program that takes the parts of a batch, each by one thread."""

    def __init__(self, part: Any, strides: tuple[int, ...], parts: int, workers: int) -> None:
        self._part, self._strides, self._parts, self._workers = part, strides, parts, workers
        self.kinds = part.kinds

    def run(self, addresses: list[int]) -> None:
        self._part.run_parts(addresses, self._strides, self._parts, self._workers)


class Called(NamedTuple):
    """A step that is called as the graph says."""

    number: int
    call: Callable[[list[Any]], Any]
    done: tuple[int, ...]


class Program:
    """A network on inputs of one signature.

    Attributes:
        lifetimes: of what lies in the arena, or is returned.
    """

    def __init__(
        self,
        lifetimes: list[Lifetime],
        views: list[View],
        pieces: list[Any],
        network: fx.GraphModule,
        guard: Any,
    ) -> None:
        nodes = list(network.graph.nodes)
        self.lifetimes = lifetimes
        self._views, self._pieces, self._guard, self._steps = views, pieces, guard, len(nodes)
        self._workers = 1
        self._inputs = [i for i, n in enumerate(nodes) if n.op == "placeholder"]
        index = {node: i for i, node in enumerate(nodes)}
        (output,) = (n for n in nodes if n.op == "output")
        self._output = resolver(output.args[0], index)
        self._hand = [
            None if n.op in ("placeholder", "output") else caller(network, n, index) for n in nodes
        ]

    @property
    def kinds(self) -> list[str]:
        """Names the native steps, and what is called, in order."""
        found: list[str] = []
        for piece in self._pieces:
            found += piece.program.kinds if isinstance(piece, Native) else ["call"]
        return found

    def frame(self) -> Frame:
        """Makes the memory of a call."""
        return Frame(self.lifetimes, self._views, self._steps, self._workers)

    @property
    def arena_bytes(self) -> int:
        """The bytes of activations at their places."""
        return assign_offsets(self.lifetimes)[1]

    @property
    def native(self) -> Native | None:
        """The native steps where there is nothing else; None where there is."""
        (piece, *others) = self._pieces
        return piece if isinstance(piece, Native) and not others else None

    def in_parts(self, parts: int, strides: Sequence[int], workers: int) -> Program:
        """Returns the program of a batch, of which this one is for one part.

        Args:
            parts: how many there are.
            strides: of what lies outside the arena: bytes from one part to the next.
            workers: threads.
        """
        native = self.native
        assert native is not None
        results = tuple(
            (number, (parts * shape[0], *shape[1:]), dtype, layout)
            for number, shape, dtype, layout in native.fresh
        )
        program = _Parts(native.program, (self.arena_bytes, *strides), parts, workers)
        whole = copy(self)
        whole._workers = workers
        whole._pieces = [native._replace(program=program, fresh=results)]
        return whole

    def holds(self) -> bool:
        """Tells whether layers and weights are those that were recorded."""
        return bool(self._guard.holds())

    def run(self, args: tuple[Any, ...], frame: Frame) -> Any:
        """Runs the network in a frame."""
        values = frame.values.copy()
        for index, value in zip(self._inputs, args, strict=True):
            values[index] = value
        for piece in self._pieces:
            if type(piece) is Called:
                values[piece.number] = piece.call(values)
            else:
                for index, spec in piece.checked:
                    if not spec.fits(values[index]):
                        return self._by_hand(piece.first, values, frame)
                for index, shape, dtype, layout in piece.fresh:
                    values[index] = fresh(shape, dtype, layout)
                addresses = [frame.address]
                for index in piece.outside:
                    addresses.append(values[index].data_ptr())
                piece.program.run(addresses)
            for index in piece.done:
                values[index] = None
        frame.fill()
        return self._output(values)

    def _by_hand(self, first: int, values: list[Any], frame: Frame) -> Any:
        """Goes on from a step without native ones: a value is not what was recorded."""
        frame.fits = False
        for index in range(first, self._steps):
            call = self._hand[index]
            if call is not None:
                values[index] = call(values)
        result = self._output(values)

        def own(leaf: Any) -> Any:
            return leaf.clone() if isinstance(leaf, Tensor) and frame.holds(leaf) else leaf

        return pytree.tree_map(own, result)


# Calling ----------------------------------------------------------------------------------------


def resolver(argument: Any, index: dict[fx.Node, int]) -> Callable[[list[Any]], Any]:
    """Returns what gives an argument of a graph with the values of a call, in plain containers."""
    if isinstance(argument, fx.Node):
        number = index[argument]
        return lambda values: values[number]
    if isinstance(argument, slice):
        parts = [resolver(a, index) for a in (argument.start, argument.stop, argument.step)]
        return lambda values: slice(*(part(values) for part in parts))
    if isinstance(argument, dict):
        kind = dict if type(argument).__name__ == "immutable_dict" else type(argument)
        pairs = [(key, resolver(value, index)) for key, value in argument.items()]
        return lambda values: kind((key, part(values)) for key, part in pairs)
    if isinstance(argument, list | tuple):
        parts = [resolver(a, index) for a in argument]
        if hasattr(argument, "_fields"):
            made: Any = type(argument)
            return lambda values: made(*(part(values) for part in parts))
        if isinstance(argument, tuple):
            return lambda values: tuple([part(values) for part in parts])
        return lambda values: [part(values) for part in parts]
    return lambda values: argument


def caller(
    network: fx.GraphModule, node: fx.Node, index: dict[fx.Node, int]
) -> Callable[[list[Any]], Any]:
    """Returns what runs a step as the graph says."""
    args, kwargs = resolver(tuple(node.args), index), resolver(dict(node.kwargs), index)
    target: Any = node.target
    if node.op == "call_function":
        return lambda values: target(*args(values), **kwargs(values))
    if node.op == "call_method":

        def call(values: list[Any]) -> Any:
            own, *others = args(values)
            return getattr(own, target)(*others, **kwargs(values))

        return call
    if node.op == "call_module":
        module = network.get_submodule(target)
        return lambda values: module(*args(values), **kwargs(values))
    path = target.split(".")

    def fetch(values: list[Any]) -> Any:
        found: Any = network
        for name in path:
            found = getattr(found, name)
        return found

    return fetch
