# SPDX-License-Identifier: Apache-2.0
"""Makes a program of what was recorded: native steps, their places, and what to watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

from torch import fx, nn

from ..arena import Arena, Lifetime
from .batch_parts import Built, in_parts
from .names import module_of, name_of
from .native_steps import native_step
from .planes import Bindable, in_planes
from .program import Called, Native, Program, View, caller
from .seen import Operand, Seen, Spec

try:
    from .. import _cpu
except ImportError:  # nothing is compiled here
    _cpu = None  # type: ignore[assignment]

# What gives a view wherever the strides allow, whatever the values are.
_VIEWS = frozenset(
    ("flatten", "view", "reshape", "getitem", "slice", "select", "narrow", "squeeze", "unsqueeze",
     "permute", "transpose", "chunk", "split", "split_with_sizes", "contiguous", "detach",
     "unflatten", "expand")
)  # fmt: skip
# Numbers that follow from the shapes of the inputs.
_OF_SIZES = frozenset(("getattr", "size", "dim", "sym_size", "len", "getitem", "floordiv", "mul",
                       "add", "sub"))  # fmt: skip


def tape() -> Any:
    """Returns what notes the calls of the engine; None where that is not built."""
    return None if _cpu is None else _cpu.Tape()


@contextmanager
def taped(noting: Any) -> Iterator[None]:
    """Notes this thread's calls of the engine on a `Tape`, inside a ``with``."""
    if noting is None:
        yield
        return
    noting.start()
    try:
        yield
    finally:
        noting.stop()


class ProgramStep(NamedTuple):
    """One step of a program, as an observer sees it.

    Attributes:
        node: the graph's step.
        kind: what is run; ``call`` where the step is called as the graph says.
        specs: of a native step's operands.
    """

    node: fx.Node
    kind: str
    specs: tuple[Spec | None, ...]


# Is called in the place of each step, with what runs it and is to be returned.
StepObserver = Callable[[ProgramStep, Callable[[], Any]], Any]


def build_program(
    network: fx.GraphModule,
    record: Sequence[Seen],
    kept: set[int],
    observer: StepObserver | None = None,
) -> Program | None:
    """Makes the program of a recorded call.

    Args:
        network: the network.
        record: of all steps, in the order of the graph.
        kept: the storages that are returned.
        observer: sees each step; native ones are then run one by one, at the same places.

    Returns:
        The program; None where no step would be native.
    """

    def built(seen: Sequence[Seen]) -> Built:
        builder = _Builder(network, seen, kept, observer)
        return Built(builder.program(), builder.operand_bytes, builder.weight_bytes)

    program = built(record).program
    if program is None or observer is not None:
        return program
    return in_parts(program, record, built) or program


class _Pending(NamedTuple):
    """Native steps that have no places yet."""

    steps: tuple[Bindable, ...]


def _observed(
    observer: StepObserver, step: ProgramStep, call: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    return lambda given: observer(step, lambda: call(given))


class _ObservedProgram:
    """The native program of one step, which an observer sees."""

    def __init__(self, program: Any, observer: StepObserver, step: ProgramStep) -> None:
        self.kinds, self.run = program.kinds, _observed(observer, step, program.run)


class _Builder:
    """A program that is being made."""

    def __init__(
        self,
        network: fx.GraphModule,
        record: Sequence[Seen],
        kept: set[int],
        observer: StepObserver | None,
    ) -> None:
        self.network, self.record, self.kept, self.observer = network, record, kept, observer
        self.index = {seen.node: i for i, seen in enumerate(record)}
        self.constant: set[fx.Node] = set()  # numbers that follow from shapes
        self.lifetimes: list[Lifetime] = []
        self.life: dict[int, int] = {}  # by storage
        self.fresh: dict[int, int] = {}  # storage that is returned -> its step
        self.views: list[View] = []
        self.guard = _cpu.Guard()
        self.watched: set[Any] = set()
        self.operand_bytes = self.weight_bytes = 0  # of native steps
        self.deaths = self._deaths()

    def program(self) -> Program | None:
        pieces: list[Any] = []
        run: list[Bindable] = []
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
                if self.observer is not None:
                    self._flush(run, pieces)
            elif not self._is_view(seen):
                self._flush(run, pieces)
                call = caller(self.network, node, self.index)
                if self.observer is not None:
                    call = _observed(self.observer, ProgramStep(node, "call", ()), call)
                pieces.append(Called(index, call, ()))
                self._watch_call(node)
        self._flush(run, pieces)
        if not native:
            return None
        pieces = self._with_ends(self._in_planes(pieces))
        return Program(self.lifetimes, self.views, pieces, self.network, self.guard)

    def _in_planes(self, pieces: list[Any]) -> list[Any]:
        """Has layers that compute from planes of pixels hand their results on in planes.

        Not past a step that is called: where it gives something else, the network goes on by hand
        from there, with what lies in the arena.
        """
        inner = self.life.keys() - self.fresh.keys()
        made: list[Any] = []
        for native, run in groupby(pieces, lambda piece: isinstance(piece, _Pending)):
            own = list(run)
            if native:
                steps = [step for piece in own for step in piece.steps]
                relaid, storages = in_planes(self.record, steps, inner)
                self.views = [v for v in self.views if v.leaves[0][0].storage not in storages]
                own = [
                    _Pending(tuple((i, relaid.get(i, step), o) for i, step, o in piece.steps))
                    for piece in own
                ]
            made += own
        return made

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
                self.views.append(View(index, ((spec, self.life[seen.made]),), seen.structure))
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
        if any(v.number == self.index[node] for v in self.views):
            return True
        viewed = name_of(node) in _VIEWS and not str(node.target).endswith("_")
        if not viewed and not native_step(
            seen, [self.record[self.index[n]] for n in node.all_input_nodes]
        ):
            return False
        leaves = tuple((s, self.life[s.storage]) for s in seen.specs if s is not None)
        self.views.append(View(self.index[node], leaves, seen.structure))
        return True

    def _flush(self, run: list[Bindable], pieces: list[Any]) -> None:
        """Makes one piece of the native steps so far."""
        if not run:
            return
        pieces.append(_Pending(tuple(run)))
        run.clear()

    def _with_ends(self, pieces: list[Any]) -> list[Any]:
        """Binds the native steps to places, and says what is dropped after each piece."""
        places = Arena(self.lifetimes).places
        called = {p.number for p in pieces if isinstance(p, Called)}
        ends: dict[int, int] = {}  # by step, the last piece that needs its value
        for number, piece in enumerate(pieces):
            steps = [piece.number] if isinstance(piece, Called) else [s[0] for s in piece.steps]
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
            if isinstance(piece, Called):
                made.append(piece._replace(done=done))
            else:
                made.append(self._bound(piece.steps, places, called, done))
        return made

    def _bound(
        self,
        steps: tuple[Bindable, ...],
        places: Sequence[int],
        called: set[int],
        done: tuple[int, ...],
    ) -> Native:
        outside: dict[int, int] = {}  # step -> base
        fresh, checked, bound = [], {}, []
        for index, step, operands in steps:
            where: list[tuple[int, int]] = []
            self.weight_bytes += step.weight_bytes
            self.operand_bytes += sum(o.spec.bytes for o in operands if o.spec is not None)
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
        program: Any = _cpu.Program(bound)
        if self.observer is not None:
            ((index, step, operands),) = steps
            specs = tuple(operand.spec for operand in operands)
            seen_as = ProgramStep(self.record[index].node, step.kind, specs)
            program = _ObservedProgram(program, self.observer, seen_as)
        return Native(
            program,
            tuple(outside),
            tuple(checked.items()),
            tuple(fresh),
            steps[0][0],
            done,
            tuple(index for index, _, _ in steps),
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
