# SPDX-License-Identifier: Apache-2.0
"""group_norm: group normalisations of other packages are steps of one kind in a graph.

timm's ``GroupNormAct`` is an ``nn.GroupNorm`` whose forward calls the function and an activation. A
tracer goes through it, and its groups are known no more; put back as a module, whole groups of
channels can leave it as they leave an ``nn.GroupNorm``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from .copying import copied
from .layout import set_module


def lift_group_norms(traced: fx.GraphModule, model: nn.Module) -> None:
    """Puts an ``nn.GroupNorm`` in the place of each call of the function with its parameters.

    Args:
        traced: a graph of the network; it is changed.
        model: the network.
    """
    for node in list(traced.graph.nodes):
        name = _owner(node, model)
        if name is None:
            continue
        owner: Any = model.get_submodule(name)
        plain = nn.GroupNorm(owner.num_groups, owner.num_channels, owner.eps, device="meta")
        plain.weight, plain.bias = owner.weight, owner.bias
        plain.train(owner.training)
        # What else the owner calls, such as its activation, keeps its name below it.
        for key, child in traced.get_submodule(name).named_children():
            plain.add_module(key, child)
        set_module(traced, name, plain)
        with traced.graph.inserting_before(node):
            node.replace_all_uses_with(traced.graph.call_module(name, (node.args[0],)))
        traced.graph.erase_node(node)
        for parameter in ("weight", "bias"):
            _erase_unread(traced, f"{name}.{parameter}")
    traced.recompile()


def of_class(old: nn.Module, new: nn.Module) -> nn.Module:
    """Gives a group normalisation the class that it has in the network.

    Args:
        old: what stands in the network.
        new: what stands in its place in the graph; returned, where the old one is nothing more.
    """
    if type(new) is not nn.GroupNorm or type(old) is nn.GroupNorm:
        return new
    assert isinstance(old, nn.GroupNorm)
    twin = copied(old)
    twin.num_groups, twin.num_channels = new.num_groups, new.num_channels
    twin.weight, twin.bias = new.weight, new.bias
    return twin


def _owner(node: fx.Node, model: nn.Module) -> str | None:
    """Names the group normalisation whose function a node calls; None where it is no such call."""
    if node.op != "call_function" or node.target is not F.group_norm:
        return None
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), node.args, strict=False))
    given |= node.kwargs
    weight, bias = given.get("weight"), given.get("bias")
    if not isinstance(weight, fx.Node) or not isinstance(bias, fx.Node) or not node.args:
        return None
    name = str(weight.target).removesuffix(".weight")
    read = [n.target for n in (weight, bias) if n.op == "get_attr"]
    if read != [f"{name}.weight", f"{name}.bias"]:
        return None
    owner = model.get_submodule(name)
    if not isinstance(owner, nn.GroupNorm) or owner.num_groups != given.get("num_groups"):
        return None
    return name if owner.eps == given.get("eps", 1e-5) else None


def _erase_unread(traced: fx.GraphModule, target: str) -> None:
    for node in list(traced.graph.nodes):
        if node.op == "get_attr" and node.target == target and not node.users:
            traced.graph.erase_node(node)
