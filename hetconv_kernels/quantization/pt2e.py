# SPDX-License-Identifier: Apache-2.0
"""Reads a network that torchao's PT2E flow quantised.

Such a program consists of aten operators between ``quantized_decomposed`` quantisations and
dequantisations; torchao itself is not needed to read it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import InputTypeError, mismatch
from ..pooling import Pool
from .imported import assemble
from .recipe import Operation, Recipe, refused

_FULL = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int32: (-(2**31), 2**31 - 1)}
_SAME = ("dropout", "clone", "contiguous", "detach", "alias", "lift_fresh_copy")


def from_pt2e(program: torch.export.ExportedProgram | fx.GraphModule) -> fx.GraphModule:
    """Reads a convolutional network that PT2E quantised.

    Scales and integers are taken over as they are; which weights exist is found from their zeros.
    What is in float between the quantised parts stays in float.

    Args:
        program: what ``convert_pt2e`` gave, or ``torch.export`` or ``torch.export.load`` of that.

    Returns:
        A network of quantised layers, in evaluation mode.

    Raises:
        InputTypeError: neither an ExportedProgram nor a GraphModule.
        FileError: a node that cannot be imported; the message names it.
    """
    if isinstance(program, torch.export.ExportedProgram):
        return assemble(_Reader(program.graph, *_lifted(program)).recipe())
    if isinstance(program, fx.GraphModule):
        return assemble(_Reader(program.graph, {}, program).recipe())
    raise InputTypeError(
        mismatch("program", type(program).__name__, "an ExportedProgram or a GraphModule")
    )


def _lifted(program: torch.export.ExportedProgram) -> tuple[dict[str, Tensor], None]:
    """Returns parameters and buffers by the name of the placeholder that they come in by."""
    signature, state = program.graph_signature, program.state_dict
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    named |= signature.inputs_to_lifted_tensor_constants
    constants = {**program.constants, **state}
    return {place: constants[name].detach() for place, name in named.items()}, None


class _Reader:
    """One graph that is being read."""

    def __init__(
        self, graph: fx.Graph, constants: dict[str, Tensor], owner: fx.GraphModule | None
    ) -> None:
        self.graph, self.owner = graph, owner
        self.constants: dict[str, Tensor] = dict(constants)

    def recipe(self) -> Recipe:
        """Reads all nodes."""
        inputs, outputs, operations = [], [], []
        for node in self.graph.nodes:
            where = f"node {node.name!r} ({node.target})"
            if node.op == "placeholder":
                if node.name not in self.constants:
                    inputs.append(node.name)
            elif node.op == "get_attr":
                self.constants[node.name] = self._attribute(node, where)
            elif node.op == "output":
                outputs = [n.name for n in node.all_input_nodes]
            elif node.op == "call_function":
                operations.append(self._operation(node, where))
            elif not _is_guard(node):
                raise refused(where, f"a {node.op}", "an aten operator")
        return Recipe(tuple(inputs), tuple(outputs), tuple(operations), self.constants)

    def _attribute(self, node: fx.Node, where: str) -> Tensor:
        assert self.owner is not None
        found: Any = self.owner
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if not isinstance(found, Tensor):
            raise refused(where, type(found).__name__, "a tensor")
        return found.detach()

    def _operation(self, node: fx.Node, where: str) -> Operation:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise refused(where, "a function of Python", "an operator of PyTorch")
        packet = target._schema.name.partition("::")[2]
        # In place or not is the same here: nobody reads the old value of what is overwritten.
        name = packet.rstrip("_")
        known = [*_READERS, *_SAME]
        if target.namespace not in ("aten", "quantized_decomposed") or name not in known:
            raise refused(where, "an operator that is not known", f"one of {', '.join(known)}")
        arguments = _Arguments(node, target, where, self.constants)
        if name in _SAME:
            if name == "dropout" and arguments["train"]:
                raise refused(where, "dropout in training", "a network in evaluation mode")
            return arguments.made("same")
        return _READERS[name](arguments)


class _Arguments:
    """The arguments of a call by name, defaults included."""

    def __init__(
        self, node: fx.Node, target: torch._ops.OpOverload, where: str, constants: dict[str, Tensor]
    ) -> None:
        schema = target._schema.arguments
        self.node, self.where, self.constants = node, where, constants
        self.found = {a.name: a.default_value for a in schema if a.has_default_value()}
        self.found |= {a.name: v for a, v in zip(schema, node.args, strict=False)}
        self.found |= node.kwargs

    def __getitem__(self, name: str) -> Any:
        return self.found[name]

    def made(self, kind: str, *inputs: Any, **settings: Any) -> Operation:
        """Makes an operation of this node, which reads its first argument if nothing is said."""
        read = inputs or self.node.args[:1]
        names = [value.name if isinstance(value, fx.Node) else "" for value in read]
        return Operation(kind, self.where, tuple(names), self.node.name, settings)

    def refuse(self, received: object, expected: object) -> Exception:
        """Makes the error of this node."""
        return refused(self.where, received, expected)

    def tensor(self, name: str) -> Tensor:
        """Reads a number, or a constant tensor."""
        value = self.found[name]
        if isinstance(value, fx.Node):
            if value.name not in self.constants:
                raise self.refuse(f"{name} that is computed", f"a constant {name}")
            return self.constants[value.name]
        return torch.tensor(value)


def _scales(a: _Arguments) -> dict[str, Any]:
    per_channel = "scales" in a.found
    dtype, range_ = a["dtype"], (int(a["quant_min"]), int(a["quant_max"]))
    if dtype not in _FULL:
        raise a.refuse(f"numbers of {dtype}", "uint8 and int8 (int32 for biases)")
    scale = a.tensor("scales" if per_channel else "scale").float()
    zero = a.tensor("zero_points" if per_channel else "zero_point")
    constant = isinstance(a.node.args[0], fx.Node) and a.node.args[0].name in a.constants
    if not per_channel and range_ != _FULL[dtype] and not constant:
        raise a.refuse(f"a range from {range_[0]} to {range_[1]}", f"all of {dtype}")
    return {
        "scale": scale, "zero_point": zero.long(), "dtype": dtype,
        "axis": int(a["axis"]) if per_channel else 0, "low": range_[0], "high": range_[1],
    }  # fmt: skip


def _quantize(a: _Arguments) -> Operation:
    return a.made("quantize", **_scales(a))


def _dequantize(a: _Arguments) -> Operation:
    return a.made("dequantize", **_scales(a))


def _pair(value: Any) -> tuple[int, int]:
    found = tuple(value) if isinstance(value, list | tuple) else (value,)
    return (found[0], found[-1])


def _conv2d(a: _Arguments) -> Operation:
    padding = a["padding"]
    if isinstance(padding, str):
        if padding != "valid":
            raise a.refuse(f"padding={padding!r}", "padding in numbers")
        padding = 0
    py, px = _pair(padding)
    return a.made(
        "conv", a["input"], a["weight"], a["bias"], stride=_pair(a["stride"]),
        pads=[py, py, px, px], dilation=_pair(a["dilation"]), groups=int(a["groups"]),
    )  # fmt: skip


def _linear(a: _Arguments) -> Operation:
    return a.made("linear", a["input"], a["weight"], a["bias"])


def _add(a: _Arguments) -> Operation:
    if a["alpha"] != 1 or not isinstance(a["other"], fx.Node):
        raise a.refuse(f"alpha={a['alpha']}, other={a['other']}", "a sum of two tensors")
    return a.made("add", a["self"], a["other"])


def _relu(a: _Arguments) -> Operation:
    return a.made("act", act="relu")


def _clamp(a: _Arguments) -> Operation:
    keys = ("min_val", "max_val") if "min_val" in a.found else ("min", "max")
    bounds = tuple(a.found.get(key) for key in keys)
    if bounds not in ((0, None), (0, 6)):
        raise a.refuse(f"bounds {bounds}", "0 and 6 (or none)")
    return a.made("act", act="relu" if bounds[1] is None else "relu6")


def _relu6(a: _Arguments) -> Operation:
    return a.made("act", act="relu6")


def _max_pool2d(a: _Arguments) -> Operation:
    if a["ceil_mode"] or _pair(a["dilation"]) != (1, 1):
        raise a.refuse("ceil_mode or a dilation", "neither")
    kernel = _pair(a["kernel_size"])
    stride = _pair(a["stride"]) if a["stride"] else kernel
    return a.made("max_pool", pool=Pool(kernel, stride, _pair(a["padding"])))


def _adaptive(a: _Arguments) -> Operation:
    return a.made("mean", size=_pair(a["output_size"]), keepdim=True)


def _mean(a: _Arguments) -> Operation:
    dims = a.found.get("dim")
    if not dims or sorted(d % 4 for d in dims) != [2, 3] or a["dtype"] is not None:
        raise a.refuse(f"a mean over {dims}", "over the dimensions 2 and 3")
    return a.made("mean", size=(1, 1), keepdim=bool(a["keepdim"]))


def _pad(a: _Arguments) -> Operation:
    if a.found.get("mode", "constant") != "constant":
        raise a.refuse(f"mode {a['mode']}", "constant")
    return a.made("pad", pads=tuple(a["pad"]), value=a["value"] or 0)


def _move(function: Callable[..., Any], *names: str) -> Callable[[_Arguments], Operation]:
    def read(a: _Arguments) -> Operation:
        values = [tuple(v) if isinstance(v := a[n], list) else v for n in names]
        if any(isinstance(v, fx.Node) for v in values):
            raise a.refuse("sizes that are computed", "numbers")
        flat = function is torch.flatten and values == [1, -1]
        return a.made("move", function=function, arguments=tuple(values), flatten=flat)

    return read


def _slice(a: _Arguments) -> Operation:
    dim = int(a["dim"])
    if dim < 0:
        raise a.refuse(f"dim {dim}", "a positive one")
    index = (*[slice(None)] * dim, slice(a["start"], a["end"], a["step"]))
    return a.made("move", function=operator.getitem, arguments=(index,))


def _cat(a: _Arguments) -> Operation:
    return a.made("cat", *a["tensors"], dim=int(a["dim"]))


_READERS: dict[str, Callable[[_Arguments], Operation]] = {
    "quantize_per_tensor": _quantize,
    "quantize_per_channel": _quantize,
    "dequantize_per_tensor": _dequantize,
    "dequantize_per_channel": _dequantize,
    "conv2d": _conv2d,
    "linear": _linear,
    "add": _add,
    "relu": _relu,
    "relu6": _relu6,
    "hardtanh": _clamp,
    "clamp": _clamp,
    "max_pool2d": _max_pool2d,
    "adaptive_avg_pool2d": _adaptive,
    "mean": _mean,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "flatten": _move(torch.flatten, "start_dim", "end_dim"),
    "view": _move(torch.reshape, "size"),
    "reshape": _move(torch.reshape, "shape"),
    "permute": _move(torch.permute, "dims"),
    "slice": _slice,
    "cat": _cat,
}


def _is_guard(node: fx.Node) -> bool:
    """Tells the checks of input shapes that torch.export leaves in a module."""
    return node.op == "call_module" and str(node.target) == "_guards_fn"
