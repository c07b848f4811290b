# SPDX-License-Identifier: Apache-2.0
"""Finds what of a traced network can be computed in 8 bits, and decides where integers flow.

Three kinds of steps have an integer form. *Layers* (convolutions, fully connected) are what 8 bits
are for. *Light* steps (sums, averages, activations of their own) are computed in integers where
something integer comes in. *Moves* (max-pooling, padding, flattening, concatenation, slices)
compute nothing: they keep integers where a later step wants them. All else is computed in float,
between a conversion to float and one back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import ArgumentError
from ..graph.alias import changed_in_place
from ..graph.fold import _activation, _is_sum, _pool
from ..graph.names import module_of, name_of
from ..nn import AveragePool, FusedConv2d, SupportLinear
from ..pooling import Pool
from .scheme import bounds

LAYER, LIGHT, MOVE = "layer", "light", "move"
_CLAMPS = ("relu", "relu6")
_FREE_MOVES = frozenset(
    ("flatten", "view", "reshape", "getitem", "slice", "select", "narrow", "squeeze", "unsqueeze",
     "permute", "transpose", "chunk", "split", "split_with_sizes", "contiguous", "clone", "detach",
     "channels_last")
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One thing that can be computed in 8 bits.

    Attributes:
        node: whose value it gives.
        what: ``"conv"``, ``"linear"``, ``"add"``, ``"mean"``, ``"act"``, ``"max_pool"``,
            ``"pad"``, ``"cat"`` or ``"move"``.
        kind: `LAYER`, `LIGHT` or `MOVE`.
        inputs: the tensors that it reads.
        source: the node of the layer or operation; another than ``node`` where an activation after
            it is part of it.
        act: that activation.
        pool: the windows of a max-pooling.
        size: height and width that an average has, in pixels.
        keepdim: whether an average is still an image.
        pads: of a padding.
    """

    node: fx.Node
    what: str
    kind: str
    inputs: tuple[fx.Node, ...]
    source: fx.Node
    act: str = "none"
    pool: Pool | None = None
    size: tuple[int, int] = (1, 1)
    keepdim: bool = True
    pads: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The layer's name, or that of the operation."""
        target = self.source.target
        return str(target) if self.source.op == "call_module" else self.source.name


@dataclass(frozen=True)
class Flow:
    """Where integers flow.

    Attributes:
        steps: those computed in integers, by the node of their value.
        quantized: those of them whose value is integers, not float32.
        inside: nodes that became part of a step.
    """

    steps: dict[fx.Node, Step]
    quantized: frozenset[fx.Node]
    inside: frozenset[fx.Node]


def find_steps(traced: fx.GraphModule) -> tuple[dict[fx.Node, Step], dict[str, str]]:
    """Finds the steps of a network that `optimize` made, and why other layers are none.

    Args:
        traced: with the shapes of its values in the nodes' ``meta``.

    Returns:
        The steps by the node of their value, in order; and by layer the reason that completes
        "in float because …".
    """
    steps: dict[fx.Node, Step] = {}
    reasons: dict[str, str] = {}
    changed = changed_in_place(traced.graph)
    for node in traced.graph.nodes:
        step, reason = _step(node)
        if reason:
            reasons[str(node.target)] = reason
        if step is None or (step.kind != LAYER and node in changed):
            continue  # integers would be copies, which do not change with what they are of
        still = changed.isdisjoint(step.inputs)
        if step.what in ("linear", "add") and len(node.users) == 1 and still:
            (user,) = node.users
            act = _activation(user)
            if act in _CLAMPS and user not in changed:
                step = Step(user, step.what, step.kind, step.inputs, node, act)
        elif step.what == "act" and node in steps:
            continue  # it is part of the step before
        steps[step.node] = step
    return steps, reasons


def _step(node: fx.Node) -> tuple[Step | None, str]:
    """Returns the step that begins at a node, or the reason why a layer is none."""
    module, name = module_of(node), name_of(node)
    inputs = tuple(a for a in node.args if isinstance(a, fx.Node))
    if isinstance(module, FusedConv2d):
        reason = _why_not(module)
        if reason:
            return None, reason
        return Step(node, "conv", LAYER, inputs, node, module.act, module.pool), ""
    if isinstance(module, SupportLinear):
        reason = _why_not(module)
        return (None, reason) if reason else (Step(node, "linear", LAYER, inputs, node), "")
    if isinstance(module, nn.Conv2d | nn.Linear) or hasattr(module, "support"):
        return None, f"a {type(module).__name__} could not be fused"
    if not inputs and name not in ("cat", "concat"):
        return None, ""
    return _operation(node, module, name, inputs), ""


def _why_not(module: FusedConv2d | SupportLinear) -> str:
    if module.weight.dtype != torch.float32:
        return f"its weights are {module.weight.dtype}"
    if isinstance(module, FusedConv2d):
        try:
            bounds(module.act)
        except ArgumentError:
            return f"its activation {module.act} is no clamp"
    return ""


def _operation(
    node: fx.Node, module: nn.Module | None, name: str, inputs: tuple[fx.Node, ...]
) -> Step | None:
    if name == "add" and len(inputs) == 2 and _is_sum(node, inputs[0]):
        return Step(node, "add", LIGHT, inputs, node)
    if name in ("cat", "concat"):
        operands = node.args[0]
        if isinstance(operands, list | tuple) and all(isinstance(o, fx.Node) for o in operands):
            return Step(node, "cat", MOVE, tuple(operands), node)  # type: ignore[arg-type]
        return None
    if not inputs or inputs[0] is not node.args[0]:
        return None
    if _activation(node) in _CLAMPS:
        return Step(node, "act", LIGHT, inputs[:1], node, _activation(node) or "none")
    pool = _pool(node)
    if pool is not None:
        return Step(node, "max_pool", MOVE, inputs[:1], node, pool=pool)
    if name in ("adaptive_avg_pool2d", "mean"):
        return _average(node, module, name, inputs)
    if name in ("pad", "constant_pad_nd"):
        pads = _zero_pads(node, module)
        return Step(node, "pad", MOVE, inputs[:1], node, pads=pads) if pads else None
    if name in _FREE_MOVES and not _is_view_of_bits(node):
        return Step(node, "move", MOVE, inputs[:1], node)
    return None


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _average(
    node: fx.Node, module: nn.Module | None, name: str, inputs: tuple[fx.Node, ...]
) -> Step | None:
    shape = inputs[0].meta.get("shape", ())
    if len(shape) != 4:
        return None
    if isinstance(module, AveragePool) and not module.keepdim:
        return Step(node, "mean", LIGHT, inputs[:1], node, keepdim=False)
    if name == "mean":
        dims = _argument(node, 1, "dim")
        known = isinstance(dims, list | tuple) and all(isinstance(d, int) for d in dims)
        if not known or sorted(d % 4 for d in dims) != [2, 3] or node.kwargs.get("dtype"):
            return None
        keep = bool(_argument(node, 2, "keepdim", False))
        return Step(node, "mean", LIGHT, inputs[:1], node, keepdim=keep)
    size = getattr(module, "output_size", None) or _argument(node, 1, "output_size")
    pair = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(pair) != 2 or not all(isinstance(s, int) for s in pair):
        return None
    # To several pixels it keeps the input's Scale, as a move does.
    kind = LIGHT if pair == (1, 1) else MOVE
    return Step(node, "mean", kind, inputs[:1], node, size=pair)


def _zero_pads(node: fx.Node, module: nn.Module | None) -> tuple[int, ...]:
    if isinstance(module, nn.ZeroPad2d):
        return tuple(module.padding)
    if module is not None:
        return ()
    aten = name_of(node) == "constant_pad_nd"
    value = _argument(node, 2 if aten else 3, "value", 0)
    mode = "constant" if aten else _argument(node, 2, "mode", "constant")
    pads = _argument(node, 1, "pad", ())
    plain = isinstance(pads, list | tuple) and all(isinstance(p, int) for p in pads)
    return tuple(pads) if mode == "constant" and not value and plain else ()


def _is_view_of_bits(node: fx.Node) -> bool:
    """Tells a view with another dtype from one with another shape."""
    return any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))


def is_tuple(node: fx.Node) -> bool:
    """Tells a node that gives several tensors from one that gives one."""
    shape: tuple[object, ...] = node.meta.get("shape") or ()
    return bool(shape) and isinstance(shape[0], tuple)


# Flow -------------------------------------------------------------------------------------------


def decide(traced: fx.GraphModule, steps: dict[fx.Node, Step], floats: Iterable[str]) -> Flow:
    """Decides which steps are computed in integers and which of their values stay so.

    Args:
        traced: the network.
        steps: what `find_steps` found.
        floats: names of layers that stay in float.
    """
    left, changed = set(floats), changed_in_place(traced.graph)
    able: set[fx.Node] = set()
    for node, step in steps.items():
        sources = [i in able for i in step.inputs]
        chosen = step.name not in left if step.kind == LAYER else any(sources)
        # A tuple of integers has readers that know what to do with it, or is none.
        if chosen and (not is_tuple(node) or all(user in steps for user in node.users)):
            able.add(node)
    runs: set[fx.Node] = set()
    readers: dict[fx.Node, list[Step]] = {}
    for step in steps.values():
        for operand in step.inputs:
            readers.setdefault(operand, []).append(step)
    quantized: set[fx.Node] = set()
    for node in reversed(list(steps)):
        step = steps[node]
        wanted = any(reader.node in runs for reader in readers.get(node, ()))
        if node in able and (step.kind != MOVE or wanted):
            runs.add(node)
            if wanted and node not in changed:
                quantized.add(node)
    for node in list(quantized):
        # The parts of a tuple of integers are integers, whoever reads them.
        if is_tuple(node):
            parts = {reader.node for reader in readers[node]}
            runs |= parts
            quantized |= parts
    inside = {steps[n].source for n in runs if steps[n].source is not n}
    ordered = {node: step for node, step in steps.items() if node in runs}
    return Flow(ordered, frozenset(quantized), frozenset(inside))
