# SPDX-License-Identifier: Apache-2.0
"""Runs the steps of a graph on the numbers of channels, which says where each channel goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..masks import IntArray
from .names import module_of


def call(node: fx.Node, values: dict[fx.Node, Tensor]) -> Any:
    """Calls what a node calls, on other values of some of its operands."""

    def value(operand: fx.Node) -> Any:
        if operand in values:
            return values[operand].clone()  # what works in place must not write to a view
        return operand.meta["value"]

    args: Any = fx.map_arg(node.args, value)
    kwargs: Any = fx.map_arg(node.kwargs, value)
    module = module_of(node)
    if module is not None:
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def numbered(numbers: IntArray, shape: tuple[int, ...]) -> Tensor:
    """Paints each channel with its number.  # [N, C] or [N, C, H, W]"""
    column = torch.as_tensor(numbers, dtype=torch.int32)
    return column.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)


def numbers_of(images: Tensor) -> IntArray | None:
    """Reads the number of each channel back; None where they are not one to a channel."""
    if images.dim() not in (2, 4):
        return None
    first = images[(slice(0, 1), slice(None), *[slice(0, 1)] * (images.dim() - 2))]
    if not torch.equal(first.expand_as(images), images):
        return None
    return first.flatten().numpy().astype(np.int64)
