# SPDX-License-Identifier: Apache-2.0
"""What is noted of a network's steps while they are recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import Parameter

from ..observers import observed

_LAST, _ROWS = torch.channels_last, torch.contiguous_format


def describe_arguments(
    args: Sequence[Any], takes: Callable[[torch.device], bool]
) -> tuple[list[Any], bool] | None:
    """Describes a call's arguments by what its plan or its graph depends on.

    Args:
        args: tensors, numbers, strings and None.
        takes: tells whether a tensor may be on a device.

    Returns:
        Shape, strides and dtype of each tensor, type and value of the others, and whether one
        requires a gradient. None for containers, and for tensors that are elsewhere, not strided or
        observed.
    """
    parts: list[Any] = []
    wants_gradient = False
    for value in args:
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or not takes(value.device) or observed(value):
                return None
            parts.append((value.shape, value.stride(), value.dtype))
            wants_gradient |= value.requires_grad
        elif isinstance(value, int | float | str | bool | None):
            parts.append((type(value), value))
        else:
            return None
    return parts, wants_gradient


class Spec(NamedTuple):
    """A tensor as it was recorded.

    Attributes:
        shape: its sizes.
        stride: its strides, in elements.
        dtype: of its elements.
        storage: the number of its storage.
        offset: where it begins in that, in bytes.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    offset: int

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The bytes of its elements."""
        return self.numel * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """From its first element to its last, in elements."""
        if not self.numel:
            return 0
        return 1 + sum(s * (n - 1) for s, n in zip(self.stride, self.shape, strict=True))

    @property
    def memory_format(self) -> torch.memory_format | None:
        """The format that ``torch.empty`` makes the same strides of; None where there is none."""
        for layout in (_ROWS, _LAST) if len(self.shape) == 4 else (_ROWS,):
            like = torch.empty(self.shape, device="meta", memory_format=layout)
            if like.stride() == self.stride:
                return layout
        return None

    def is_dense(self, layout: torch.memory_format) -> bool:
        """Tells whether its elements lie side by side in the order of a format."""
        if layout == _LAST and len(self.shape) != 4:
            return False
        like = torch.empty_strided(self.shape, self.stride, device="meta")
        return like.is_contiguous(memory_format=layout)

    def fits(self, value: Any) -> bool:
        """Tells whether a value can be read as this tensor was."""
        return (
            type(value) in (Tensor, Parameter)
            and value.shape == self.shape
            and value.stride() == self.stride
            and value.dtype is self.dtype
            and value.is_cpu
            and value.layout is torch.strided
            and not value.is_neg()
        )


class Operand(NamedTuple):
    """What a native step reads or writes: the value of a step of the graph; None: nothing."""

    step: fx.Node | None
    spec: Spec | None


class Seen(NamedTuple):
    """One step of the graph as it was recorded.

    Attributes:
        node: the step.
        specs: of the tensors in its value, None for other leaves, as `pytree` lists them.
        structure: of the value, for `pytree`.
        made: the number of the storage that it made, -1 if none.
        calls: of the engine: steps, and the operands of each, None where one is not known.
    """

    node: fx.Node
    specs: tuple[Spec | None, ...]
    structure: Any
    made: int
    calls: tuple[tuple[Any, tuple[Operand | None, ...]], ...]

    @property
    def spec(self) -> Spec | None:
        """The tensor that is its value; None where that is something else."""
        return self.specs[0] if self.structure.is_leaf() else None
