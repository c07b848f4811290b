# SPDX-License-Identifier: Apache-2.0
"""Which results of a program lie in planes (NCHW), though they were recorded in channels_last.

A 1×1 layer of few filters a group computes with pixels in vectors: it turns its input to planes of
pixels, and its sums back. Nobody else sees what lies in the arena of a program, so a result may lie
in planes where that leaves fewer elements to turn. The numbers are the same, bit for bit: a layer
adds in one order, wherever its operands lie.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import fx

from .seen import Operand, Seen, Spec

Bindable = tuple[int, Any, tuple[Operand, ...]]  # number of the graph's step, native step

# Pixels of a plane that fill vectors well: of one image, and of each of several.
_ENOUGH, _ENOUGH_EACH = 16, 128


class _Layer(NamedTuple):
    """A native step that may be given operands in planes."""

    lying: str
    x: Spec
    residual: Spec | None
    y: Spec


def in_planes(
    record: Sequence[Seen], steps: Sequence[Bindable], inner: Set[int]
) -> tuple[dict[int, Any], set[int]]:
    """Chooses what lies in planes.

    A layer reads its residual as it writes its result, so those that are added lie alike.

    Args:
        record: of all steps of the graph.
        steps: the native ones.
        inner: the storages of the arena that are not returned.

    Returns:
        The native steps that change, by number of the graph's step, and the storages in planes.
    """
    layers = {n: layer for n, step, operands in steps if (layer := _layer(step, operands))}
    free = _free(record, layers, inner)
    gains = dict.fromkeys(free, 0)  # elements that need not be turned
    for layer in layers.values():
        gain = {"planes": 1, "pixels": -1}.get(layer.lying, 0)
        for spec in (layer.x, layer.y):
            if spec.storage in gains:
                gains[spec.storage] += gain * spec.numel
    chosen: set[int] = set()
    for alike in _alike(layers):
        if alike <= free and sum(gains[storage] for storage in alike) > 0:
            chosen |= alike
    relaid = {}
    for number, step, _ in steps:
        if number in layers:
            _, x, residual, y = layers[number]
            which = [s is not None and s.storage in chosen for s in (x, residual, y)]
            if any(which):
                n, _, height, width = x.shape
                relaid[number] = step.in_planes(which, (n, height, width))
    return relaid, chosen


def _layer(step: Any, operands: Sequence[Operand]) -> _Layer | None:
    """Returns a step that may be given planes; None: not this one, or not these operands."""
    if step.lying == "fixed":
        return None
    x, *between, y = (operand.spec for operand in operands)
    (residual,) = between or (None,)
    if any(spec is not None and not _is_image(spec) for spec in (x, residual, y)):
        return None
    return None if x is None or y is None else _Layer(step.lying, x, residual, y)


def _is_image(spec: Spec) -> bool:
    return spec.offset == 0 and spec.is_dense(torch.channels_last)


def _free(record: Sequence[Seen], layers: dict[int, _Layer], inner: Set[int]) -> set[int]:
    """Finds the storages that such layers write, and nothing but such layers reads."""
    numbers = {seen.node: i for i, seen in enumerate(record)}
    holders: dict[int, list[fx.Node]] = {}
    for seen in record:
        for spec in seen.specs:
            if spec is not None:
                holders.setdefault(spec.storage, []).append(seen.node)
    found = set()
    for number, layer in layers.items():
        storage, node = layer.y.storage, record[number].node
        read = all(numbers[user] in layers for user in node.users)
        if storage in inner and holders[storage] == [node] and read and _fills(layer.y.shape):
            found.add(storage)
    return found


def _fills(shape: Sequence[int]) -> bool:
    images, _, height, width = shape
    return height * width >= (_ENOUGH if images == 1 else _ENOUGH_EACH)


def _alike(layers: dict[int, _Layer]) -> list[set[int]]:
    """Lists the storages that have to lie alike, since they are added."""
    sets: list[set[int]] = []
    for layer in layers.values():
        own = {spec.storage for spec in (layer.residual, layer.y) if spec is not None}
        sets = [s for s in sets if not s & own] + [own.union(*(s for s in sets if s & own))]
    return sets
