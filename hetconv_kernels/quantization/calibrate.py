# SPDX-License-Identifier: Apache-2.0
"""Calibration: the ranges of all tensors, and each layer's error, on batches of real input."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ArgumentError, mismatch
from ..nn.quantized_steps import Dequantize, Quantize
from .observers import Observer
from .rewrite import Ranges, Scales, fake_layer
from .steps import LAYER, Flow, Step

Inputs = tuple[Any, ...]


def as_batches(batches: Iterable[Any], model: nn.Module) -> list[Inputs]:
    """Reads calibration batches: inputs, or what a data loader gives, with the labels behind.

    Args:
        batches: tensors, or tuples that begin with as many as the forward takes.
        model: the network.

    Raises:
        ArgumentError: there is none, or a batch has no tensor first.
    """
    single = isinstance(batches, Tensor)
    count = _arguments(model)
    found: list[Inputs] = []
    for batch in [batches] if single else batches:
        given = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        if not given or not isinstance(given[0], Tensor):
            raise ArgumentError(mismatch("calibration batch", type(batch).__name__, "a tensor"))
        found.append(tuple(t.detach() if isinstance(t, Tensor) else t for t in given[:count]))
    if not any(len(inputs[0]) for inputs in found):
        raise ArgumentError(
            mismatch(
                "calibration batches",
                f"{len(found)}, no image in them" if found else "none",
                "at least one",
                "A few hundred images of the kind that the network will see are plenty.",
            )
        )
    return [inputs for inputs in found if len(inputs[0])]


def _arguments(model: nn.Module) -> int:
    """Counts the arguments that the forward needs."""
    if isinstance(model, fx.GraphModule):
        return sum(n.op == "placeholder" for n in model.graph.nodes)
    needed = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return max(1, len(needed))


class _Watched(fx.Interpreter):
    """Runs a graph and shows each value, with those that it was made of."""

    def __init__(self, traced: fx.GraphModule, seen: Callable[[fx.Node, Any, Any], None]) -> None:
        super().__init__(traced, garbage_collect_values=False)
        self.seen = seen

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        result = super().run_node(n)
        self.seen(n, result, self.env)
        return result


@torch.no_grad()
def observe(
    traced: fx.GraphModule,
    steps: Mapping[fx.Node, Step],
    batches: Sequence[Inputs],
    make: Callable[[], Observer],
    dtype: torch.dtype,
) -> Ranges:
    """Finds the range of every tensor that a step reads or gives.

    Args:
        traced: the network in float.
        steps: its steps.
        batches: arguments of its forward.
        make: builds an observer.
        dtype: of the activations.

    Raises:
        ArgumentError: a number is NaN or infinite; the message names the tensor.
    """
    wanted = {*steps, *(operand for step in steps.values() for operand in step.inputs)}
    observers: dict[fx.Node, Observer] = {}

    def see(node: fx.Node, value: Any, env: Any) -> None:
        if node in wanted and isinstance(value, Tensor) and value.is_floating_point():
            try:
                observers.setdefault(node, make()).see(value)
            except ArgumentError as error:
                raise ArgumentError(f"{node.name}: {error}") from error

    def count(node: fx.Node, value: Any, env: Any) -> None:
        if node in observers and isinstance(value, Tensor):
            observers[node].count(value)

    _pass(traced, batches, see)
    if any(observer.counts for observer in observers.values()):
        _pass(traced, batches, count)
    return {node: observer.range(dtype) for node, observer in observers.items()}


@torch.no_grad()
def layer_errors(
    traced: fx.GraphModule, flow: Flow, scales: Scales, batches: Sequence[Inputs]
) -> tuple[dict[str, float], dict[str, str]]:
    """Measures what 8 bits cost each layer, on the inputs that it has in the float network.

    Args:
        traced: the network in float.
        flow: where integers flow.
        scales: of the tensors that become integers.
        batches: arguments of its forward.

    Returns:
        By layer the signal-to-quantisation-noise ratio in dB; and why a layer has no integer form.
    """
    layers: dict[fx.Node, nn.Module] = {}
    powers: dict[fx.Node, list[float]] = {}
    reasons: dict[str, str] = {}
    for node, step in flow.steps.items():
        if step.kind != LAYER:
            continue
        y = scales[node] if node in flow.quantized else None
        x, *others = (scales[i] for i in step.inputs)
        try:
            layer = fake_layer(step, x, y, others[0] if others else None).to_integer()
        except ArgumentError as error:
            reasons[step.name] = str(error)
            continue
        layers[node], powers[node] = layer, [0.0, 0.0]

    def compare(node: fx.Node, value: Any, env: Any) -> None:
        if node not in layers:
            return
        step = flow.steps[node]
        operands = [Quantize(scales[i])(env[i].float()) for i in step.inputs]
        result = layers[node](*operands)
        if result.dtype != torch.float32:
            result = Dequantize(scales[node])(result)
        powers[node][0] += float(value.double().square().sum())
        powers[node][1] += float((result.double() - value.double()).square().sum())

    _pass(traced, batches, compare)
    return {flow.steps[n].name: decibels(*powers[n]) for n in layers}, reasons


@torch.no_grad()
def output_error(before: nn.Module, after: nn.Module, batches: Sequence[Inputs]) -> float:
    """Returns the signal-to-quantisation-noise ratio of a network's outputs, in dB."""
    from torch.utils import _pytree as pytree

    signal = noise = 0.0
    for inputs in batches:
        truth = [t for t in pytree.tree_leaves(before(*inputs)) if isinstance(t, Tensor)]
        found = [t for t in pytree.tree_leaves(after(*inputs)) if isinstance(t, Tensor)]
        for true, result in zip(truth, found, strict=True):
            signal += float(true.double().square().sum())
            noise += float((result.double() - true.double()).square().sum())
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """Returns 10 · log10(signal / noise); infinite without noise, also without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _pass(
    traced: fx.GraphModule,
    batches: Sequence[Inputs],
    seen: Callable[[fx.Node, Any, Any], None],
) -> None:
    watched = _Watched(traced, seen)
    for inputs in batches:
        # What works in place must not change the batch for the next pass.
        watched.run(*(t.clone() if isinstance(t, Tensor) else t for t in inputs))
        watched.env.clear()
