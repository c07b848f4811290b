# SPDX-License-Identifier: Apache-2.0
"""trace: the graph of a network, from torch.fx or, where that fails, from torch.export."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import ArgumentError, InputTypeError, TraceError, mismatch
from ..nn.base import ForcedBackend
from .exported import lift

# What a network's own code raises when it meets a tracer's stand-ins for tensors.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


def as_inputs(example: Any) -> tuple[Any, ...]:
    """Returns the arguments of a forward: the example itself, or the tuple that it is.

    Raises:
        InputTypeError: there is no tensor in it.
    """
    inputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(inputs)):
        raise InputTypeError(
            mismatch("example", type(example).__name__, "an input tensor, or a tuple of inputs")
        )
    return inputs


def check_plain(model: nn.Module) -> None:
    """Refuses what is no plain network.

    Raises:
        InputTypeError: it is no nn.Module, or a scripted or wrapped one.
    """
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)
    if not isinstance(model, nn.Module) or isinstance(model, wrapped):
        raise InputTypeError(mismatch("model", type(model).__name__, "a plain nn.Module"))


def check_network(model: nn.Module) -> None:
    """Refuses what is no plain network in evaluation mode.

    Raises:
        InputTypeError: it is no nn.Module, or a scripted or wrapped one.
        ArgumentError: a part of it is in training mode.
    """
    check_plain(model)
    training = next((name for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise ArgumentError(
            mismatch(
                "mode of the network",
                f"training mode at {training!r}",
                "evaluation mode, in which batch normalisation is a fixed scale and shift",
                "Call model.eval() first.",
            )
        )


def check_float(model: nn.Module) -> None:
    """Refuses a network that is in 8 bits already.

    Raises:
        InputTypeError: it has a quantised layer.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, ForcedBackend) and hasattr(module, "weight_scale"):
            raise InputTypeError(
                mismatch(
                    "model",
                    f"a network in 8 bits ({name or 'the whole'} is a {type(module).__name__})",
                    "one in float",
                    "hetconv_kernels.quantize has optimised it already.",
                )
            )


def trace(model: nn.Module, example: Any) -> fx.GraphModule:
    """Finds the graph of a network: its layers as ``call_module`` nodes with their own names.

    torch.fx is tried first: it keeps sizes free. Where the network's code asks for values or sizes
    that torch.fx does not have, torch.export is tried, whose graph is that of the example's sizes
    (but for the batch, where the code allows it); its convolutions, normalisations and linear
    layers are made modules again, with the names that their parameters had.

    The graph shares modules with the network. Each node's ``meta`` has ``shape`` (of a tensor, or
    of each of a tuple) or ``value`` (anything else), as they were with the example.

    Args:
        model: the network.
        example: an input, or a tuple of inputs.

    Raises:
        InputTypeError: the example has no tensor.
        TraceError: neither way works; the message has both reasons.
    """
    inputs = as_inputs(example)
    reasons = []
    for name, find in (("torch.fx", _symbolic), ("torch.export", lift)):
        try:
            traced = find(model, inputs)
            _replace_mutated(traced)
            record(traced, inputs)
        except FAILURES as error:
            reasons.append(f"{name}: {_first_line(error)}")
        else:
            traced.meta["traced by"] = name
            return traced
    raise TraceError(
        f"{type(model).__name__} cannot be traced ({'; '.join(reasons)}); expected a forward "
        "without branches on values of tensors. hetconv_kernels.convert needs no trace, and "
        "optimize takes the parts that can be traced."
    )


class _Tracer(fx.Tracer):
    """Stops at the layers of this package as at those of torch.nn."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ForcedBackend) or super().is_leaf_module(m, module_qualified_name)


def symbolic_graph(model: nn.Module) -> fx.Graph:
    """Traces a network with torch.fx, the layers of this package being single steps.

    Raises:
        Whatever torch.fx and the network's own code raise.
    """
    return _Tracer().trace(model)


def _symbolic(model: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    if isinstance(model, ForcedBackend):
        model = nn.Sequential(model)
    graph = symbolic_graph(model)
    # Arguments that are left out keep their defaults: the traced code has to see them constant.
    names = [node for node in graph.nodes if node.op == "placeholder"]
    for node in names[len(inputs) :]:
        if node.users:
            raise TypeError(f"its argument {node.target!r} is not in the example")
    return fx.GraphModule(model, graph)


@torch.no_grad()
def record(traced: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Runs a graph and notes in each node's ``meta`` what it gave.

    Args:
        traced: the graph.
        inputs: arguments of its forward; they stay as they are.
    """
    _Recorder(traced).run(*copy.deepcopy(inputs))


class _Recorder(fx.Interpreter):
    """Runs the graph and notes what each node gives."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta.pop("shape", None)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        elif isinstance(result, tuple | list) and all(isinstance(r, Tensor) for r in result):
            n.meta["shape"] = tuple(tuple(r.shape) for r in result)
        else:
            n.meta["value"] = result
        return result


def _replace_mutated(traced: fx.GraphModule) -> None:
    """Lets what reads a tensor after it was changed in place read the result of the change."""
    order = {node: place for place, node in enumerate(traced.graph.nodes)}
    for node in traced.graph.nodes:
        if not _in_place(traced, node) or not isinstance(node.args[0], fx.Node):
            continue
        for user in list(node.args[0].users):
            if order[user] > order[node]:
                user.replace_input_with(node.args[0], node)
    traced.recompile()


def _in_place(traced: fx.GraphModule, node: fx.Node) -> bool:
    if not node.args:
        return False
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "").split(".")[0]
    if name in ("iadd", "isub", "imul", "itruediv"):
        return True
    return bool(node.kwargs.get("inplace")) or (name.endswith("_") and not name.startswith("_"))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else ""
    return f"{type(error).__name__}: {line if len(line) < 160 else line[:157] + '...'}"
