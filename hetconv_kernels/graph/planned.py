# SPDX-License-Identifier: Apache-2.0
"""PlannedNetwork: an optimised network whose layers write into one arena of planned memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from .. import ranges
from ..accuracy import is_strict
from ..arena import Arena, Lifetime, Recorder, placing
from ..autograd import transforms_active
from ..backends import forced_code
from .program import Frame, Program
from .program_builder import StepObserver, build_program, tape, taped
from .replay import CudaGraphs
from .seen import Operand, Seen, Spec, describe_arguments

__all__ = ["PlannedNetwork", "observe_steps", "plan_memory", "release_memory"]

# Signatures of inputs whose plans are kept; the one that was not used for longest goes first.
MOST_PLANS = 8
# A network that keeps asking for other results than were recorded is not planned any more.
_MOST_SURPRISES = 16
# What a step may give beside tensors; anything else could hide one.
_PLAIN: tuple[type, ...] = (
    int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout,
    torch.memory_format, slice, range, type(...),
)  # fmt: skip


class PlannedNetwork(fx.GraphModule):
    """A traced network that runs as a native program and recycles the memory of its activations.

    The first call with inputs of some signature (shapes, strides, dtypes, number of threads; what
    is forced) is recorded: what is computed, by which calls of the engine, who needs memory, for
    how long. Every further one runs the same calls as one native program on places of one arena,
    and what the engine does not compute between them, see `graph.program`. So a steady call
    allocates nothing but what it returns (and what layers of torch allocate), and meets no page
    fault. The numbers are the same. A layer, a weight or an option that was changed is noticed, and
    recorded anew.

    What is returned never lies in the arena. Calls at the same time, in several threads, have an
    arena each. `plan_memory` switches it off, `release_memory` gives the memory back. Calls that
    want gradients, that are traced or compiled, or whose modules have hooks, are not planned.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network."""
        graphs: CudaGraphs | None = self.__dict__.get("_graphs")
        if graphs and not kwargs and (signature := graphs.signature(self, args)):
            return graphs.run(signature, args, super().__call__)
        memory = self.__dict__.get("_memory")
        if memory is None or kwargs or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        signature = memory.signature(self, args)
        if signature is None:
            return super().__call__(*args)
        plan = memory.plan(signature)
        program = None if plan is None else plan.program
        if program is not None and not program.holds():
            plan, program = None, None
            memory.replace()
        if plan is None:
            return memory.record(self, signature, args)
        if program is not None:
            return plan.run(program, args)
        if plan.lifetimes is None:
            return super().__call__(*args)
        arena = plan.take()
        try:
            with placing(arena):
                result = super().__call__(*args)
        finally:
            plan.put_back(arena)
        if not arena.whole:
            memory.forget(signature)
        return result

    def recompile(self) -> Any:
        """Makes the code of a graph that was changed; what was recorded of the old one is gone."""
        for name, new in (("_memory", _Memory), ("_graphs", CudaGraphs)):
            if self.__dict__.get(name) is not None:
                self.__dict__[name] = new()
        return super().recompile()

    def __reduce__(self) -> Any:
        # torch.fx would give back a graph without a plan.
        return _unpickled, super().__reduce__()


def _unpickled(make: Any, arguments: tuple[Any, ...]) -> PlannedNetwork:
    """Makes a planned network again of what torch.fx makes of a pickled graph."""
    traced: fx.GraphModule = make(*arguments)
    network: PlannedNetwork = PlannedNetwork.__new__(PlannedNetwork)
    network.__dict__.update(traced.__dict__)
    network.graph = traced.graph
    return network


def planned(traced: fx.GraphModule) -> PlannedNetwork:
    """Makes a traced network one that recycles memory; they share their modules."""
    network = PlannedNetwork(traced, traced.graph)
    network.meta.update(traced.meta)
    network.train(traced.training)
    network.__dict__["_memory"] = _Memory()
    return network


def plan_memory(network: nn.Module, on: bool = True) -> int:
    """Switches the planning of memory on or off, in a network and in all of its parts.

    Returns:
        How many parts it was switched in; 0 for a network that `optimize` could not trace.
    """
    parts = [m for m in network.modules() if isinstance(m, PlannedNetwork)]
    for part in parts:
        part.__dict__["_memory"] = _Memory() if on else None
    return len(parts)


@contextmanager
def observe_steps(network: nn.Module, observer: StepObserver) -> Iterator[None]:
    """Lets an observer see the steps of native programs, inside a ``with``.

    The network is recorded anew, and its native steps are run one by one, where they were run in
    one call; afterwards it has the plans that it had.

    Args:
        network: what `optimize` gave.
        observer: is called with each `program_builder.ProgramStep` and what runs it, and returns
            what that returns.
    """
    parts = [m for m in network.modules() if isinstance(m, PlannedNetwork)]
    before = [part.__dict__["_memory"] for part in parts]
    try:
        for part in parts:
            part.__dict__["_memory"] = _Memory(observer)
        yield
    finally:
        for part, memory in zip(parts, before, strict=True):
            part.__dict__["_memory"] = memory


def release_memory(network: nn.Module) -> int:
    """Frees the arenas and CUDA graphs of a network; the next call takes new ones.

    Returns:
        The number of bytes that were freed. Arenas of calls that are running are not among them;
        of CUDA graphs inputs and results are counted.
    """
    kept = [m.__dict__.get(name) for m in network.modules() for name in ("_memory", "_graphs")]
    return sum(each.release() for each in kept if isinstance(each, _Memory | CudaGraphs))


class _Plan:
    """What is known of one signature, and the arenas not in use.

    Attributes:
        lifetimes: of the engines' results; None where they are not known.
        program: the network as native steps; None where it has to be called layer by layer.
    """

    def __init__(self, lifetimes: list[Lifetime] | None, program: Program | None = None) -> None:
        self.lifetimes, self.program = lifetimes, program
        self._idle: list[Any] = []

    def run(self, program: Program, args: tuple[Any, ...]) -> Any:
        """Runs the program, in an arena of this call's own."""
        frame: Frame = self.take()
        try:
            with placing(None):
                return program.run(args, frame)
        finally:
            self.put_back(frame)

    def take(self) -> Any:
        try:
            arena = self._idle.pop()
        except IndexError:
            program = self.program
            arena = Arena(self.lifetimes or []) if program is None else program.frame()
        arena.start()
        return arena

    def put_back(self, arena: Any) -> None:
        self._idle.append(arena)

    def release(self) -> int:
        freed = 0
        while self._idle:
            freed += self._idle.pop().bytes
        return freed


class _Memory:
    """The plans of a network; a copied or unpickled network starts without any."""

    def __init__(self, observer: StepObserver | None = None) -> None:
        self._observer = observer
        self._plans: OrderedDict[Any, _Plan] = OrderedDict()
        self._lock = threading.Lock()
        self._watched: tuple[Any, ...] | None = None
        self._surprises = self._replaced = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Memory:
        return _Memory()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Memory, ()

    def signature(self, network: PlannedNetwork, args: tuple[Any, ...]) -> Any:
        """Returns what a plan depends on; None where this call must not be planned."""
        if self._surprises > _MOST_SURPRISES or transforms_active():
            return None
        described = describe_arguments(args, _on_cpu)
        if described is None:
            return None
        parts, wants_gradient = described
        if self._watched is None:
            self._watched = _watched(network)
        hooks, parameters, modules, inputs = self._watched
        if len(args) != inputs:
            return None
        if any(hooks) or torch_module._has_any_global_hook():
            return None
        if torch.is_grad_enabled() and (wants_gradient or any(p.requires_grad for p in parameters)):
            return None
        if any(m.training for m in modules):
            return None
        cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        forced = forced_code(), is_strict(), ranges.active
        return (*parts, torch.get_num_threads(), *forced, cast)

    def plan(self, signature: Any) -> _Plan | None:
        with self._lock:
            plan = self._plans.get(signature)
            if plan is not None:
                self._plans.move_to_end(signature)
            return plan

    def record(self, network: PlannedNetwork, signature: Any, args: tuple[Any, ...]) -> Any:
        """Runs the network step by step and makes the plan of this signature."""
        run = _Recording(network)
        result = run.run(*args)
        cast = signature[-1]
        native = not cast and not ranges.active and self._replaced <= _MOST_SURPRISES
        plan = _Plan(run.lifetimes(result), run.program(result, self._observer) if native else None)
        with self._lock:
            self._plans[signature] = plan
            while len(self._plans) > MOST_PLANS:
                self._plans.popitem(last=False)
        return _ordinary(result)

    def forget(self, signature: Any) -> None:
        """Drops a plan that a call did not keep to: an engine was chosen anew."""
        with self._lock:
            self._plans.pop(signature, None)
            self._surprises += 1

    def replace(self) -> None:
        """Counts programs whose weights or layers have become others."""
        with self._lock:
            self._replaced += 1
            self._watched = None

    def release(self) -> int:
        with self._lock:
            return sum(plan.release() for plan in self._plans.values())


def _on_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def _watched(network: PlannedNetwork) -> tuple[Any, ...]:
    """Returns the dictionaries of hooks, the parameters and the modules of a network."""
    modules = list(network.modules())
    hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
    inputs = sum(node.op == "placeholder" for node in network.graph.nodes)
    return hooks, list(network.parameters()), modules, inputs


def _ordinary(value: Any) -> Any:
    """Returns the containers of an interpreted graph's outputs as its code would make them."""
    if isinstance(value, immutable_list):
        return [_ordinary(part) for part in value]
    if isinstance(value, immutable_dict):
        return {key: _ordinary(part) for key, part in value.items()}
    if type(value) is tuple:
        return tuple(_ordinary(part) for part in value)
    if type(value) is OrderedDict:
        return OrderedDict((key, _ordinary(part)) for key, part in value.items())
    return value


class _Recording(fx.Interpreter):
    """Runs the steps of a network and notes which results of engines each one may touch."""

    def __init__(self, network: PlannedNetwork) -> None:
        super().__init__(network)
        # What a step raises is what the caller gets, as from every further call: torch.fx would
        # write into its message, make others of some errors, and print the graph for a log.
        self.extra_traceback = False
        self.recorder = Recorder()
        self._network = network
        self._place = {node: i for i, node in enumerate(network.graph.nodes)}
        self._born: list[int] = []
        self._dies: list[int] = []
        self._opaque = False
        self._numbers: dict[int, int] = {}  # of results, by the identity of their storage
        self._seen: list[Seen] = []
        self._storages: dict[int, tuple[int, Any]] = {}  # all of them: their number, a weak one
        self._tape = tape()

    def run_node(self, n: fx.Node) -> Any:
        sources = [(node, self.env[node]) for node in n.all_input_nodes]
        with placing(self.recorder), taped(self._tape):
            value = super().run_node(n)
        here = self._place[n]
        for number in range(len(self._born), len(self.recorder.asked)):
            self._numbers[self.recorder.asked[number].storage.cdata] = number
            self._born.append(here)
            self._dies.append(here)
        last = max((self._place[user] for user in n.users), default=here)
        for number in self._results_in(value):
            self._dies[number] = max(self._dies[number], last)
        self._note(n, value, sources)
        return value

    def lifetimes(self, returned: Any) -> list[Lifetime] | None:
        """Lists the results as they were asked for; None where a step may hide a tensor."""
        if self._opaque:
            return None
        kept = set(self._results_in(returned))
        return [
            Lifetime(a.owner, a.shape, a.dtype, a.layout, born, dies, number in kept)
            for number, (a, born, dies) in enumerate(
                zip(self.recorder.asked, self._born, self._dies, strict=True)
            )
        ]

    def program(self, returned: Any, observer: StepObserver | None = None) -> Program | None:
        """Makes a program of what was seen; None where there is no engine, or a hidden tensor."""
        if self._opaque or self._tape is None:
            return None
        leaves = pytree.tree_leaves(returned)
        kept = {self._spec(leaf).storage for leaf in leaves if isinstance(leaf, Tensor)}
        return build_program(self._network, self._seen, kept, observer)

    def _note(self, n: fx.Node, value: Any, sources: list[tuple[fx.Node, Any]]) -> None:
        if self._tape is None:
            return
        before = len(self._storages)
        leaves, structure = pytree.tree_flatten(value)
        specs = tuple(self._spec(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves)
        made = before if len(self._storages) == before + 1 else -1
        if len(self._storages) > before + 1 or not structure.is_leaf():
            made = -2 if len(self._storages) > before else -1
        operands: dict[int, Operand] = {}
        for node, operand in (*sources, (n, value)):
            if isinstance(operand, Tensor) and operand.numel():
                operands.setdefault(operand.data_ptr(), Operand(node, self._spec(operand)))
        operands[0] = Operand(None, None)
        calls = tuple(
            (step, tuple(operands.get(address) for address in addresses))
            for step, addresses in self._tape.take()
        )
        self._seen.append(Seen(n, specs, structure, made, calls))

    def _spec(self, x: Tensor) -> Spec:
        storage = x.untyped_storage()
        number = self._storages.get(storage._cdata)
        if number is None:
            number = len(self._storages), StorageWeakRef(storage)
            self._storages[storage._cdata] = number
        offset = int(x.storage_offset()) * x.element_size()
        return Spec(tuple(x.shape), x.stride(), x.dtype, number[0], offset)

    def _results_in(self, value: Any) -> Iterator[int]:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                number = self._numbers.get(leaf.untyped_storage()._cdata)
                if number is not None:
                    yield number
            elif not isinstance(leaf, _PLAIN):
                self._opaque = True
