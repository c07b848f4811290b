# SPDX-License-Identifier: Apache-2.0
"""Builds the fake-quantised network of a plan; `convert` makes the integer network of that."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ..errors import ArgumentError
from ..graph.layout import set_module
from ..graph.names import SIZES, module_of, name_of
from ..graph.planned import planned
from ..nn import FusedConv2d
from ..nn.base import ForcedBackend
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
from .fake import FakeQuantizedLayer, FakeStep
from .scheme import Scale
from .steps import LAYER, MOVE, Flow, Step

Ranges = Mapping[fx.Node, tuple[float, float]]
Scales = dict[fx.Node, Scale]


def assign_scales(flow: Flow, ranges: Ranges, dtype: torch.dtype) -> Scales:
    """Gives every tensor that becomes integers its Scale.

    Moves keep the Scale of what they move. A concatenation has one of its own, which the layers
    that only it reads take over, so that nothing has to be requantised.

    Args:
        flow: where integers flow.
        ranges: what was observed, for each node that needs it.
        dtype: of the activations.

    Raises:
        ArgumentError: a range is not finite.
    """
    shared: Scales = {}
    for node in reversed(list(flow.steps)):
        step = flow.steps[node]
        if step.what != "cat" or node not in flow.quantized:
            continue
        scale = shared.setdefault(node, Scale.of_range(*ranges[node], dtype))
        for operand in step.inputs:
            source = flow.steps.get(operand)
            owned = source is not None and (source.kind != MOVE or source.what == "cat")
            if owned and operand in flow.quantized and set(operand.users) == {node}:
                shared[operand] = scale
    scales: Scales = {}
    for node, step in flow.steps.items():
        for operand in step.inputs:
            if operand not in scales and operand not in flow.quantized and operand in ranges:
                scales[operand] = Scale.of_range(*ranges[operand], dtype)
        if node not in flow.quantized:
            continue
        if node in shared:
            scales[node] = shared[node]
        elif step.kind == MOVE:
            scales[node] = scales[step.inputs[0]]
        else:
            scales[node] = Scale.of_range(*ranges[node], dtype)
    return scales


def fake_layer(step: Step, x: Scale, y: Scale | None, residual: Scale | None) -> FakeQuantizedLayer:
    """Makes the fake-quantised layer of a step."""
    module: Any = module_of(step.source)
    weight = module.weight.detach()
    if isinstance(module, FusedConv2d):
        kind: Any = QuantizedConv2d
        shift = module.shift
    else:
        kind = QuantizedLinear
        weight = weight if weight.dim() == 1 else module._to_live(weight)
        bias = module.bias
        shift = weight.new_zeros(module.out_features) if bias is None else bias
    return FakeQuantizedLayer(
        kind, module._geometry, weight, shift, x, y, residual, step.act, step.pool, module.backend
    )


def build_fake_quantized(traced: fx.GraphModule, flow: Flow, scales: Scales) -> fx.GraphModule:
    """Builds the fake-quantised network; the original stays as it is.

    Args:
        traced: the network in float.
        flow: where integers flow.
        scales: of the tensors that become integers.
    """
    return _Builder(traced, flow, scales).build()


class _Builder:
    """A network that is being written, with the two forms of each value of the old one."""

    def __init__(self, traced: fx.GraphModule, flow: Flow, scales: Scales) -> None:
        self.traced, self.flow, self.scales = traced, flow, scales
        self.graph = fx.Graph()
        self.parts: dict[str, Any] = {}
        self.floats: dict[fx.Node, fx.Node] = {}
        self.integers: dict[fx.Node, dict[Scale | None, fx.Node]] = {}

    def build(self) -> fx.GraphModule:
        """Writes all nodes."""
        for node in self.traced.graph.nodes:
            step = self.flow.steps.get(node)
            if step is not None:
                self._write(step)
            elif node not in self.flow.inside:
                self._copy(node)
        self.graph.lint()
        made = fx.GraphModule(self.parts, self.graph, type(self.traced).__name__)
        made.train(self.traced.training)
        return made

    # Values -----------------------------------------------------------------------------------

    def as_float(self, node: fx.Node) -> fx.Node:
        """Returns a value in float32."""
        if node not in self.floats:
            scale = self.scales[node]
            made = self._module(f"{node.name}_dequantize", FakeStep(Dequantize(scale)))
            self.floats[node] = self.graph.call_module(made, (self._integer(node),))
        return self.floats[node]

    def as_integers(self, node: fx.Node, scale: Scale | None = None) -> fx.Node:
        """Returns a value as integers, of its own Scale or of another."""
        own = self.scales[node] if node in self.flow.quantized else None
        forms = self.integers.setdefault(node, {})
        wanted = scale or own or self.scales[node]
        if wanted not in forms:
            place = len(forms)
            if own is None:
                name = self._module(f"{node.name}_quantize_{place}", FakeStep(Quantize(wanted)))
                forms[wanted] = self.graph.call_module(name, (self.as_float(node),))
            else:
                step = FakeStep(Requantize(own, wanted))
                name = self._module(f"{node.name}_requantize_{place}", step)
                forms[wanted] = self.graph.call_module(name, (forms[own],))
        return forms[wanted]

    def _integer(self, node: fx.Node) -> fx.Node:
        return self.integers[node][self.scales[node]]

    def _any(self, node: fx.Node) -> fx.Node:
        return self.floats[node] if node in self.floats else self._integer(node)

    def _scale_of(self, node: fx.Node) -> Scale:
        return self.scales[node]

    # Nodes ------------------------------------------------------------------------------------

    def _copy(self, node: fx.Node) -> None:
        """Copies a step that stays in float; what asks for sizes alone takes either form."""
        form = self._any if name_of(node) in SIZES else self.as_float
        made = self.floats[node] = self.graph.node_copy(node, form)
        _reshaped(node, made)
        if node.op == "call_module":
            self._keep(str(node.target))
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            self.parts[str(node.target)] = getattr(self.traced.get_submodule(owner), name)

    def _write(self, step: Step) -> None:
        """Writes a step that is computed in integers."""
        node = step.node
        y = self.scales[node] if node in self.flow.quantized else None
        if step.kind == LAYER:
            made = self._layer(step, y)
        elif step.what == "cat":
            assert y is not None
            operands = [self.as_integers(o, y) for o in step.inputs]
            args = (operands, *node.args[1:])
            made = self.graph.call_function(torch.cat, args, dict(node.kwargs))
        elif step.what == "move":
            made = self._move(step)
        else:
            made = self._light(step, y)
        if y is None:
            self.floats[node] = made
        else:
            self.integers[node] = {y: made}

    def _layer(self, step: Step, y: Scale | None) -> fx.Node:
        x, *others = (self.as_integers(i) for i in step.inputs)
        scales = [self._scale_of(i) for i in step.inputs]
        residual = scales[1] if others else None
        name = self._module(step.name, fake_layer(step, scales[0], y, residual))
        return self.graph.call_module(name, (x, *others))

    def _light(self, step: Step, y: Scale | None) -> fx.Node:
        operands = tuple(self.as_integers(i) for i in step.inputs)
        scales = [self._scale_of(i) for i in step.inputs]
        made = light_step(step, scales, y)
        return self.graph.call_module(self._module(f"{step.node.name}_step", made), operands)

    def _move(self, step: Step) -> fx.Node:
        """Moves integers; a view of another shape is a copy where the layout asks for it."""
        node, source = step.source, step.inputs[0]

        def form(n: fx.Node) -> fx.Node:
            return self.as_integers(n) if n is source else self._any(n)

        made = self.graph.node_copy(node, form)
        if node.op == "call_module":
            self._keep(str(node.target))
        _reshaped(node, made)
        return made

    def _keep(self, name: str) -> None:
        """Takes over a module that stays as it is, as a copy."""
        if name not in self.parts:
            self.parts[name] = copy.deepcopy(self.traced.get_submodule(name))

    def _module(self, name: str, module: nn.Module) -> str:
        """Keeps a module under a name, or under one like it where that is taken."""
        taken, place = name, 1
        while taken in self.parts:
            taken, place = f"{name}_{place}", place + 1
        self.parts[taken] = module
        return taken


def _reshaped(old: fx.Node, made: fx.Node) -> None:
    """Makes a view a reshaping: what comes before is in channels_last now, whatever it was."""
    if name_of(old) != "view" or any(isinstance(a, torch.dtype) for a in old.args):
        return
    x, *sizes = made.args
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        sizes = list(sizes[0])
    made.op, made.target = "call_function", torch.reshape
    made.args = (x, tuple(sizes or made.kwargs["size"]))  # type: ignore[arg-type]
    made.kwargs = {}


def light_step(step: Step, scales: list[Scale], y: Scale | None) -> FakeStep:
    """Makes the fake-quantised step between layers."""
    made: ForcedBackend
    if step.what == "add":
        made = QuantizedAdd(scales[0], scales[1], y, step.act)
    elif step.what == "act":
        made = Requantize(scales[0], y, step.act)
    elif step.what == "mean":
        made = QuantizedAvgPool2d(scales[0], y, step.size, step.keepdim)
    elif step.what == "pad":
        made = QuantizedPad(scales[0], step.pads)
    else:
        assert step.pool is not None
        made = QuantizedMaxPool2d(step.pool)
    return FakeStep(made)


def convert(model: nn.Module) -> nn.Module:
    """Makes the integer network of a fake-quantised one, in evaluation mode.

    Args:
        model: what `prepare` gave, trained or not; it stays as it is.

    Returns:
        A network of the same structure, whose layers and steps are in 8 bits.

    Raises:
        ArgumentError: a weight became NaN or infinite, or an accumulator could leave int32; the
            message names the layer.
    """
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if not isinstance(module, FakeStep | FakeQuantizedLayer):
            continue
        try:
            integer = module.to_integer()
        except ArgumentError as error:
            raise ArgumentError(f"layer {name!r}: {error}") from error
        if not name:
            return integer
        set_module(made, name, integer)
    made.eval()
    return planned(made) if isinstance(made, fx.GraphModule) else made
