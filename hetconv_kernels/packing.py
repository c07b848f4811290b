# SPDX-License-Identifier: Apache-2.0
"""Weights on their way to an engine: masks on devices, dense forms, and a cache of packed ones.

The ops take the canonical weight in one of two forms: dense [F, C, KH, KW] (for a 1×1 kernel also
[F, C]), whose dead entries may hold anything; or the live entries alone in the Support's order
(row-major over the mask), as a vector [live] or, for an equal grouping, in ``nn.Conv2d``'s shape
[F, C/g, KH, KW], which lists them in just that order. What an engine
derives from it is private to the engine and kept only while the weight is unchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from . import masking
from .observers import transforms_active, untraced
from .problem import is_dense_shape
from .support import Support

__all__ = ["dense_weight", "watched_packings"]


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
        if w.dim() != 4:
            w = w.view(support.shape)
        if w.dtype is not dtype:
            w = w.to(dtype)
        return masked(support, w)
    mask = mask_on(support, w.device)
    return torch.zeros(mask.shape, dtype=dtype, device=w.device).masked_scatter_(mask, w.to(dtype))


# From so many elements on ``torch.where`` takes several times as long as an AND of integers.
_MANY = 2**14
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ZEROS: dict[torch.dtype, Tensor] = {}


def masked(
    support: Support,
    dense: Tensor,
    brief: bool = False,
    layout: torch.memory_format | None = None,
) -> Tensor:
    """Returns a copy of a dense tensor whose dead entries are zero, whatever they hold (NaN too).

    Args:
        support: which entries live.
        dense: of that shape.  # [F, C, KH, KW]
        brief: whether an engine asks, inside a call, for a copy that it reads at once and then
            forgets: it may lie in memory that the thread's next such copy is written to.
        layout: the copy's memory format where that costs no other pass; None for the tensor's own.
    """
    plain = type(dense) in (Tensor, Parameter)
    if plain and dense.is_cpu and (brief or masking.unobserved(dense)):
        key = "masked", dense.stride(), dense.dtype, layout
        native = support.derived.get(key)
        if native is None:  # False: it is none of the engine's
            native = support.derived[key] = _native_mask(support, dense, layout)
        if native:
            copy: Tensor = native(dense, brief)
            return copy
    bits = _INTEGERS.get(dense.element_size())
    if (
        not plain
        or bits is None
        or dense.numel() < _MANY
        or (dense.requires_grad and torch.is_grad_enabled())
        or transforms_active()
    ):
        zero = _zero(dense.dtype) if plain and dense.is_cpu else 0.0
        return torch.where(_mask_like(support, dense), dense, zero)
    return torch.bitwise_and(dense.view(bits), _mask_like(support, dense, bits)).view(dense.dtype)


def _native_mask(
    support: Support, dense: Tensor, layout: torch.memory_format | None
) -> masking.NativeMask | Literal[False]:
    """Prepares the engine's masking of tensors in one layout; False where it is none of its."""
    if not masking.can_mask(dense):
        return False
    transposed = layout is torch.channels_last and masking.transposes(dense)
    with torch.inference_mode(False), torch.no_grad(), untraced():
        like = masking.room(dense, transposed)
        return masking.NativeMask(_mask_like(support, like), like.stride(), dense, transposed)


def mask_(support: Support, dense: Tensor) -> Tensor:
    """Makes the dead entries of a dense tensor that nobody else holds zero, in place."""
    bits = _INTEGERS.get(dense.element_size())
    if type(dense) is not Tensor or bits is None:
        return torch.where(_mask_like(support, dense), dense, 0.0)
    key = "masked", dense.stride(), dense.dtype, None
    native = support.derived.get(key)
    if native is None:
        native = support.derived[key] = _native_mask(support, dense, None)
    if native and dense.is_cpu:
        native.mask(dense, dense)
    else:
        dense.view(bits).bitwise_and_(_mask_like(support, dense, bits))
    return dense


def _zero(dtype: torch.dtype) -> Tensor:
    """Returns a zero on the CPU; ``torch.where`` would make one at each call."""
    zero = _ZEROS.get(dtype)
    if zero is None:
        with torch.inference_mode(False), untraced():
            zero = torch.zeros((), dtype=dtype)
        if type(zero) is Tensor:
            _ZEROS[dtype] = zero
    return zero


def _mask_like(support: Support, w: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    """Returns the mask in the layout of a dense weight, so that one pass reads both in order.

    Integers have all bits where a weight exists.
    """
    last = not w.is_contiguous() and w.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    if dtype is torch.bool:
        return mask_on(support, w.device, layout)
    key = ("mask", w.device, layout, dtype)
    mask: Tensor | None = support.derived.get(key)
    if mask is None:
        with torch.inference_mode(False), torch.no_grad(), untraced():
            mask = mask_on(support, w.device, layout).to(dtype).neg_()
        if type(mask) is Tensor:
            support.derived[key] = mask
    return mask


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


class PackEvent(NamedTuple):
    """One packing of a weight while `watched_packings`.

    Attributes:
        engine: what asked for it.
        seconds: that it took.
    """

    engine: str
    seconds: float


# Those who watch; none of them outside of `explain`, `profile` and tests.
_watchers: list[list[PackEvent]] = []


@contextmanager
def watched_packings() -> Iterator[list[PackEvent]]:
    """Lists what is packed meanwhile, by all threads: weights brought into an engine's own form."""
    seen: list[PackEvent] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers[:] = [others for others in _watchers if others is not seen]


class Pack:
    """Derives an engine's form of a weight, at each call.

    Args:
        build: makes the derived value from a weight; not a view of it, which would keep it alive.
        engine: whose form it is.
    """

    def __init__(self, build: Callable[[Tensor], Any], engine: str) -> None:
        self._build, self._engine = build, engine

    def __call__(self, w: Tensor) -> Any:
        """Returns the derived value of w."""
        if not _watchers:
            return self._build(w)
        from .measure.timing import clock  # not needed to import the package

        now = clock(w.device)
        began = now()
        value = self._build(w)
        one = PackEvent(self._engine, now() - began)
        for seen in _watchers:
            seen.append(one)
        return value


class Stamp(NamedTuple):
    """What identifies a tensor and its contents, as far as PyTorch tells; see `FrozenCache`."""

    storage: weakref.ref[torch.UntypedStorage]
    tensor: int
    version: int
    address: int

    @classmethod
    def of(cls, w: Tensor, gone: Callable[[Any], None] | None = None) -> Stamp:
        """Stamps a tensor that is no inference tensor; `gone` is called when its memory goes."""
        return cls(weakref.ref(w.untyped_storage(), gone), w._cdata, w._version, w.data_ptr())

    def holds(self, w: Tensor) -> bool:
        """Tells whether a tensor is still the one that was stamped, and unchanged."""
        # In this order: an inference tensor, which has no version, is another tensor.
        return (
            self.tensor == w._cdata
            and self.storage() is w.untyped_storage()
            and self.address == w.data_ptr()
            and self.version == w._version
        )


class _Entry(NamedTuple):
    stamp: Stamp
    value: Any


class FrozenCache(Pack):
    """Keeps what an engine derives from the weight of a frozen layer while that is unchanged.

    Unchanged means the same tensor on the same storage, at the same place in it and of the same
    in-place version. The storage is known by itself, not by its address, which the allocator gives
    to others; nothing refers to the tensor (``torch.utils.swap_tensors`` would refuse it), and what
    is kept goes with the storage. Not seen are writes into that storage which leave no version:
    through ``.data``, NumPy, or another tensor that shares the memory but not the version.

    A weight that is trained, and an inference tensor, which has no version, are derived anew at
    each call: a stale copy would be silently wrong. Frozen layers have neither (`owned`).
    """

    def __init__(self, build: Callable[[Tensor], Any], engine: str) -> None:
        super().__init__(build, engine)
        # By address: one for each place in memory, however many tensors there were on it.
        self._entries: dict[int, _Entry] = {}

    def __call__(self, w: Tensor) -> Any:
        """Returns the derived value of w."""
        value = self.recall(w)
        if value is None:
            value = super().__call__(w)
            if not (
                w.requires_grad
                or w.is_inference()
                or (w.is_cuda and torch.cuda.is_current_stream_capturing())
            ):
                self._remember(w, value)
        return value

    def recall(self, w: Tensor) -> Any:
        """Returns what is kept of w, None if nothing is."""
        entry = self._entries.get(w.data_ptr())
        if entry is not None and not w.requires_grad and entry.stamp.holds(w):
            return entry.value
        return None

    def forget(self, w: Tensor) -> None:
        """Drops what is kept of the memory that w has."""
        self._entries.pop(w.data_ptr(), None)

    def kept_bytes(self) -> int:
        """Counts the bytes of what is kept, as far as it tells."""
        return sum(
            int(getattr(entry.value, "nbytes", getattr(entry.value, "bytes", 0)) or 0)
            for entry in list(self._entries.values())
        )

    def _remember(self, w: Tensor, value: Any) -> None:
        key, entries = w.data_ptr(), self._entries

        def gone(reference: weakref.ref[torch.UntypedStorage]) -> None:
            entry = entries.get(key)
            if entry is not None and entry.stamp.storage is reference:
                del entries[key]

        entries[key] = _Entry(Stamp.of(w, gone), value)


def owned(w: Tensor) -> Tensor:
    """Returns a frozen weight as a tensor whose changes show: a copy of an inference tensor.

    Networks that were made, moved or copied under ``torch.inference_mode()`` have inference
    tensors, which have no version; no packed form of them could be kept.
    """
    if not w.is_inference() or w.is_meta:
        return w
    with torch.inference_mode(False), torch.no_grad():
        return w.clone(memory_format=torch.preserve_format)


def forget(support: Support, w: Tensor) -> None:
    """Drops what engines keep of a weight, after a write that leaves no trace."""
    for cache in frozen_caches(support):
        cache.forget(w)


def frozen_caches(support: Support) -> list[Any]:
    """Lists what keeps packed weights of a Support's frozen layers, in all their geometries."""
    stores: list[Mapping[Any, Any]] = [support.derived]
    stores += [each for value in support.derived.values() if isinstance(value, WeakValueDictionary)
               for each in value.values()]  # fmt: skip
    return [value for store in stores for value in list(store.values()) if hasattr(value, "forget")]
