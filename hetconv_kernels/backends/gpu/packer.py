# SPDX-License-Identifier: Apache-2.0
"""Packing on a GPU: canonical weights brought into the order of an engine's slabs at each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...packing import FrozenCache, Pack
from ...problem import is_dense_shape
from ...support import Support
from .capture import DeviceTables, capturing, pin, upload


class Packer:
    """Packs canonical weights into the slabs of a lowering; keeps those of a frozen weight.

    Args:
        support: the layer's.
        source: lists, for ``"contiguous"``, ``"channels_last"`` or ``"live"`` weights, where each
            element of the slabs lies in their memory; -1 is a zero.
        start: launches the kernel: (w, source, slabs) -> None.
        device: where the weights are.
        dtype: of the slabs.
        engine: which engine's slabs.
    """

    def __init__(
        self,
        support: Support,
        source: Callable[[str], Any],
        start: Callable[[Tensor, Tensor, Tensor], None],
        device: torch.device,
        dtype: torch.dtype,
        engine: str,
    ) -> None:
        self._support, self._source, self._start = support, source, start
        self._device, self._dtype = device, dtype
        self._sources: dict[str, DeviceTables] = {}
        self._once = Pack(self._pack, engine)
        self._frozen = FrozenCache(lambda w: DeviceTables(self._pack(w, True)), engine)

    def __call__(self, w: Tensor, frozen: bool) -> Tensor:
        """Returns the slabs, in the shape of their source; those of a frozen weight are kept."""
        if not frozen or w.requires_grad:  # of this call alone
            slabs: Tensor = self._once(w)
            return slabs
        kept: DeviceTables = self._frozen(w)
        kept.lend(self._device)
        return kept.tensors[0]

    def forget(self, w: Tensor) -> None:
        """Drops what is kept of the memory that w has."""
        self._frozen.forget(w)

    def _pack(self, w: Tensor, kept: bool = False) -> Tensor:
        if not is_dense_shape(self._support, w.shape):
            form, w = "live", w.contiguous()
        elif w.dim() == 4 and not w.is_contiguous() and _is_channels_last(w):
            form = "channels_last"
        else:
            form, w = "contiguous", w.contiguous()
        w = w.resolve_neg()
        source = self._sources.get(form)
        if source is None:
            source = DeviceTables(upload(self._source(form), self._device))
            self._sources[form] = source
        pin(self._device, source)
        source.lend(self._device)
        table = source.tensors[0]
        # One slab at least, so that an empty list of steps has an address.
        shape = (max(table.shape[0], 1), *table.shape[1:])
        slabs = torch.empty(shape, dtype=self._dtype, device=w.device)
        if table.numel():
            self._start(w, table, slabs)
            if kept and w.is_cuda and not capturing(w.device):
                # These are kept, and the next call may come on another stream.
                torch.cuda.current_stream(w.device).synchronize()
        return slabs


def _is_channels_last(w: Tensor) -> bool:
    return w.is_contiguous(memory_format=torch.channels_last)
