# SPDX-License-Identifier: Apache-2.0
"""Graphs as plain data: the steps of a traced network, from a fixed list of what steps may call.

A graph that is read becomes Python code (torch.fx writes it), so every name in it is checked:
functions and methods come from the lists below, everything else is an identifier or a number.
"""

from __future__ import annotations

import builtins
import keyword
import math
import operator
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..errors import FileError, mismatch
from ..files import Json
from .alias import after
from .formats import channels_last
from .names import BINARY, EACH, MOVES, SIZES, SPATIAL

_OPERATORS = (
    "add sub mul truediv floordiv neg getitem iadd isub imul itruediv mod pow matmul eq ne lt le "
    "gt ge"
)
_MORE = frozenset(
    ("softmax", "log_softmax", "sum", "pow", "rsqrt", "sqrt", "exp", "matmul", "layer_norm",
     "group_norm", "batch_norm", "conv2d", "linear", "bmm", "stack", "normalize", "pixel_shuffle",
     "prelu", "amax", "amin", "max", "min", "swapaxes", "movedim", "t", "type_as", "numel",
     "expand_as", "roll", "fprop",
     # Checks of shapes, attention and upsampling as timm and segmentation_models_pytorch have them.
     "_assert", "reshape_as", "view_as", "unbind", "scaled_dot_product_attention",
     "conv_transpose2d", "conv1d")
)  # fmt: skip
_NAMES = EACH | SPATIAL | BINARY | MOVES | SIZES | _MORE
# What PyTorch has names for, and by which key it is written.
_OF_TORCH = {torch.dtype: "dtype", torch.memory_format: "memory_format"}
_ATTRIBUTES = frozenset(("shape", "dtype", "device", "ndim"))


def _functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {
        "getattr": builtins.getattr,
        "len": builtins.len,
        "graph.after": after,
        "graph.channels_last": channels_last,
        "collections.OrderedDict": OrderedDict,
    }
    for name in _OPERATORS.split():
        found[f"operator.{name}"] = getattr(operator, name)
    for name in sorted(_NAMES):
        for form in (name, f"{name}_"):
            for module, prefix in ((torch, "torch"), (F, "F")):
                function = getattr(module, form, None)
                if callable(function) and not isinstance(function, type):
                    found[f"{prefix}.{form}"] = function
    return found


_FUNCTIONS = _functions()
_FUNCTION_NAMES = {id(function): name for name, function in _FUNCTIONS.items()}
_METHODS = _NAMES | {f"{name}_" for name in EACH | BINARY}


def graph_to_json(graph: fx.Graph) -> list[Json]:
    """Describes a graph.

    Raises:
        FileError: it calls something that is not on the list of what a file may call.
    """
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _target_to_json(node),
            "args": [_to_json(a) for a in node.args],
            "kwargs": {key: _to_json(a) for key, a in node.kwargs.items()},
        }
        for node in graph.nodes
    ]


def graph_from_json(steps: list[Json]) -> fx.Graph:
    """Builds a graph from its description.

    Raises:
        FileError: a step is malformed, or calls something that is not on the list.
    """
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    try:
        for step in steps:
            name, op = step["name"], step["op"]
            _identifier(name)
            target = _target_from_json(op, step["target"])
            args = tuple(_from_json(a, nodes) for a in step["args"])
            kwargs = {_identifier(k): _from_json(a, nodes) for k, a in step["kwargs"].items()}
            if target is builtins.getattr and args[1] not in _ATTRIBUTES:
                raise ValueError(f"the attribute {args[1]!r}")
            nodes[name] = graph.create_node(op, target, args, kwargs, name)
        graph.lint()
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, RecursionError) as error:
        raise FileError(
            mismatch("graph of a network", f"{error!r:.200}", "steps that this version writes")
        ) from error
    return graph


def _target_to_json(node: fx.Node) -> str:
    target = node.target
    if node.op != "call_function":
        if node.op == "call_method" and target not in _METHODS:
            raise _unknown(f"the method {target}")
        return str(target)
    if isinstance(target, torch._ops.OpOverload):
        text = f"{target._schema.name}.{target._overloadname}"
    else:
        text = _FUNCTION_NAMES.get(id(target), "")
        if not text:  # functions that choose between two others compare equal by name only
            raise _unknown(f"the function {getattr(target, '__name__', target)}")
    _target_from_json(node.op, text)
    return text


def _unknown(what: str) -> FileError:
    return FileError(
        mismatch(
            "graph of a network",
            what,
            "what a file may call",
            "Save the network of its own class, and load it with load(path, into=network).",
        )
    )


def _target_from_json(op: str, target: str) -> Any:
    if op in ("placeholder", "output"):
        return _identifier(target)
    if op in ("call_module", "get_attr"):
        if not re.fullmatch(r"\w+(\.\w+)*", target, re.ASCII):
            raise ValueError(f"the name {target!r}")
        return target
    if op == "call_method" and target in _METHODS:
        return target
    if op == "call_function" and target in _FUNCTIONS:
        return _FUNCTIONS[target]
    if op == "call_function" and "::" in target:
        return _overload(target)
    raise _unknown(f"{op} of {target!r}")


def _overload(target: str) -> Any:
    """Finds an operator of PyTorch or of this package, such as ``aten::relu_.default``."""
    space, _, rest = target.partition("::")
    name, _, overload = rest.partition(".")
    if space not in ("aten", "hetconv") or name.removesuffix("_") not in _NAMES:
        raise _unknown(f"the operator {target!r}")
    packet = getattr(getattr(torch.ops, space), name)
    if overload not in packet.overloads():
        raise ValueError(f"the overload {target!r}")
    return getattr(packet, overload)


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"the name {name!r}")
    return name


def _to_json(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [_to_json(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [_to_json(v) for v in value]}
    if isinstance(value, list):
        return [_to_json(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {_identifier(k): _to_json(v) for k, v in value.items()}}
    if value is Ellipsis:
        return {"ellipsis": True}
    for kind, name in _OF_TORCH.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _unknown(f"an argument {value!r:.100}")


def _from_json(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_from_json(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((key, inner),) = value.items()
    if key == "node":
        return nodes[inner]
    if key == "slice":
        return slice(*(_from_json(v, nodes) for v in inner))
    if key == "tuple":
        return tuple(_from_json(v, nodes) for v in inner)
    if key == "dict":
        return {_identifier(k): _from_json(v, nodes) for k, v in inner.items()}
    if key == "ellipsis":
        return Ellipsis
    if key == "float":
        return float(inner)
    found = getattr(torch, inner) if key in _OF_TORCH.values() else None
    if _OF_TORCH.get(type(found)) != key:
        raise ValueError(f"{key}: {inner!r}")
    return found
