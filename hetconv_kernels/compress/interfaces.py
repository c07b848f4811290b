# SPDX-License-Identifier: Apache-2.0
"""Interfaces: which layers read the output of a layer, and so what goes with one of its filters.

Removing filter i of a layer is exact when every layer that reads channel i is known and drops it
too, and nothing mixes the channels in between. Where that does not hold (a residual sum, a
concatenation, the output of the network) the layer keeps its width, and a sentence says why.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.activation import Softmax
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.pooling import (
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
    _AvgPoolNd,
    _MaxPoolNd,
)

# Output channel i of these depends on input channel i alone.
_CHANNELWISE: tuple[type[nn.Module], ...] = (
    _BatchNorm,
    _InstanceNorm,
    _DropoutNd,
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
    _AvgPoolNd,
    _MaxPoolNd,
    nn.Identity,
    nn.Upsample,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
)
_CHANNELWISE_CALLS = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardtanh, F.hardswish, F.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout, F.dropout2d,
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh, F.interpolate,
    "relu", "relu_", "sigmoid", "tanh", "contiguous", "clone",
}  # fmt: skip
_RESHAPES = {torch.flatten, torch.reshape, "flatten", "view", "reshape", nn.Flatten}
_MEANS = {torch.mean, "mean"}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_JOINS = {torch.cat, torch.concat, torch.stack}


@dataclass(frozen=True)
class Reader:
    """A layer that reads another one's output.

    Attributes:
        name: of the layer.
        repeat: its inputs for each channel: 1, or H·W after a flatten.
    """

    name: str
    repeat: int


@dataclass(frozen=True)
class Interfaces:
    """What is known of a network's widths.

    Attributes:
        readers: for each layer whose filters can be removed, all layers that read them.
        fixed: for each other layer, why its width stays.
    """

    readers: dict[str, tuple[Reader, ...]]
    fixed: dict[str, str]


class _Blocked(Exception):
    """The width of a layer is needed elsewhere; the text says where."""


def find_interfaces(
    model: nn.Module, layers: dict[str, nn.Conv2d | nn.Linear], example: Tensor
) -> Interfaces:
    """Follows each layer's output through the traced network to the layers that read it.

    Args:
        model: the network; a network that torch.fx cannot trace keeps all its widths.
        layers: the layers to look at.
        example: an input, for the shapes.
    """
    training = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in training:
            module.training = False
        graph = fx.symbolic_trace(model)
        with torch.no_grad():
            ShapeProp(graph).propagate(example)
    except Exception as error:  # noqa: BLE001  # user code may raise anything while it is traced
        reason = f"the network cannot be traced ({(str(error).splitlines() or [''])[0]})"
        return Interfaces({}, dict.fromkeys(layers, reason))
    finally:
        for module, flag in training:
            module.training = flag
    modules = dict(graph.named_modules())
    calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    places = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    readers: dict[str, tuple[Reader, ...]] = {}
    fixed: dict[str, str] = {}
    for name, layer in layers.items():
        try:
            if calls[name] != 1:
                raise _Blocked(f"it is called {calls[name]} times in a forward pass")
            if _is_depthwise(layer):
                raise _Blocked("it is depthwise: its channels are those of its input")
            width = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
            found = _readers(places[name], width, modules, calls, layers)
            readers[name] = tuple(dict.fromkeys(found))
        except _Blocked as reason:
            fixed[name] = str(reason)
    return Interfaces(readers, fixed)


def _readers(
    start: fx.Node,
    width: int,
    modules: dict[str, nn.Module],
    calls: Counter[str],
    layers: dict[str, nn.Conv2d | nn.Linear],
) -> list[Reader]:
    """Walks forward from a layer to its readers."""
    found: list[Reader] = []
    seen: set[fx.Node] = set()
    todo = [(user, start) for user in start.users]
    while todo:
        node, source = todo.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node.op == "output":
            raise _Blocked("its output is the output of the network")
        target: Any = modules[str(node.target)] if node.op == "call_module" else node.target
        if isinstance(target, nn.Conv2d | nn.Linear) and not _is_depthwise(target):
            found.append(_reader(node, source, target, width, calls, layers))
        elif _passes(node, source, target, width):
            todo += [(user, node) for user in node.users]
        elif target in _SUMS:
            raise _Blocked("its output is part of a residual sum")
        elif target in _JOINS:
            raise _Blocked("its output is part of a concatenation")
        elif target in ("size", "dim", getattr) or "shape" in str(target):
            continue  # asks for sizes other than the width, which stay
        else:
            kind = type(target).__name__ if isinstance(target, nn.Module) else target
            raise _Blocked(f"its output goes to {getattr(kind, '__name__', kind)}")
    if not found:
        raise _Blocked("no layer reads its output")
    return found


def _reader(
    node: fx.Node,
    source: fx.Node,
    target: nn.Conv2d | nn.Linear,
    width: int,
    calls: Counter[str],
    layers: dict[str, nn.Conv2d | nn.Linear],
) -> Reader:
    name, shape = str(node.target), _shape(source)
    if name not in layers:
        raise _Blocked(f"its reader {name!r} is not to be changed")
    if calls[name] != 1:
        raise _Blocked(f"its reader {name!r} is called {calls[name]} times")
    if isinstance(target, nn.Conv2d):
        if len(shape) == 4 and shape[1] == width == target.in_channels:
            return Reader(name, 1)
    elif len(shape) == 2 and shape[1] == target.in_features and shape[1] % width == 0:
        return Reader(name, shape[1] // width)
    raise _Blocked(f"its reader {name!r} mixes the channels of {shape} with other sizes")


def _passes(node: fx.Node, source: fx.Node, target: Any, width: int) -> bool:
    """Whether channel i comes out of this node where channel i went in."""
    if isinstance(target, Softmax):
        return False
    if isinstance(target, nn.Module):
        if isinstance(target, nn.Flatten):
            return _flattens(node, source, width)
        return isinstance(target, _CHANNELWISE) or _is_depthwise(target)
    if target in _RESHAPES:
        return _flattens(node, source, width)
    if target in _MEANS:
        before, after = _shape(source), _shape(node)
        return len(before) == 4 and after[:2] == before[:2] and set(after[2:]) <= {1}
    return target in _CHANNELWISE_CALLS


def _flattens(node: fx.Node, source: fx.Node, width: int) -> bool:
    """Whether [N, width, ...] or its flattened form becomes [N, width · rest], channels outside."""
    before, after = _shape(source), _shape(node)
    rest = 1
    for size in before[1:]:
        rest *= size
    whole = len(before) >= 2 and len(after) == 2 and after == (before[0], rest)
    return whole and (before[1] == width or len(before) == 2)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and (
        module.groups == module.in_channels == module.out_channels > 1
    )


def _shape(node: fx.Node) -> tuple[int, ...]:
    meta = node.meta.get("tensor_meta")
    return tuple(getattr(meta, "shape", ()))
