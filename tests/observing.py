# SPDX-License-Identifier: Apache-2.0
"""What can watch PyTorch at work: each observer returns what it saw of a call, and the result."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func._schema.name))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(getattr(func, "_qualified_op_name", func)))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(getattr(func, "_qualified_op_name", func)))
        return super().__torch_function__(func, types, args, kwargs or {})


Seen = tuple[list[str], Tensor]


def jit_tracer(call: Any, x: Tensor) -> Seen:
    traced = torch.jit.trace(call, (x,))
    return [node.kind() for node in traced.inlined_graph.nodes()], traced(x)


def graph_of(module: Any) -> list[str]:
    return [str(n.target._schema.name) for n in module.graph.nodes if hasattr(n.target, "_schema")]


def proxies(call: Any, x: Tensor) -> Seen:
    traced = make_fx(call)(x)
    return graph_of(traced), traced(x)


def dispatch_mode(call: Any, x: Tensor) -> Seen:
    with Dispatches() as mode:
        y = call(x)
    return mode.seen, y


def function_mode(call: Any, x: Tensor) -> Seen:
    with Functions() as mode:
        y = call(x)
    return mode.seen, y


def subclass(call: Any, x: Tensor) -> Seen:
    Subclass.seen.clear()
    y = call(x.as_subclass(Subclass))
    return list(Subclass.seen), y.as_subclass(Tensor)


def profiler(call: Any, x: Tensor) -> Seen:
    with profile(record_shapes=True) as record:
        y = call(x)
    return [event.key for event in record.key_averages()], y


def exporter(call: Any, x: Tensor) -> Seen:
    program = torch.export.export(call, (x,))
    return graph_of(program), program.module()(x)


def functionaliser(call: Any, x: Tensor) -> Seen:
    with Dispatches() as mode:
        y = torch.func.functionalize(call)(x)
    return mode.seen, y


def compiler(call: Any, x: Tensor) -> Seen:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(
            str(getattr(n.target, "_qualified_op_name", n.target)) for n in graph.graph.nodes
        )
        return graph.forward

    torch.compiler.reset()
    y = torch.compile(call, backend=backend)(x)
    return seen, y


def vmap_under_a_mode(call: Any, x: Tensor) -> Seen:
    with Dispatches() as mode:
        y = torch.vmap(call, in_dims=0)(x[None])[0]
    return mode.seen, y


OBSERVERS = {
    "jit-tracer": jit_tracer,
    "make-fx": proxies,
    "dispatch-mode": dispatch_mode,
    "function-mode": function_mode,
    "subclass": subclass,
    "profiler": profiler,
    "export": exporter,
    "functionalize": functionaliser,
    "compile": compiler,
    "vmap-under-a-mode": vmap_under_a_mode,
}
