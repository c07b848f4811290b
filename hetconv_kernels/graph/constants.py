# SPDX-License-Identifier: Apache-2.0
"""Which channels of a network are constant, whatever the input, and what their value is.

A filter without weights gives its bias at every pixel; normalisation and activation make another
constant of it. Zero padding is where this ends: a constant that is not zero, padded with zeros,
is no constant any more, so what a padded layer makes of it varies at the border.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from ..masks import BoolArray, IntArray
from .alias import is_after
from .channels import Channels
from .names import module_of
from .numbered import call
from .take import LayerMatrix, Norm


class ConstantChannels(NamedTuple):
    """The constant channels of a value.

    Attributes:
        known: which channels are constant.  # bool [C]
        value: what they hold, zero where they vary.  # float64 [C]
    """

    known: BoolArray
    value: npt.NDArray[np.float64]

    def take(self, source: IntArray) -> ConstantChannels:
        """Follows a move; the number -1 is a channel of zeros."""
        zeros = source < 0
        place = np.where(zeros, 0, source)
        return ConstantChannels(self.known[place] | zeros, np.where(zeros, 0.0, self.value[place]))


def constants(channels: Channels) -> dict[fx.Node, ConstantChannels]:
    """Finds the constant channels of every node's value.

    Args:
        channels: of a traced network in evaluation mode.
    """
    found: dict[fx.Node, ConstantChannels] = {}
    parts: dict[fx.Node, tuple[ConstantChannels, ...]] = {}
    for node in channels.traced.graph.nodes:
        if is_after(node) and (node in channels.wires or node.args[0] in parts):
            if node.args[0] in parts:
                owner = found[node.args[1]]
                move = channels.moves[_tuple(node.args[0])]
                parts[node] = tuple(owner.take(source) for source in move.source)
            else:
                found[node] = _after(channels, node, found)
        elif node in channels.layers:
            found[node] = _layer(channels.layers[node], found[channels.reader(node)])
        elif node in channels.norms:
            found[node] = _norm(channels.norms[node], found[channels.reader(node)])
        elif node in channels.channelwise:
            operands = [n for n in node.all_input_nodes if n in channels.wires]
            found[node] = _channelwise(node, {n: found[n] for n in operands})
        elif node in channels.moves:
            move = channels.moves[node]
            read = [found[n] for n in move.operands]
            whole = ConstantChannels(
                *(np.concatenate(arrays) for arrays in zip(*read, strict=True))
            )
            taken = tuple(whole.take(source) for source in move.source)
            if move.parts:
                parts[node] = taken
            else:
                found[node] = taken[0]
        elif node in channels.wires:
            operand = node.args[0] if node.args else None
            if isinstance(operand, fx.Node) and operand in parts:
                found[node] = parts[operand][node.args[1]]
            else:
                found[node] = _varying(len(channels.wires[node]))
    return found


def _tuple(node: Any) -> fx.Node:
    return _tuple(node.args[0]) if is_after(node) else node


def _after(
    channels: Channels, node: fx.Node, found: dict[fx.Node, ConstantChannels]
) -> ConstantChannels:
    """Finds the constants of a tensor after a change in its memory."""
    tensor: Any = node.args[0]
    varying = _varying(len(channels.wires[node]))
    if len(node.args) == 2:  # another view: what the owner has there now
        _, source = channels.source(tensor)
        owner = found.get(node.args[1])  # type: ignore[arg-type]
        return varying if source is None or owner is None else owner.take(source)
    result, view = node.args[1:]
    _, source = channels.source(view)  # type: ignore[arg-type]
    change = found.get(result)  # type: ignore[arg-type]
    if source is None or change is None or len(change.known) != len(source):
        return varying
    known, value = found[tensor].known.copy(), found[tensor].value.copy()
    pixels = math.prod(_size(tensor)) // len(known)
    seen = math.prod(_size(view)) // len(source)  # type: ignore[arg-type]
    for channel in np.unique(source):
        places = np.flatnonzero(source == channel)
        values = change.value[places]
        even = bool(change.known[places].all() and (values == values[0]).all())
        whole = seen * len(places) == pixels
        if even and whole:
            known[channel], value[channel] = True, values[0]
        elif not (even and known[channel] and value[channel] == values[0]):
            known[channel], value[channel] = False, 0.0
    return ConstantChannels(known, value)


def foldable(layer: LayerMatrix, constant: ConstantChannels) -> BoolArray:
    """Tells which channels can leave a layer: their part of its result is a constant.  # [C]"""
    value = constant.value
    finite = np.isfinite(value)
    return constant.known & finite & ((value == 0) | (not layer.padded))


def constant_shift(layer: LayerMatrix, constant: ConstantChannels, away: IntArray) -> Tensor | None:
    """Returns what constant channels add to each filter; None if nothing.  # float64 [F]"""
    away = away[constant.value[away] != 0]
    if not len(away):
        return None
    values = torch.as_tensor(constant.value[away])
    sums = layer.sums(away)
    shift = sums @ values.to(sums.device)
    return shift if bool(shift.ne(0).any()) else None


def _varying(count: int) -> ConstantChannels:
    return ConstantChannels(np.zeros(count, bool), np.zeros(count))


def _layer(layer: LayerMatrix, source: ConstantChannels) -> ConstantChannels:
    folds = foldable(layer, source)
    known: BoolArray = ~layer.reads[:, ~folds].any(axis=1)  # type: ignore[assignment]
    if not known.any():
        return _varying(layer.filters)
    value = np.zeros(layer.filters) if layer.bias is None else _array(layer.bias)
    shift = constant_shift(layer, source, np.flatnonzero(folds))
    if shift is not None:
        value = value + _array(shift)
    return ConstantChannels(known, np.where(known, value, 0.0))


def _norm(norm: Norm, source: ConstantChannels) -> ConstantChannels:
    mean, variance = _array(norm.running_mean), _array(norm.running_var)
    value = (source.value - mean) / np.sqrt(variance + norm.eps)
    if norm.weight is not None:
        value = value * _array(norm.weight) + _array(norm.bias)
    return ConstantChannels(source.known, np.where(source.known, value, 0.0))


def _channelwise(node: fx.Node, operands: dict[fx.Node, ConstantChannels]) -> ConstantChannels:
    """Runs the node on images of the constants and looks what comes out."""
    known = np.logical_and.reduce([c.known for c in operands.values()])
    if not known.any():
        return _varying(len(known))
    images: dict[fx.Node, Any] = {}
    module = module_of(node)
    own = None if module is None else next(module.parameters(), None)  # that of a PReLU
    for operand, constant in operands.items():
        image = torch.as_tensor(constant.value).view(1, -1, *[1] * (len(_size(operand)) - 2))
        image = image if own is None else image.to(own)
        images[operand] = image.expand(1, -1, *_size(operand)[2:])
    result = call(node, images).detach().cpu()
    pixels = result.reshape(*result.shape[:2], -1)
    first, even = pixels[0, :, 0], (pixels == pixels[:, :, :1]).all(2)[0]
    known = known & even.numpy()
    return ConstantChannels(known, np.where(known, first.double().numpy(), 0.0))


def _size(node: fx.Node) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta["shape"]
    return shape


def _array(tensor: Tensor | None) -> npt.NDArray[np.float64]:
    assert tensor is not None
    found: npt.NDArray[np.float64] = tensor.detach().double().cpu().numpy()
    return found
