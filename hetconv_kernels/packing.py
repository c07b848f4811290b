# SPDX-License-Identifier: Apache-2.0
"""Weights on their way to an engine: masks on devices, dense forms, packed slabs, and their cache.

The ops take the canonical weight in one of two forms: dense [F, C, KH, KW] (for a 1×1 kernel also
[F, C]), whose dead entries may hold anything; or the live entries alone in the Support's order
(row-major over the mask), as a vector [live] or, for an equal grouping, in ``nn.Conv2d``'s shape
[F, C/g, KH, KW], which lists them in just that order. What an engine
derives from it is private to the engine and kept only while the weight is unchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .observers import untraced
from .plan import Plan
from .problem import is_dense_shape
from .support import Support


def bits_on(support: Support, device: torch.device) -> Tensor:
    """Returns the bit-packed mask, the form in which a Support crosses an operator.

    # uint8 [F, ceil(C·KH·KW/8)]
    """
    bits = support.derived.get(device)
    if bits is None:
        bits = _constant(support.bits, device)
        # A fake one, made under a tracer's mode, is for that call only.
        if type(bits) is Tensor:
            support.derived[device] = bits
    return bits


def mask_on(
    support: Support,
    device: torch.device,
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Returns the Support's mask on a device, made once.  # bool [F, C, KH, KW]"""
    key = ("mask", device, layout)
    mask = support.derived.get(key)
    if mask is None:
        mask = _constant(support.mask, device).contiguous(memory_format=layout)
        if type(mask) is Tensor:
            support.derived[key] = mask
    return mask


def _constant(array: object, device: torch.device) -> Tensor:
    # Outside inference mode and JIT traces, so that the tensor can be used anywhere later.
    with torch.inference_mode(False), untraced():
        return torch.as_tensor(np.array(array), device=device)


def dense_weight(support: Support, w: Tensor, dtype: torch.dtype) -> Tensor:
    """Expands a canonical weight to dense, dead entries zero whatever they held (NaN too).

    Args:
        support: which weights exist.
        w: canonical weight.  # [F, C, KH, KW] or [live]
        dtype: of the result.

    Returns:
        A new tensor, a dense weight's in its layout.  # [F, C, KH, KW]
    """
    if is_dense_shape(support, w.shape):
        w = w.view(support.shape)
        return torch.where(_mask_like(support, w), w.to(dtype), 0.0)
    mask = mask_on(support, w.device)
    return torch.zeros(mask.shape, dtype=dtype, device=w.device).masked_scatter_(mask, w.to(dtype))


def _mask_like(support: Support, w: Tensor) -> Tensor:
    """Returns the mask in the layout of a dense weight, so that one pass reads both in order."""
    last = not w.is_contiguous() and w.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return mask_on(support, w.device, layout)


def live_weight(support: Support, w: Tensor) -> Tensor:
    """Gathers the live vector of a dense weight, in Support order.  # [live]"""
    mask = mask_on(support, w.device)
    return w.view(mask.shape)[mask]


def own_blocks(w: Tensor, groups: int) -> Tensor:
    """Takes each group's own channels out of a dense weight: ``nn.Conv2d``'s grouped weight.

    # [F, C, KH, KW] -> [F, C/g, KH, KW]
    """
    f, c, kh, kw = w.shape
    blocks = w.view(groups, f // groups, groups, c // groups, kh, kw)
    index = torch.arange(groups, device=w.device)
    return blocks[index, :, index].reshape(f, c // groups, kh, kw)


def pack_slabs(plan: Plan, w: Tensor) -> Tensor:
    """Packs a dense weight into the slabs of a Plan, zero where a slab has no live weight.

    Args:
        plan: the lowering; slab s of a step is [channels of the run, filters of the block].
        w: dense weight; dead entries are ignored.  # [F, C, KH, KW]

    Returns:
        The slabs one after another.  # [plan.slab_size]
    """
    source = torch.as_tensor(plan.slab_source, device=w.device)
    flat = w.contiguous().view(-1)[source.clamp(min=0)]
    return flat.masked_fill(source < 0, 0)


# Fused optimisers, and those that write through ``.data``, change a weight and not its version.
_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class _Entry(NamedTuple):
    owner: weakref.ref[Tensor]
    stamp: tuple[int, int, int]
    value: Any


class _PerWeight:
    """Remembers one value for each weight, for as long as the weight is unchanged.

    Unchanged means the same tensor object, storage address and in-place version and, if it is
    trainable, no step of any optimiser since. Any other write through ``weight.data`` goes unseen,
    as it does for autograd.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def _recall(self, w: Tensor) -> Any:
        entry = self._entries.get(id(w))
        if entry is not None and entry.owner() is w and entry.stamp == _stamp(w):
            return entry.value
        return None

    def _remember(self, w: Tensor, value: Any) -> None:
        if w.is_inference():  # no version to tell changes by
            return
        key = id(w)
        owner = weakref.ref(w, lambda _: self._entries.pop(key, None))
        self._entries[key] = _Entry(owner, _stamp(w), value)


def _stamp(w: Tensor) -> tuple[int, int, int]:
    return w._version, w.data_ptr(), _optimizer_steps if w.requires_grad else 0


class FrozenCache(_PerWeight):
    """Keeps what an engine derives from a frozen weight, the live vector that `freeze` leaves.

    Trainable weights are derived anew at each call: their writers (optimisers, averaging, FSDP) do
    not always leave a trace, and a stale copy would be silently wrong.

    Args:
        build: makes the derived value from a weight; not a view of it, which would keep it alive.
    """

    def __init__(self, build: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._build = build

    def __call__(self, w: Tensor) -> Any:
        """Returns the derived value of w."""
        if w.dim() != 1 or w.requires_grad:
            return self._build(w)
        value = self._recall(w)
        if value is None:
            value = self._build(w)
            if not (w.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._remember(w, value)
        return value


class CleanCheck(_PerWeight):
    """Knows which dense weights already are zero at every dead entry, and can be used as they are.

    Layers keep their weights so, and optimisers, averaging and sharding preserve it. What is kept
    is a verdict and not a copy: nothing goes stale but the verdict itself. Asking a GPU costs a
    synchronisation, so there it is asked only of a weight that is met for the third time.

    Args:
        support: which entries are live.
    """

    def __init__(self, support: Support) -> None:
        super().__init__()
        self._support = support

    def __call__(self, w: Tensor) -> bool:
        """Tells whether the dense weight w can be used without masking."""
        seen: int | bool | None = self._recall(w)
        if isinstance(seen, bool):
            return seen
        met = (seen or 0) + 1
        if w.is_cuda and (met < 3 or torch.cuda.is_current_stream_capturing()):
            self._remember(w, met)
            return False
        dense = w.detach().view(self._support.shape)
        # 1 > 0 where a weight that is not zero stands at a dead entry.
        clean = not bool((dense.ne(0) > _mask_like(self._support, dense)).any())
        self._remember(w, clean)
        return clean
