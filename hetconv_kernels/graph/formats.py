# SPDX-License-Identifier: Apache-2.0
"""Memory formats of a traced network: channels_last inside, the caller's outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..nn.base import ForcedBackend
from ..observers import transforms_active

_LAST = torch.channels_last


def channels_last(x: Any) -> Any:
    """Copies images into channels_last. A transform of ``torch.func`` keeps the images it has."""
    if isinstance(x, fx.Proxy):  # the graph is traced again
        return x.tracer.create_proxy("call_function", channels_last, (x,), {})
    if not torch.compiler.is_compiling() and transforms_active():
        return x
    if x.layout != torch.strided:  # the layers refuse it in their own words
        return x
    return x.clone(memory_format=_LAST)


def into_channels_last(traced: fx.GraphModule, inputs: Sequence[Any]) -> tuple[str, ...]:
    """Has images brought into channels_last as they come in, in place.

    There the engine on a CPU reads and writes whole vectors of channels; otherwise it turns each
    activation.

    Args:
        traced: the network.
        inputs: of its forward; those that are in channels_last stay as they are.

    Returns:
        The names of the inputs that are brought in, those that were before too.
    """
    brought = []
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for node, x in zip(placeholders, inputs, strict=False):
        if not _is_image_elsewhere(x):
            continue
        brought.append(node.name)
        if node.users and all(user.target is channels_last for user in node.users):
            continue
        with traced.graph.inserting_after(placeholders[-1]):
            new = traced.graph.call_function(channels_last, (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    if brought:
        _reshape(traced)
        traced.recompile()
    return tuple(brought)


def pay(traced: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Tells whether another memory format of an image is worth it: for our layers on a CPU."""
    layers = any(isinstance(module, ForcedBackend) for module in traced.modules())
    on_cpu = all(x.device.type == "cpu" for x in inputs if isinstance(x, Tensor))
    return layers and on_cpu and any(map(_is_image_elsewhere, inputs))


def _is_image_elsewhere(x: Any) -> bool:
    """Tells whether something is an image that is not in channels_last."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        return False
    # By the strides, which PyTorch goes by where there is one channel.
    return x.stride() != torch.empty_like(x, memory_format=_LAST).stride()


def keep_outputs(traced: fx.GraphModule, before: Any, after: Any) -> None:
    """Has outputs contiguous where the original's are, in place.

    Args:
        traced: the network.
        before: the outputs of the original.
        after: those of the network as it is.
    """
    (output,) = (n for n in traced.graph.nodes if n.op == "output")
    nodes, form = pytree.tree_flatten(output.args[0])
    for place, (old, new) in enumerate(
        zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
    ):
        tensors = isinstance(old, Tensor) and isinstance(new, Tensor)
        if tensors and old.is_contiguous() and not new.is_contiguous():
            with traced.graph.inserting_before(output):
                nodes[place] = traced.graph.call_method("contiguous", (nodes[place],))
    output.args = (pytree.tree_unflatten(nodes, form),)
    traced.recompile()


def _reshape(traced: fx.GraphModule) -> None:
    """Makes views reshapings: of an image in channels_last they may be copies."""
    for node in traced.graph.nodes:
        if (
            node.op == "call_method"
            and node.target == "view"
            and all(isinstance(a, int | fx.Node | tuple | list) for a in node.args)
        ):
            node.target = "reshape"
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
