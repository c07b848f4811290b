# SPDX-License-Identifier: Apache-2.0
"""lift: a torch.export program with its layers made modules again."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..nn.conv import SupportConv2d
from ..nn.fused import FusedConv2d

_Kinds = tuple[type[nn.Module], ...]
# For each operator the modules that call it with their own parameters and nothing around it.
_LAYERS: dict[str, _Kinds] = {
    "aten::conv2d": (nn.Conv2d,),
    "aten::batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d),
    "aten::linear": (nn.Linear,),
    "hetconv::fprop": (SupportConv2d, FusedConv2d),
}


def lift(model: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    """Exports a network and replaces the operators of its layers by calls of those layers.

    Args:
        model: the network.
        inputs: arguments of its forward; sizes but the first (the batch) are fixed to theirs.

    Raises:
        TypeError: an input is no tensor.
        Whatever torch.export and the network's own code raise.
    """
    if not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError("its inputs are not all tensors")
    free_batch = tuple({0: torch.export.Dim.AUTO} if x.dim() else {} for x in inputs)
    # Where it fails, torch prints all of the graph so far: for a detector that is a megabyte.
    with contextlib.redirect_stderr(io.StringIO()) as said:
        program = torch.export.export(model, inputs, dynamic_shapes=free_batch)
    sys.stderr.write(said.getvalue())
    traced: fx.GraphModule = program.module(check_guards=False)
    modules: dict[str, Any] = {}
    for node in traced.graph.nodes:
        owner = _owner(model, node)
        if owner is None:
            continue
        residual = node.args[5] if "fprop" in str(node.target) else None
        modules[owner] = model.get_submodule(owner)
        # A fused layer's forward may end with pooling, an operator of its own here.
        pooled = getattr(modules[owner], "pool", None) is not None
        last = next(iter(node.users)) if pooled else node
        with traced.graph.inserting_before(last):
            data = (node.args[0],) if residual is None else (node.args[0], residual)
            last.replace_all_uses_with(traced.graph.call_module(owner, data))
    traced.graph.eliminate_dead_code()
    # What is left of the exported tensors may have names below a layer's: they get names apart.
    for place, node in enumerate(n for n in traced.graph.nodes if n.op == "get_attr"):
        path, _, key = str(node.target).rpartition(".")
        node.target = f"_constant_{place}"
        modules[node.target] = getattr(traced.get_submodule(path), key)
    # A plain graph: the exported one takes its outputs apart and its code puts them together.
    graph = fx.Graph()
    leaves = graph.graph_copy(traced.graph, {})
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    graph.output(pytree.tree_unflatten(list(leaves), out_spec))  # type: ignore[arg-type]
    return fx.GraphModule(modules, graph)


def _owner(model: nn.Module, node: fx.Node) -> str | None:
    """Names the layer whose whole forward an operator is; None where there is no such layer."""
    kinds = _LAYERS.get(_schema(node.target))
    if kinds is None or not isinstance(node.args[1], fx.Node) or node.args[1].op != "get_attr":
        return None
    name, _, parameter = str(node.args[1].target).rpartition(".")
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    if type(module) not in kinds and not isinstance(module, SupportConv2d | FusedConv2d):
        return None
    if not name or parameter != "weight" or getattr(module, "padding_mode", "zeros") != "zeros":
        return None
    others = [a for a in node.args[2:] if isinstance(a, fx.Node) and a.op == "get_attr"]
    names = [str(a.target) for a in others]
    constants = [n for n in names if "lifted_tensor" in n]
    own = {f"{name}.{key}" for key in (*module._parameters, *module._buffers)}
    return name if set(names) <= own | set(constants) else None


def _schema(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return "" if schema is None else str(schema.name)
