# SPDX-License-Identifier: Apache-2.0
"""Builds a quantised network from QDQ operations, whichever file they were read from.

The readers (`onnx_import`, `pt2e`) turn what they read into `Operation`s on named values. Here
convolutions between a dequantisation and a quantisation become `QuantizedConv2d`, with the sum,
activation and pooling that stand between; scales and integers are taken over as they are, and the
Support is found from the zeros. What stands in float stays in float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..errors import FileError, HetconvError
from ..nn.quantized import QuantizedConv2d, QuantizedLinear
from ..nn.quantized_steps import (
    Dequantize,
    Quantize,
    QuantizedAdd,
    QuantizedAvgPool2d,
    QuantizedMaxPool2d,
    QuantizedPad,
    Requantize,
)
from ..problem import make_geometry
from .forms import Floats, Integers, Numbers, Pending
from .recipe import (
    Fixed,
    Operation,
    Recipe,
    filled,
    float_conv,
    float_linear,
    identifier,
    refused,
    rounded,
    scale_of,
    ungrouped,
)
from .scheme import Scale
from .zeros import support_of_zeros

_Value = Integers | Numbers | Floats | Pending | Fixed


def assemble(recipe: Recipe) -> fx.GraphModule:
    """Builds the network.

    Args:
        recipe: what was read.

    Returns:
        The network, in evaluation mode.

    Raises:
        FileError: something cannot be imported; the message names node and operator.
    """
    return _Assembler(recipe).assemble()


class _Assembler:
    """A network that is being written."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.graph = fx.Graph()
        self.parts: dict[str, Any] = {}
        self.values: dict[str, _Value] = {k: Fixed(v) for k, v in recipe.constants.items()}
        self.uses = Counter(n for op in recipe.operations for n in op.inputs)
        self.uses.update(recipe.outputs)
        self.written: dict[fx.Node, fx.Node] = {}

    def assemble(self) -> fx.GraphModule:
        """Writes all operations."""
        for name in self.recipe.inputs:
            self.values[name] = Floats(self.graph.placeholder(identifier(name)))
        for op in self.recipe.operations:
            try:
                self.values[op.output] = getattr(self, f"_{op.kind}")(op)
            except FileError:
                raise
            except HetconvError as error:
                raise FileError(f"{op.where}: {error}") from error
        found = [self._result(self._value(n, "an output")) for n in self.recipe.outputs]
        self.graph.output(found[0] if len(found) == 1 else tuple(found))
        made = fx.GraphModule(self.parts, self.graph, "ImportedNetwork").eval()
        made.graph.eliminate_dead_code()
        made.delete_all_unused_submodules()
        made.graph.lint()
        made.recompile()
        return made

    # Values -----------------------------------------------------------------------------------

    def _value(self, name: str, where: str) -> _Value:
        if name not in self.values:
            raise refused(where, f"the value {name!r}, which nothing gives", "a whole network")
        return self.values[name]

    def _read(self, op: Operation, place: int = 0) -> _Value:
        return self._value(op.inputs[place], op.where)

    def _constant(self, op: Operation, place: int, what: str) -> Fixed | None:
        """Reads an operand that has to be constant; None where it is not there."""
        if place >= len(op.inputs) or not op.inputs[place]:
            return None
        found = self._read(op, place)
        if not isinstance(found, Fixed):
            raise refused(op.where, f"{what} that is computed", f"a constant {what}")
        return found

    def _own(self, op: Operation, place: int = 0) -> _Value:
        """Reads an operand; a computation that others read too is finished in float."""
        found = self._read(op, place)
        if isinstance(found, Pending) and self.uses[op.inputs[place]] > 1:
            found = self.values[op.inputs[place]] = Floats(self._finish(found, None))
        return found

    def _as_floats(self, value: _Value, where: str) -> fx.Node:
        if isinstance(value, Floats):
            return value.node
        if isinstance(value, Pending):
            return self._finish(value, None)
        if isinstance(value, Fixed):
            raise refused(where, "a constant operand", "a computed one")
        integers = value.integers if isinstance(value, Numbers) else value
        if integers.node not in self.written:
            module = Dequantize(integers.scale)
            self.written[integers.node] = self._call(
                f"{integers.node.name}_dequantize", module, [integers.node]
            )
        return self.written[integers.node]

    def _result(self, value: _Value) -> fx.Node:
        if isinstance(value, Integers):
            return value.node
        return self._as_floats(value, "an output")

    def _finish(self, pending: Pending, scale: Scale | None) -> fx.Node:
        operands = list(pending.operands)
        if pending.residual is not None:
            operands.append(pending.residual.node)
        try:
            module = pending.make(scale, pending)
        except HetconvError as error:
            raise FileError(f"{pending.where}: {error}") from error
        return self._call(pending.name, module, operands)

    def _call(self, name: str, module: nn.Module, operands: Sequence[fx.Node]) -> fx.Node:
        taken = base = identifier(name)
        place = 1
        while taken in self.parts:
            taken, place = f"{base}_{place}", place + 1
        self.parts[taken] = module
        return self.graph.call_module(taken, tuple(operands))

    # Between floats and integers ----------------------------------------------------------------

    def _quantize(self, op: Operation) -> _Value:
        """Settings: scale and zero_point (tensors), dtype, axis, low and high."""
        value = self._own(op)
        if isinstance(value, Fixed) and value.scale is None:
            return Fixed(rounded(value.values, op.settings))
        scale = scale_of(op)
        if isinstance(value, Pending):
            node = self._finish(value, scale)
            made = self.parts[str(node.target)]
            return Integers(node, scale, made if isinstance(made, QuantizedConv2d) else None)
        if isinstance(value, Numbers):
            own = value.integers
            if own.scale == scale:
                return own
            module = Requantize(own.scale, scale)
            return Integers(self._call(f"{own.node.name}_requantize", module, [own.node]), scale)
        node = self._as_floats(value, op.where)
        return Integers(self._call(f"{node.name}_quantize", Quantize(scale), [node]), scale)

    def _dequantize(self, op: Operation) -> _Value:
        """Settings: as of quantize."""
        value = self._read(op)
        if isinstance(value, Fixed):
            zero = op.settings["zero_point"]
            if bool(zero.ne(0).any()):
                raise refused(
                    op.where, "a constant with zero points", "zero point 0",
                    "Quantise weights symmetrically.",
                )  # fmt: skip
            return Fixed(value.values, op.settings["scale"].flatten(), op.settings["axis"])
        if not isinstance(value, Integers):
            raise refused(op.where, "numbers that were not quantised", "integers")
        scale = scale_of(op)
        if scale != value.scale:
            raise refused(op.where, scale, f"{value.scale}, as it was quantised")
        return Numbers(value)

    # Layers -------------------------------------------------------------------------------------

    def _conv(self, op: Operation) -> _Value:
        """Inputs: image, weight, bias. Settings: stride, pads (t, b, l, r), dilation, groups."""
        weight, bias = self._constant(op, 1, "weight"), self._constant(op, 2, "bias")
        assert weight is not None
        if weight.values.dim() != 4:
            raise refused(
                op.where, f"a weight of shape {tuple(weight.values.shape)}", "[F, C, KH, KW]"
            )
        s, value = op.settings, self._own(op)
        if not isinstance(value, Numbers) or weight.scale is None:
            return self._float_conv(op, weight, bias)
        dense = ungrouped(weight.values, s["groups"])
        support = support_of_zeros(dense, s["groups"])
        geometry = make_geometry(support, s["stride"], s["pads"], s["dilation"])
        own = value.integers

        def make(y: Scale | None, found: Pending) -> nn.Module:
            residual = None if found.residual is None else found.residual.scale
            layer = QuantizedConv2d(
                geometry, x=own.scale, y=y, residual=residual, act=found.act, pool=found.pool
            )
            return filled(layer, dense, weight, bias, found.bias)

        return Pending("conv", op.output, op.where, make, [own.node])

    def _linear(self, op: Operation) -> _Value:
        """Inputs: features, weight [F, C], bias."""
        weight, bias = self._constant(op, 1, "weight"), self._constant(op, 2, "bias")
        assert weight is not None
        if op.settings.get("transposed"):
            axis = 1 - weight.axis if weight.values.dim() == 2 else weight.axis
            weight = Fixed(weight.values.t(), weight.scale, axis)
        if weight.values.dim() != 2:
            raise refused(op.where, f"a weight of shape {tuple(weight.values.shape)}", "[F, C]")
        value = self._own(op)
        if not isinstance(value, Numbers) or weight.scale is None:
            x = self._as_floats(value, op.where)
            return Floats(self._call(op.output, float_linear(weight, bias), [x]))
        dense = weight.values[:, :, None, None]
        geometry = make_geometry(support_of_zeros(dense))
        own = value.integers

        def make(y: Scale | None, found: Pending) -> nn.Module:
            layer = QuantizedLinear(geometry, x=own.scale, y=y, act=found.act)
            return filled(layer, dense, weight, bias, found.bias)

        return Pending("linear", op.output, op.where, make, [own.node])

    def _float_conv(self, op: Operation, weight: Fixed, bias: Fixed | None) -> _Value:
        top, bottom, left, right = op.settings["pads"]
        x = self._as_floats(self._read(op), op.where)
        if top != bottom or left != right:
            x = self.graph.call_function(F.pad, (x, (left, right, top, bottom)))
            top = left = 0
        layer = float_conv(weight, bias, op.settings, (top, left))
        return Floats(self._call(op.output, layer, [x]))

    # Steps --------------------------------------------------------------------------------------

    def _add(self, op: Operation) -> _Value:
        values = [self._own(op, 0), self._own(op, 1)]
        for one, other in (values, values[::-1]):
            if isinstance(one, Pending) and isinstance(other, Fixed):
                return self._with_bias(op, one, other)
        for one, other in (values, values[::-1]):
            if isinstance(one, Pending) and isinstance(other, Numbers) and one.takes_a_sum:
                one.residual = other.integers
                return one
        if all(isinstance(v, Numbers) for v in values):
            a, b = (v.integers for v in values)  # type: ignore[union-attr]
            return Pending(
                "add", op.output, op.where,
                lambda y, found: QuantizedAdd(a.scale, b.scale, y, found.act), [a.node, b.node],
            )  # fmt: skip
        nodes = tuple(self._as_floats(v, op.where) for v in values)
        return Floats(self.graph.call_function(torch.add, nodes))

    def _with_bias(self, op: Operation, layer: Pending, bias: Fixed) -> _Value:
        numbers = bias.numbers().squeeze()
        flat = layer.kind in ("conv", "linear") and numbers.dim() <= 1
        if not flat or layer.act != "none" or layer.residual is not None:
            raise refused(op.where, "a constant added to something else", "the bias of a layer")
        layer.bias = numbers if layer.bias is None else layer.bias + numbers
        return layer

    def _act(self, op: Operation) -> _Value:
        """Settings: act, ``relu`` or ``relu6``."""
        value, act = self._own(op), op.settings["act"]
        open_end = isinstance(value, Pending) and value.kind != "mean" and value.pool is None
        if open_end and value.act in ("none", act):  # type: ignore[union-attr]
            value.act = act  # type: ignore[union-attr]
            return value
        if isinstance(value, Numbers):
            own = value.integers
            return Pending(
                "act", op.output, op.where,
                lambda y, found: Requantize(own.scale, y, found.act), [own.node], act,
            )  # fmt: skip
        function = torch.relu if act == "relu" else F.relu6
        return Floats(self.graph.call_function(function, (self._as_floats(value, op.where),)))

    def _max_pool(self, op: Operation) -> _Value:
        """Settings: pool."""
        value, pool = self._own(op), op.settings["pool"]
        if isinstance(value, Pending) and value.kind == "conv" and value.pool is None:
            value.pool = pool
            return value
        if isinstance(value, Numbers | Integers):
            own = value.integers if isinstance(value, Numbers) else value
            layer = own.layer
            if layer is not None and layer.pool is None and not self._read_elsewhere(op):
                layer.pool = pool
                layer.prepare_()
                pooled = Integers(own.node, own.scale)
            else:
                node = self._call(op.output, QuantizedMaxPool2d(pool), [own.node])
                pooled = Integers(node, own.scale)
            return Numbers(pooled) if isinstance(value, Numbers) else pooled
        node = self._as_floats(value, op.where)
        return Floats(self._call(op.output, nn.MaxPool2d(*pool), [node]))

    def _read_elsewhere(self, op: Operation) -> bool:
        """Tells whether what is pooled, or the integers behind it, have other readers."""
        producers = {o.output: o for o in self.recipe.operations}
        name = op.inputs[0]
        while self.uses[name] == 1 and name in producers:
            if producers[name].kind not in ("dequantize", "same"):
                return producers[name].kind != "quantize"
            name = producers[name].inputs[0]
        return True

    def _mean(self, op: Operation) -> _Value:
        """Settings: size, keepdim."""
        value, s = self._own(op), op.settings
        if isinstance(value, Numbers) and s["size"] == (1, 1):
            own = value.integers
            return Pending(
                "mean", op.output, op.where,
                lambda y, found: QuantizedAvgPool2d(own.scale, y, (1, 1), found.keepdim),
                [own.node], keepdim=s["keepdim"],
            )  # fmt: skip
        node = self._as_floats(value, op.where)
        if s["size"] == (1, 1):
            return Floats(self.graph.call_function(torch.mean, (node, (2, 3), s["keepdim"])))
        return Floats(self.graph.call_function(F.adaptive_avg_pool2d, (node, s["size"])))

    def _pad(self, op: Operation) -> _Value:
        """Settings: pads (the last dimension first), value."""
        value, s = self._own(op), op.settings
        if isinstance(value, Numbers | Integers):
            own = value.integers if isinstance(value, Numbers) else value
            zero = 0 if isinstance(value, Numbers) else own.scale.zero_point
            if s["value"] != zero:
                raise refused(op.where, f"padding with {s['value']}", f"with the zero, {zero}")
            padded = Integers(
                self._call(op.output, QuantizedPad(own.scale, s["pads"]), [own.node]), own.scale
            )
            return Numbers(padded) if isinstance(value, Numbers) else padded
        arguments = (self._as_floats(value, op.where), s["pads"], "constant", s["value"])
        return Floats(self.graph.call_function(F.pad, arguments))

    def _move(self, op: Operation) -> _Value:
        """Settings: function, and its arguments behind the tensor; flatten where it is that."""
        value, s = self._own(op), op.settings
        if isinstance(value, Pending) and value.kind == "mean" and s.get("flatten"):
            value.keepdim = False
            return value
        if isinstance(value, Fixed):
            return Fixed(s["function"](value.values, *s["arguments"]), value.scale, value.axis)

        def moved(node: fx.Node) -> fx.Node:
            return self.graph.call_function(s["function"], (node, *s["arguments"]))

        if isinstance(value, Integers):
            return Integers(moved(value.node), value.scale)
        if isinstance(value, Numbers):
            return Numbers(Integers(moved(value.integers.node), value.integers.scale))
        return Floats(moved(self._as_floats(value, op.where)))

    def _cat(self, op: Operation) -> _Value:
        """Settings: dim."""
        values = [self._own(op, place) for place in range(len(op.inputs))]
        own = [v.integers if isinstance(v, Numbers) else v for v in values]
        integers = [v for v in own if isinstance(v, Integers)]
        if len(integers) < len(own) or len({v.scale for v in integers}) > 1:
            nodes = [self._as_floats(v, op.where) for v in values]
            return Floats(self.graph.call_function(torch.cat, (nodes, op.settings["dim"])))
        nodes = [v.node for v in integers]
        made = self.graph.call_function(torch.cat, (nodes, op.settings["dim"]))
        joined = Integers(made, integers[0].scale)
        return joined if isinstance(values[0], Integers) else Numbers(joined)

    def _same(self, op: Operation) -> _Value:
        value = self._own(op)
        if self.uses[op.output] > 1 and isinstance(value, Pending):
            return Floats(self._finish(value, None))
        return value
