# SPDX-License-Identifier: Apache-2.0
"""order: rearranges the channels inside a network so that the groups of its layers are contiguous.

Filters of a layer can stand in any order if normalisation, and the channels of every layer that
reads them, follow. A permutation so moves through activations, pooling, residual sums (whose
operands move together), concatenations and flattening, and nothing is left of it at run time: no
gather, only weights in another order. Input and output keep theirs.

Example: two HetConv layers with interleaved groups of p=2 on four channels. Filters 0, 2 of the
first are one group and 1, 3 the other; the order (0, 2, 1, 3) makes both runs, for the filters of
the first layer and for the channels of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import fx, nn

from ..masks import IntArray
from ..support import Support
from .channels import Channels, is_depthwise
from .layout import relayout
from .names import describe_node


class Reordered(NamedTuple):
    """One set of channels that was put in another order.

    Attributes:
        layers: the layers that make them.
        channels: how many.
        runs: runs of equal filters and equal channels in the layers around, before and after.
    """

    layers: tuple[str, ...]
    channels: int
    runs: tuple[int, int]


@dataclass
class _Space:
    """Channels that are permuted together.

    Attributes:
        classes: of the channels, in their present order.
        makers: the layers whose filters they are.
        readers: the layers that read them, with the place of their first and how many features
            each of them is there.
        order: the new order.
    """

    classes: IntArray
    makers: list[fx.Node]
    readers: list[tuple[fx.Node, int, int]]
    order: IntArray


def order(channels: Channels) -> tuple[dict[str, nn.Module], tuple[Reordered, ...]]:
    """Rearranges a traced network in place.

    Args:
        channels: its channels.

    Returns:
        The modules that were replaced, by name, and what was put in another order.
    """
    spaces, blocks = _spaces(channels)
    masks = {node: _compressed(layer.support) for node, layer in channels.layers.items()}
    done = []
    for space in spaces:
        before, after = _improve(space, masks)
        if after < before:
            makers = tuple(describe_node(node) for node in space.makers)
            done.append(Reordered(makers, len(space.order), (before, after)))
    if not done:
        return {}, ()
    layout = {node: _layout(blocks[node]) for node in channels.wires}
    replaced, _ = relayout(channels, layout, {})
    return replaced, tuple(done)


class _Block(NamedTuple):
    """A run of a value's channels: a space, each of its channels `width` features long."""

    space: _Space | None
    start: int
    size: int
    width: int


def _spaces(channels: Channels) -> tuple[list[_Space], dict[fx.Node, list[_Block]]]:
    """Finds the sets of channels that can be permuted, and where they are in every value."""
    by_class: dict[int, _Space] = {}
    spaces: list[_Space] = []
    alias = channels.through_depthwise()
    frozen = {int(alias[number]) for number in (*channels.frozen, *channels.bound())}
    broken: set[int] = set()
    for node in channels.layers:
        classes = alias[channels.of(node)]
        known = by_class.get(int(classes[0]))
        if known is not None and np.array_equal(known.classes, classes):
            known.makers.append(node)
            continue
        free = not any(int(c) in frozen or int(c) in by_class for c in classes)
        if free and len(np.unique(classes)) == len(classes):
            space = _Space(classes, [node], [], np.arange(len(classes)))
            spaces.append(space)
            by_class |= dict.fromkeys(classes.tolist(), space)
    blocks = {node: _blocks(alias[channels.of(node)], by_class, broken) for node in channels.wires}
    for node, layer in channels.layers.items():
        if (layer.support.uniform_groups or 1) > 1 and not is_depthwise(layer.support):
            both = (*blocks[node], *blocks[channels.reader(node)])  # its groups are in order
            broken.update(id(block.space) for block in both)
    movable = [space for space in spaces if id(space) not in broken]
    for node in blocks:
        blocks[node] = [
            block._replace(space=None) if id(block.space) in broken else block
            for block in blocks[node]
        ]
    for node in channels.layers:
        for block in blocks[channels.reader(node)]:
            if block.space is not None:
                block.space.readers.append((node, block.start, block.width))
    return movable, blocks


def _blocks(classes: IntArray, by_class: dict[int, _Space], broken: set[int]) -> list[_Block]:
    """Cuts a value's channels into whole spaces; a space that is there in part is broken."""
    found, start = [], 0
    while start < len(classes):
        space = by_class.get(int(classes[start]))
        if space is None:
            found.append(_Block(None, start, 1, 1))
            start += 1
            continue
        width = int((classes[start:] == classes[start]).argmin()) or len(classes) - start
        whole = np.repeat(space.classes, width)
        if np.array_equal(classes[start : start + len(whole)], whole):
            found.append(_Block(space, start, len(whole), width))
            start += len(whole)
        else:
            broken.add(id(space))
            found.append(_Block(space, start, 1, 1))
            start += 1
    return found


def _layout(blocks: Sequence[_Block]) -> IntArray:
    """Returns the new order of a value's channels."""
    parts = []
    for block in blocks:
        if block.space is None:
            parts.append(np.arange(block.start, block.start + block.size))
        else:
            features = block.space.order[:, None] * block.width + np.arange(block.width)
            parts.append(block.start + features.reshape(-1))
    return np.concatenate(parts) if parts else np.arange(0)


class _Mask(NamedTuple):
    """A mask by its groups.

    Attributes:
        labels: the group of each filter.  # int [F]
        columns: for each channel a number that is equal where the groups read it alike.  # [C]
        reads: what each group reads of each channel, as a number.  # int [groups, C]
    """

    labels: IntArray
    columns: IntArray
    reads: IntArray


def _compressed(support: Support) -> _Mask | None:
    """Describes a mask by its groups; None where there is nothing to put in order."""
    groups = support.groups
    if support.uniform_groups is not None or len(groups) == support.filters:
        return None  # in order as it is, or irregular: no two filters are alike
    labels = np.empty(support.filters, np.int64)
    for number, group in enumerate(groups):
        labels[group.filters] = number
    taps = np.stack([g.mask.reshape(support.channels, -1) for g in groups])  # [groups, C, taps]
    flat = taps.reshape(-1, taps.shape[2])
    kinds = np.unique(flat, axis=0, return_inverse=True)[1].reshape(len(groups), -1)
    _, first, columns = np.unique(kinds.T, axis=0, return_index=True, return_inverse=True)
    # Numbered in the order in which they come, like the groups of filters.
    return _Mask(labels, np.argsort(np.argsort(first))[columns.reshape(-1)], kinds)


def _runs(values: IntArray) -> int:
    return int((np.diff(values, axis=-1) != 0).sum()) + 1


def _cost(space: _Space, masks: dict[fx.Node, _Mask | None]) -> int:
    """Counts the runs of equal filters and channels in the layers around a space."""
    total = 0
    for node in space.makers:
        mask = masks[node]
        if mask is not None:
            total += _runs(mask.labels[space.order])
    for node, start, width in space.readers:
        mask = masks[node]
        if mask is not None:
            features = start + (space.order[:, None] * width + np.arange(width)).reshape(-1)
            total += sum(_runs(row[features]) for row in mask.reads)
    return total


def _improve(space: _Space, masks: dict[fx.Node, _Mask | None]) -> tuple[int, int]:
    """Tries orders that make the groups of the makers, or of the readers, contiguous.

    Returns:
        The runs before and after.
    """
    made = [mask.labels for node in space.makers if (mask := masks[node]) is not None]
    read = [
        mask.columns[start : start + len(space.order) * width : width]
        for node, start, width in space.readers
        if (mask := masks[node]) is not None
    ]
    before = least = _cost(space, masks)
    best = space.order
    for keys in (made + read, read + made, made, read):
        if not keys:
            continue
        space.order = np.lexsort(keys[::-1])
        cost = _cost(space, masks)
        if cost < least:
            best, least = space.order, cost
    space.order = best
    return before, least
