# SPDX-License-Identifier: Apache-2.0
"""Native steps that compute nothing: copies in another memory format, padding, casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from .names import name_of
from .seen import Spec

try:
    from .. import _cpu
except ImportError:  # nothing is compiled here
    _cpu = None  # type: ignore[assignment]

_LAST, _ROWS = torch.channels_last, torch.contiguous_format
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

Made = tuple[Any, Sequence[fx.Node | None]]


# Puts elements into another order at most, by the order of the input's axes.
_ORDERED = (
    "flatten",
    "view",
    "reshape",
    "contiguous",
    "clone",
    "channels_last",
    "unflatten",
    "squeeze",
    "unsqueeze",
)


def native_copy(
    node: fx.Node, y: Spec, module: nn.Module | None, specs: dict[fx.Node, Spec]
) -> Made | None:
    """A copy in another memory format, as a reshape makes where no view will do."""
    if name_of(node) not in _ORDERED or len(specs) != 1:
        return None
    ((x, spec),) = specs.items()
    if node.args[:1] != (x,) or len(spec.shape) > 4 or y.storage == spec.storage:
        return None
    if y.dtype != spec.dtype or y.numel != spec.numel or spec.dtype.is_complex:
        return None
    if y.shape == spec.shape:
        strides = y.stride
    elif y.is_dense(_ROWS):  # as a tensor of the input's shape
        strides = torch.empty(spec.shape, device="meta").stride()
    else:
        return None
    fill = (1,) * (4 - len(spec.shape)), (0,) * (4 - len(spec.shape))
    four = (*fill[0], *spec.shape), (*fill[1], *spec.stride), (*fill[1], *strides)
    return _cpu.copy_step(y.dtype.itemsize, *four, torch.get_num_threads()), (x,)


def padded(
    node: fx.Node, y: Spec, module: nn.Module | None, specs: dict[fx.Node, Spec]
) -> Made | None:
    """Padding with one number, of a dense result; never cropping."""
    found = _padding(node, module)
    if found is None or len(specs) != 1 or node.all_input_nodes != list(node.args[:1]):
        return None
    ((x, spec),) = specs.items()
    pads, value = found
    rank = len(spec.shape)
    if min(pads, default=-1) < 0 or len(pads) % 2 or len(pads) > 2 * rank or rank > 4:
        return None
    if y.dtype != spec.dtype or not any(y.is_dense(layout) for layout in (_ROWS, _LAST)):
        return None
    before = (0,) * (rank - len(pads) // 2) + tuple(reversed(pads[::2]))
    first = sum(b * s for b, s in zip(before, y.stride, strict=True))
    number = torch.tensor(value, dtype=y.dtype).view(-1).view(torch.uint8)
    ones, zeros = (1,) * (4 - rank), (0,) * (4 - rank)
    four = (*ones, *spec.shape), (*zeros, *spec.stride), (*zeros, *y.stride)
    counts = y.numel, first, bytes(number.tolist())
    return _cpu.pad_step(y.dtype.itemsize, *four, *counts, torch.get_num_threads()), (x,)


def _padding(node: fx.Node, module: nn.Module | None) -> tuple[Sequence[int], float] | None:
    """Returns the pads of a step that pads with one number, the last axis first, and the number."""
    pads: Any
    value: Any
    if module is not None:
        if is_padding(module):
            pads, value = module.pads, module.x.zero_point  # type: ignore[union-attr]
        elif isinstance(module, nn.ZeroPad2d):
            pads, value = module.padding, 0.0
        else:
            return None
    elif name_of(node) in ("pad", "constant_pad_nd"):
        given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False))
        if name_of(node) == "constant_pad_nd":
            given = dict(zip(("input", "pad", "value"), node.args, strict=False))
        given |= node.kwargs
        if given.get("mode", "constant") != "constant":
            return None
        pads, value = given.get("pad"), given.get("value") or 0.0
    else:
        return None
    if not isinstance(pads, list | tuple) or not all(type(p) is int for p in pads):
        return None
    return (tuple(pads), value) if isinstance(value, int | float) else None


def cast(
    node: fx.Node, y: Spec, module: nn.Module | None, specs: dict[fx.Node, Spec]
) -> Made | None:
    """From float32 to bfloat16, or back."""
    if name_of(node) not in ("to", "float", "bfloat16", "_to_copy") or len(specs) != 1:
        return None
    ((x, spec),) = specs.items()
    same = y.shape == spec.shape and any(
        y.is_dense(layout) and spec.is_dense(layout) for layout in (_ROWS, _LAST)
    )
    dtypes = {spec.dtype, y.dtype}
    if node.args[:1] != (x,) or not same or dtypes != set(_NAMES):
        return None
    names = _NAMES[spec.dtype], _NAMES[y.dtype]
    return _cpu.cast_step(*names, y.numel, torch.get_num_threads()), (x,)


def is_padding(module: nn.Module | None) -> bool:
    """Tells whether a module is this package's padding of quantised images."""
    from ..nn import QuantizedPad

    return type(module) is QuantizedPad
