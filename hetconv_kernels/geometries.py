# SPDX-License-Identifier: Apache-2.0
"""Geometries that no layer holds: those of functional calls and of operators, bounded by bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, BackendError, mismatch
from .operands import check_ints
from .problem import Geometry
from .support import Support, find_support, support_from_bits

# A prepared call: its Problem, the engine's callable and the signature that it is found by.
_CHOICE_BYTES = 6 * 2**10
# What is measured is measured anew when so many have come.
_EVERY = 16


class GeometryCache:
    """Keeps the geometries used last, and so their Supports and what engines made of them.

    Plans of an engine, packed weights and prepared calls are worth keeping for who describes a
    convolution anew at each call; they are not worth any amount of memory.

    Args:
        max_bytes: what all of them may hold, about; the oldest go beyond that, but for the last.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, Geometry] = OrderedDict()
        self._added = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Geometry | None:
        """Returns the Geometry of that key, if it is kept."""
        geometry = self._kept.get(key)
        if geometry is not None:
            try:
                self._kept.move_to_end(key)
            except KeyError:  # another thread has just dropped it
                return geometry
        return geometry

    def add(self, key: Hashable, geometry: Geometry) -> None:
        """Keeps a Geometry, and drops the oldest where they hold too much."""
        self._kept[key] = geometry
        self._added += 1
        # A single one may be large: then they are measured each time.
        if self._added % _EVERY == 0 or footprint(geometry.support) * _EVERY > self.max_bytes:
            self._shrink()

    def geometries(self) -> list[Geometry]:
        """Lists what is kept, the oldest first."""
        return list(self._kept.values())

    def clear(self) -> None:
        """Drops all."""
        for key in list(self._kept):
            self._drop(key)

    def bytes(self) -> int:
        """Counts what is kept, about; what several geometries share counts once."""
        shared: dict[int, int] = {}
        for geometry in self.geometries():
            support = geometry.support
            shared[id(support.derived)] = footprint(support)
            shared[id(geometry.derived)] = _size(dict(geometry.derived), support)
            shared[id(geometry)] = len(geometry.choices) * _CHOICE_BYTES
        return sum(shared.values())

    def _shrink(self) -> None:
        while len(self._kept) > 1 and self.bytes() > self.max_bytes:
            # A quarter at a time: they are counted again after that.
            for key in list(self._kept)[: max(1, len(self._kept) // 4)]:
                self._drop(key)

    def _drop(self, key: Hashable) -> None:
        geometry = self._kept.pop(key, None)
        if geometry is not None:
            # Prepared calls refer to their geometry: nothing would go before a garbage collection.
            geometry.choices.clear()


def footprint(support: Support) -> int:
    """Estimates the bytes of a Support and of all that was derived from it alone."""
    return int(support.bits.nbytes) + _size(dict(support.derived), support)


def _size(value: Any, support: Support) -> int:
    if isinstance(value, torch.Tensor | np.ndarray):
        return int(value.nbytes)
    if isinstance(value, dict):
        return sum(_size(each, support) for each in list(value.values()))
    if isinstance(value, tuple | list):
        return sum(_size(each, support) for each in value)
    if type(value).__module__.endswith("._cpu"):
        return _plan_bytes(support)
    held = getattr(value, "kept_bytes", None)
    return 1024 + (held() if held is not None else 0)


def _plan_bytes(support: Support) -> int:
    """Estimates an engine's lowering: a mask of bytes, which lanes live, and lists of columns."""
    columns = sum(int(group.mask.sum()) for group in support.groups)
    return 2 * int(np.prod(support.shape)) + 16 * columns


# Those of operators: compiled and exported programs, as large as a network.
_of_operators = GeometryCache(max_bytes=256 * 2**20)


def geometry_of(bits: Tensor, ints: Sequence[int], frozen: bool = False) -> Geometry:
    """Returns the Geometry that an operator's integers name.

    Args:
        bits: the bit-packed mask.  # uint8 [F, ceil(C·KH·KW/8)]
        ints: what `Geometry.ints` lists.
        frozen: whether the weight is a frozen layer's.

    Raises:
        BackendError: the Support is unknown here and would have to be read during CUDA-graph
            capture.
        ArgumentError: integers out of range, or the mask does not have the digest or the columns
            that they carry.
    """
    key = frozen, tuple(ints[2:])
    geometry = _of_operators.get(key)
    if geometry is None:
        named = check_ints(ints)
        support = find_support(named.digest) or _read_support(bits, named.columns)
        if support.digest != named.digest:
            raise ArgumentError(
                mismatch("digest of the support tensor", support.digest, named.digest)
            )
        if support.shape[1:] != named.columns:
            raise ArgumentError(
                mismatch("channels and kernel in geometry", named.columns, support.shape[1:])
            )
        geometry = Geometry(support, named.stride, named.pads, named.dilation, frozen)
        _of_operators.add(key, geometry)
    return geometry


def _read_support(bits: Tensor, columns: tuple[int, int, int]) -> Support:
    if bits.is_cuda and torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "a Support is met for the first time while a CUDA graph is captured; expected it to "
            "be known. Run hetconv_kernels.warmup(model, example) before the capture."
        )
    return support_from_bits(bits.cpu().numpy(), columns)
