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
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..arena import Arena, Lifetime
from .names import module_of, name_of
from .native_steps import Operand, Spec, native_step

try:
    from .. import _cpu
except ImportError:  # nothing is compiled here
    _cpu = None  # type: ignore[assignment]

_CPU = torch.device("cpu")
# What gives a view wherever the strides allow, whatever the values are.
_VIEWS = frozenset(
    ("flatten", "view", "reshape", "getitem", "slice", "select", "narrow", "squeeze", "unsqueeze",
     "permute", "transpose", "chunk", "split", "split_with_sizes", "contiguous", "detach",
     "unflatten", "expand")
)  # fmt: skip
# Numbers that follow from the shapes of the inputs.
_OF_SIZES = frozenset(("getattr", "size", "dim", "sym_size", "len", "getitem", "floordiv", "mul",
                       "add", "sub"))  # fmt: skip


class Seen(NamedTuple):
    """One step of the graph as it was recorded.

    Attributes:
        node: the step.
        specs: of the tensors in its value, None for other leaves, as `pytree` lists them.
        structure: of the value, for `pytree`.
        made: the number of the storage that it made, -1 if none.
        calls: of the engine: steps, and the operands of each, None where one is not known.
    """

    node: fx.Node
    specs: tuple[Spec | None, ...]
    structure: Any
    made: int
    calls: tuple[tuple[Any, tuple[Operand | None, ...]], ...]

    @property
    def spec(self) -> Spec | None:
        """The tensor that is its value; None where that is something else."""
        return self.specs[0] if self.structure.is_leaf() else None


class Frame(Arena):
    """The arena of one running program, and the values that lie in it.

    Attributes:
        values: by number of the graph's step; what is computed in a call is None here.
        address: of the first byte.
    """

    def __init__(self, lifetimes: Sequence[Lifetime], views: Sequence[_View], steps: int) -> None:
        super().__init__(lifetimes)
        self.address = self.memory.data_ptr() + self.first
        self.values: list[Any] = [None] * steps
        with torch.inference_mode(False):
            for view in views:
                leaves = [self._at(spec, life) for spec, life in view.leaves]
                self.values[view.index] = pytree.tree_unflatten(leaves, view.structure)

    def _at(self, spec: Spec, life: int) -> Tensor:
        start = self.first + self.places[life] + spec.offset
        size = spec.dtype.itemsize
        flat = self.memory[start : start + spec.extent * size].view(spec.dtype)
        return flat.as_strided(spec.shape, spec.stride)

    def holds(self, value: Tensor) -> bool:
        """Tells whether a tensor lies here."""
        return value.untyped_storage()._cdata == self.memory.untyped_storage()._cdata


class _View(NamedTuple):
    """A value that lies in the arena: its tensors, each with the number of its lifetime."""

    index: int
    leaves: tuple[tuple[Spec, int], ...]
    structure: Any


class _Native(NamedTuple):
    """Native steps that follow one another.

    Attributes:
        program: runs them.
        outside: steps of the graph whose values it reads or writes beside the arena.
        checked: those of them that were called and may have given something else, and what it was.
        fresh: results that are the caller's: number of the step, shape, dtype, format.
        first: number of the graph's step that it begins with.
        done: steps whose values nothing reads after it.
    """

    program: Any
    outside: tuple[int, ...]
    checked: tuple[tuple[int, Spec], ...]
    fresh: tuple[tuple[int, tuple[int, ...], torch.dtype, torch.memory_format], ...]
    first: int
    done: tuple[int, ...]


class _Called(NamedTuple):
    """A step that is called as the graph says."""

    index: int
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
        views: list[_View],
        pieces: list[Any],
        network: fx.GraphModule,
        guard: Any,
    ) -> None:
        nodes = list(network.graph.nodes)
        self.lifetimes = lifetimes
        self._views, self._pieces, self._guard, self._steps = views, pieces, guard, len(nodes)
        self._inputs = [i for i, n in enumerate(nodes) if n.op == "placeholder"]
        index = {node: i for i, node in enumerate(nodes)}
        (output,) = (n for n in nodes if n.op == "output")
        self._output = _resolver(output.args[0], index)
        self._hand = [
            None if n.op in ("placeholder", "output") else _caller(network, n, index) for n in nodes
        ]

    @property
    def kinds(self) -> list[str]:
        """Names the native steps, and what is called, in order."""
        found: list[str] = []
        for piece in self._pieces:
            found += piece.program.kinds if isinstance(piece, _Native) else ["call"]
        return found

    def frame(self) -> Frame:
        """Makes the memory of a call."""
        return Frame(self.lifetimes, self._views, self._steps)

    def holds(self) -> bool:
        """Tells whether layers and weights are those that were recorded."""
        return bool(self._guard.holds())

    def run(self, args: tuple[Any, ...], frame: Frame) -> Any:
        """Runs the network in a frame."""
        values = frame.values.copy()
        for index, value in zip(self._inputs, args, strict=True):
            values[index] = value
        for piece in self._pieces:
            if type(piece) is _Called:
                values[piece.index] = piece.call(values)
            else:
                for index, spec in piece.checked:
                    if not spec.fits(values[index]):
                        return self._by_hand(piece.first, values, frame)
                for index, shape, dtype, layout in piece.fresh:
                    values[index] = torch.empty(
                        shape, dtype=dtype, device=_CPU, memory_format=layout
                    )
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


def tape() -> Any:
    """Returns what notes the calls of the engine; None where that is not built."""
    return None if _cpu is None else _cpu.Tape()


# Building ---------------------------------------------------------------------------------------


def build(network: fx.GraphModule, record: Sequence[Seen], kept: set[int]) -> Program | None:
    """Makes the program of a recorded call.

    Args:
        network: the network.
        record: of all steps, in the order of the graph.
        kept: the storages that are returned.

    Returns:
        The program; None where no step would be native.
    """
    return _Builder(network, record, kept).program()


_Bindable = tuple[int, Any, tuple[Operand, ...]]  # number of the graph's step, native step


class _Pending(NamedTuple):
    """Native steps that have no places yet."""

    steps: tuple[_Bindable, ...]


class _Builder:
    """A program that is being made."""

    def __init__(self, network: fx.GraphModule, record: Sequence[Seen], kept: set[int]) -> None:
        self.network, self.record, self.kept = network, record, kept
        self.index = {seen.node: i for i, seen in enumerate(record)}
        self.constant: set[fx.Node] = set()  # numbers that follow from shapes
        self.lifetimes: list[Lifetime] = []
        self.life: dict[int, int] = {}  # by storage
        self.fresh: dict[int, int] = {}  # storage that is returned -> its step
        self.views: list[_View] = []
        self.guard = _cpu.Guard()
        self.watched: set[Any] = set()
        self.deaths = self._deaths()

    def program(self) -> Program | None:
        pieces: list[Any] = []
        run: list[_Bindable] = []
        native = False
        for index, seen in enumerate(self.record):
            node = seen.node
            self._note_constant(seen)
            if node.op in ("placeholder", "output"):
                continue
            bound = self._native(seen)
            if bound is not None:
                run.append((index, *bound))
                native = True
            elif not self._is_view(seen):
                self._flush(run, pieces)
                call = _caller(self.network, node, self.index)
                pieces.append(_Called(index, call, ()))
                self._watch_call(node)
        self._flush(run, pieces)
        if not native:
            return None
        pieces = self._with_ends(pieces)
        return Program(self.lifetimes, self.views, pieces, self.network, self.guard)

    def _deaths(self) -> dict[int, int]:
        """Finds the last step that reads each storage."""
        deaths: dict[int, int] = {}
        for index, seen in enumerate(self.record):
            last = max((self.index[user] for user in seen.node.users), default=index)
            for spec in seen.specs:
                if spec is not None:
                    deaths[spec.storage] = max(deaths.get(spec.storage, 0), last)
        return deaths

    def _note_constant(self, seen: Seen) -> None:
        node = seen.node
        plain = all(s is None for s in seen.specs)
        if plain and node.op != "placeholder" and name_of(node) in _OF_SIZES:
            operands = node.all_input_nodes
            if all(self._has_tensors(n) or n in self.constant for n in operands):
                self.constant.add(node)

    def _has_tensors(self, node: fx.Node) -> bool:
        return any(s is not None for s in self.record[self.index[node]].specs)

    def _known_arguments(self, node: fx.Node) -> bool:
        """Tells whether all arguments that are numbers follow from shapes."""
        return all(self._has_tensors(n) or n in self.constant for n in node.all_input_nodes)

    def _native(self, seen: Seen) -> tuple[Any, tuple[Operand, ...]] | None:
        """Returns the native step of a node and its operands, and finds its result a place."""
        spec, node = seen.spec, seen.node
        if spec is None or spec.numel == 0 or not self._known_arguments(node):
            return None
        sources = [self.record[self.index[n]] for n in node.all_input_nodes]
        found = native_step(seen, sources)
        if found is None:
            return None
        step, operands = found
        layout = spec.memory_format
        if seen.made >= 0:
            if layout is None or spec.offset or spec.storage != seen.made:
                return None
            index = self.index[node]
            escapes = seen.made in self.kept
            life = Lifetime(
                node.name, spec.shape, spec.dtype, layout, index, self.deaths[seen.made], escapes
            )
            self.life[seen.made] = len(self.lifetimes)
            self.lifetimes.append(life)
            if escapes:
                self.fresh[seen.made] = index
            else:
                self.views.append(_View(index, ((spec, self.life[seen.made]),), seen.structure))
        elif not self._is_view(seen):  # in place, on what lies elsewhere
            return None
        self._watch_module(node)
        return step, operands

    def _is_view(self, seen: Seen) -> bool:
        """Tells whether a value is a view of what lies in the arena; then it is one from now on."""
        node = seen.node
        in_arena = seen.specs and all(
            s is not None and s.storage in self.life and s.storage not in self.fresh
            for s in seen.specs
        )
        if seen.made >= 0 or not in_arena or not self._known_arguments(node):
            return False
        if any(v.index == self.index[node] for v in self.views):
            return True
        viewed = name_of(node) in _VIEWS and not str(node.target).endswith("_")
        if not viewed and not native_step(
            seen, [self.record[self.index[n]] for n in node.all_input_nodes]
        ):
            return False
        leaves = tuple((s, self.life[s.storage]) for s in seen.specs if s is not None)
        self.views.append(_View(self.index[node], leaves, seen.structure))
        return True

    def _flush(self, run: list[_Bindable], pieces: list[Any]) -> None:
        """Makes one piece of the native steps so far."""
        if not run:
            return
        pieces.append(_Pending(tuple(run)))
        run.clear()

    def _with_ends(self, pieces: list[Any]) -> list[Any]:
        """Binds the native steps to places, and says what is dropped after each piece."""
        places = Arena(self.lifetimes).places
        called = {p.index for p in pieces if isinstance(p, _Called)}
        ends: dict[int, int] = {}  # by step, the last piece that needs its value
        for number, piece in enumerate(pieces):
            steps = [piece.index] if isinstance(piece, _Called) else [s[0] for s in piece.steps]
            for step in steps:
                for node in self.record[step].node.all_input_nodes:
                    ends[self.index[node]] = number
        result = self.record[-1].node
        returned = {self.index[n] for n in result.all_input_nodes}
        ended: dict[int, list[int]] = {}
        for step, number in ends.items():
            if step in called and step not in returned:
                ended.setdefault(number, []).append(step)
        made: list[Any] = []
        for number, piece in enumerate(pieces):
            done = tuple(ended.get(number, ()))
            if isinstance(piece, _Called):
                made.append(piece._replace(done=done))
            else:
                made.append(self._bound(piece.steps, places, called, done))
        return made

    def _bound(
        self,
        steps: tuple[_Bindable, ...],
        places: Sequence[int],
        called: set[int],
        done: tuple[int, ...],
    ) -> _Native:
        outside: dict[int, int] = {}  # step -> base
        fresh, checked, bound = [], {}, []
        for index, step, operands in steps:
            where: list[tuple[int, int]] = []
            for operand in operands:
                if operand.step is None:
                    where.append((-1, 0))
                    continue
                spec = operand.spec
                assert spec is not None
                if spec.storage in self.life and spec.storage not in self.fresh:
                    where.append((0, places[self.life[spec.storage]] + spec.offset))
                    continue
                at = self.index[operand.step]
                where.append((outside.setdefault(at, len(outside) + 1), 0))
                if at in called:
                    checked[at] = spec
            seen = self.record[index]
            if seen.made in self.fresh:
                life = self.lifetimes[self.life[seen.made]]
                fresh.append((index, life.shape, life.dtype, life.layout))
            bound.append((step, where))
        program = _cpu.Program(bound)
        return _Native(
            program, tuple(outside), tuple(checked.items()), tuple(fresh), steps[0][0], done
        )

    def _watch_call(self, node: fx.Node) -> None:
        """Notes which module a call goes to: another one may come to its place."""
        if node.op == "call_module":
            self._watch_path(str(node.target))

    def _watch_path(self, target: str) -> None:
        owner: nn.Module = self.network
        for name in target.split("."):
            if (id(owner), name) not in self.watched:
                self.watched.add((id(owner), name))
                self.guard.entry(owner._modules, name)
            owner = owner._modules[name]  # type: ignore[assignment]

    def _watch_module(self, node: fx.Node) -> None:
        """Notes all that a layer's native step was made of."""
        module = module_of(node)
        if module is None:
            return
        self._watch_path(str(node.target))
        if id(module) in self.watched:
            return
        self.watched.add(id(module))
        for key in module.__dict__:
            if not key.startswith(_OF_MODULES):
                self.guard.entry(module.__dict__, key)
        self.guard.entry(module.__dict__, "forward")
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                self.guard.entry(store, key)
                if tensor is not None:
                    self.guard.tensor(tensor, tensor.untyped_storage())


# What nn.Module keeps for itself, and caches; `training` and hooks are asked for elsewhere.
_OF_MODULES = (
    "_parameters", "_buffers", "_modules", "_non_persistent", "_forward", "_backward",
    "_state_dict", "_load_state", "_is_full", "training", "_ready", "_weight_",
)  # fmt: skip


# Calling ----------------------------------------------------------------------------------------


def _resolver(argument: Any, index: dict[fx.Node, int]) -> Callable[[list[Any]], Any]:
    """Returns what gives an argument of a graph with the values of a call, in plain containers."""
    if isinstance(argument, fx.Node):
        number = index[argument]
        return lambda values: values[number]
    if isinstance(argument, slice):
        parts = [_resolver(a, index) for a in (argument.start, argument.stop, argument.step)]
        return lambda values: slice(*(part(values) for part in parts))
    if isinstance(argument, dict):
        kind = dict if type(argument).__name__ == "immutable_dict" else type(argument)
        pairs = [(key, _resolver(value, index)) for key, value in argument.items()]
        return lambda values: kind((key, part(values)) for key, part in pairs)
    if isinstance(argument, list | tuple):
        parts = [_resolver(a, index) for a in argument]
        if hasattr(argument, "_fields"):
            made: Any = type(argument)
            return lambda values: made(*(part(values) for part in parts))
        if isinstance(argument, tuple):
            return lambda values: tuple([part(values) for part in parts])
        return lambda values: [part(values) for part in parts]
    return lambda values: argument


def _caller(
    network: fx.GraphModule, node: fx.Node, index: dict[fx.Node, int]
) -> Callable[[list[Any]], Any]:
    """Returns what runs a step as the graph says."""
    args, kwargs = _resolver(tuple(node.args), index), _resolver(dict(node.kwargs), index)
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
