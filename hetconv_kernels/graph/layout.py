# SPDX-License-Identifier: Apache-2.0
"""Gives the values of a traced network other channels: fewer of them, or in another order.

A *layout* says for each node which of its channels stay, in their new order. Layers and
normalisations are replaced by ones of these channels; moves that count channels are said anew.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..masks import IntArray
from .names import module_of, name_of
from .take import take_group_norm, take_norm

if TYPE_CHECKING:
    from .channel_walk import Move
    from .channels import Channels

Layout = Mapping[fx.Node, IntArray]


class NodeCall(NamedTuple):
    """What a node is to call instead."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def relayout(
    channels: Channels, layout: Layout, shifts: Mapping[fx.Node, Tensor]
) -> tuple[dict[str, nn.Module], bool]:
    """Changes a traced network in place.

    Args:
        channels: its channels.
        layout: for each node with channels, which stay.  # int [C']
        shifts: what is added to the biases of layers.  # float64 [F]

    Returns:
        The modules that were replaced, by name, and whether anything but modules changed.
    """
    traced = channels.traced
    replaced: dict[str, nn.Module] = {}
    for node, layer in channels.layers.items():
        read = layout[channels.reader(node)]
        new = layer.take(layout[node], read, shifts.get(node))
        if new is not layer.module:
            replaced[str(node.target)] = new
    for node, norm in channels.norms.items():
        smaller = take_norm(norm, layout[channels.reader(node)])
        if smaller is not norm:
            replaced[str(node.target)] = smaller
    for node, grouped in channels.group_norms.items():
        fewer = take_group_norm(grouped, layout[channels.reader(node)])
        if fewer is not grouped:
            replaced[str(node.target)] = fewer
    changed = False
    for node, move in channels.moves.items():
        results = () if move.parts else (node,)
        if all(_unchanged(layout[n], channels.wires[n]) for n in (*move.operands, *results)):
            continue
        out = None if move.parts else layout[node]
        said = adapted(node, move, [layout[n] for n in move.operands], out)
        assert said is not None, f"{node} was not frozen"
        if said == NodeCall(node.target, node.args, dict(node.kwargs)):
            continue
        changed = True
        with traced.graph.inserting_before(node):
            node.replace_all_uses_with(traced.graph.call_function(*said))
        traced.graph.erase_node(node)
    for name, module in replaced.items():
        set_module(traced, name, module)
    traced.recompile()
    return replaced, changed


def _unchanged(order: IntArray, channels: IntArray) -> bool:
    return np.array_equal(order, np.arange(len(channels)))


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of a name."""
    parent, _, key = name.rpartition(".")
    setattr(root.get_submodule(parent), key, module)


def adapted(
    node: fx.Node, move: Move, kept: Sequence[IntArray], out: IntArray | None
) -> NodeCall | None:
    """Says a move for the channels that are kept of its operands; None if there is no way.

    Args:
        node: the move.
        move: where it takes its channels from.
        kept: for each operand, the channels that stay, in their new order.
        out: those of the result; None where it is several.
    """
    name, same = name_of(node), NodeCall(node.target, node.args, dict(node.kwargs))
    if name in ("cat", "concat"):
        return same if _argument(node, 1, "dim", 0) in (1, 1 - _rank(node)) else None
    source = node.args[0]
    if name == "flatten":
        module = module_of(node)
        if isinstance(module, nn.Flatten):
            return same if (module.start_dim, module.end_dim) == (1, -1) else None
        return same if _argument(node, 1, "start_dim", 0) == 1 else None
    if name in ("view", "reshape"):
        return _reshaped(node, source, same)
    if name in ("chunk", "split", "split_with_sizes"):
        return _split(node, move, source, kept[0])
    if name in ("getitem", "slice"):
        return _sliced(node, move, source, kept[0], same)
    if name in ("pad", "constant_pad_nd"):
        assert out is not None
        return _padded(node, move, source, out, same)
    whole = np.array_equal(move.source[0], np.arange(len(move.source[0])))
    return same if whole and name in ("permute", "transpose", "squeeze", "unsqueeze") else None


def _rank(node: fx.Node) -> int:
    return len(node.meta["shape"])


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _reshaped(node: fx.Node, source: Any, same: NodeCall) -> NodeCall | None:
    """A view as [N, C·H·W] is a flattening; one as [N, C, 1, 1] adds dimensions."""
    shape, before = node.meta["shape"], source.meta["shape"]
    sizes = node.args[1:] or tuple(node.kwargs.values())
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    if len(shape) == 2 and shape[0] == before[0]:
        free = len(sizes) == 2 and sizes[1] == -1
        return same if free else NodeCall(torch.flatten, (source, 1), {})
    if len(before) == 2 and shape == (*before, 1, 1):
        every = slice(None)
        return NodeCall(operator.getitem, (source, (every, every, None, None)), {})
    return None


def _counts(parts: Sequence[IntArray], kept: IntArray) -> list[int]:
    return [int(np.isin(kept, part).sum()) for part in parts]


def _split(node: fx.Node, move: Move, source: Any, kept: IntArray) -> NodeCall | None:
    whole = np.concatenate(move.source)
    if not np.array_equal(whole, np.arange(len(whole))):
        return None
    return NodeCall(torch.split, (source, _counts(move.source, kept), 1), {})


def _sliced(
    node: fx.Node, move: Move, source: Any, kept: IntArray, same: NodeCall
) -> NodeCall | None:
    read = move.source[0]
    if not np.array_equal(read, np.arange(read[0], read[0] + len(read))):
        return None
    start, stop = int((kept < read[0]).sum()), int((kept <= read[-1]).sum())
    if name_of(node) == "slice":
        dim = _argument(node, 1, "dim", 0)
        if dim not in (1, 1 - _rank(node)):
            return same
        return NodeCall(node.target, (source, 1, start, stop), {})
    index = node.args[1]
    if not isinstance(index, tuple):
        return same
    if any(part is Ellipsis or part is None for part in index[:2]):
        return None
    if len(index) < 2 or index[1] == slice(None):
        return same
    places = (index[0], slice(start, stop), *index[2:])
    return NodeCall(operator.getitem, (source, places), {})


def _padded(
    node: fx.Node, move: Move, source: Any, out: IntArray, same: NodeCall
) -> NodeCall | None:
    """Zeros in front of and behind the channels: as many as stay of them."""
    read = move.source[0]
    pads = list(_argument(node, 1, "pad", ()))
    own = np.flatnonzero(read >= 0)
    if len(pads) != 6 or not np.array_equal(read[own], np.arange(len(own))):
        return None
    pads[4:] = [int((out < own[0]).sum()), int((out > own[-1]).sum())]
    if len(node.args) > 1:
        return NodeCall(node.target, (source, pads, *node.args[2:]), same.kwargs)
    return NodeCall(node.target, (source,), same.kwargs | {"pad": pads})
