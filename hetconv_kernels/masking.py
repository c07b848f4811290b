# SPDX-License-Identifier: Apache-2.0
"""Native masking: weights copied with zeros where none exist, in one pass of the compiled engine.

A layer that is not frozen keeps nothing of its weight, so that this is done in each call. PyTorch
takes several times what the memory does: it converts a mask of booleans, or reads one of integers
that is as large as the weight. The engine reads a byte for each weight and chooses: a dead entry
counts as zero whatever it holds, NaN and Inf too, and a NaN of a weight that exists stays.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .observers import has_values, observed, transforms_active
from .openmp import share_openmp

_SIZES = (2, 4, 8)  # bytes of an element
_MOST_SCRATCH = 2**26  # bytes
# Rows of features for which a product masks the weight as it reads it; for more of them PyTorch's
# product on a masked copy is faster, see `benchmarks.calibrate_calls`.
MOST_ROWS = 8


@cache
def native_engine() -> Any | None:
    """Returns the compiled engine, None where there is none."""
    if importlib.util.find_spec("hetconv_kernels._cpu") is None or share_openmp():
        return None
    from . import _cpu

    return _cpu


def can_mask(dense: Tensor) -> bool:
    """Tells whether the engine masks such a plain tensor, of which the memory is all."""
    return (
        dense.is_cpu
        and dense.element_size() in _SIZES
        and (
            dense.is_contiguous()
            or (dense.dim() == 4 and dense.is_contiguous(memory_format=torch.channels_last))
        )
        and native_engine() is not None
    )


def unobserved(dense: Tensor) -> bool:
    """Tells whether nobody has to see how a plain tensor is masked, nor derives through it."""
    return not (
        observed(dense)
        or (dense.requires_grad and torch.is_grad_enabled())
        or transforms_active()
        or not has_values(dense)
    )


def transposes(dense: Tensor) -> bool:
    """Tells whether a copy in channels_last has another order than the tensor."""
    return dense.is_contiguous() and not dense.is_contiguous(memory_format=torch.channels_last)


def room(dense: Tensor, transposed: bool) -> Tensor:
    """Returns memory for a copy, in channels_last where it is transposed."""
    layout = torch.channels_last if transposed else torch.preserve_format
    return torch.empty_like(dense, requires_grad=False, memory_format=layout)


def multiply_masked(x: Tensor, w: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies rows by a masked matrix, which is read once and copied nowhere.

    Args:
        x: contiguous float32 rows, few of them.  # [..., C]
        w: contiguous float32; dead entries are ignored.  # [F, C]
        bits: the bit-packed mask.  # uint8 [F, ceil(C / 8)]
        bias: added per filter.  # [F]

    Returns:
        x · (w ∘ mask)ᵀ + bias.  # [..., F]
    """
    native: Any = native_engine()
    f, c = w.shape[:2]
    y = x.new_empty((*x.shape[:-1], f))
    if bias is not None:
        bias = bias.float().contiguous()
    native.multiply_masked(
        w.data_ptr(),
        bits.data_ptr(),
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // c,
        f,
        c,
        torch.get_num_threads(),
    )
    return y


class _Results:
    """Where results of one shape, layout and dtype go: what a call prepares once.

    Args:
        shape, stride, dtype: of a result.
    """

    def __init__(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> None:
        self._shape, self._stride, self._dtype = tuple(shape), tuple(stride), dtype
        self._bytes = math.prod(shape) * dtype.itemsize
        self._view = _View()

    def place(self, brief: bool) -> Tensor:
        """Returns memory for a result; a brief one's may be the thread's next one's."""
        view = self._view
        if brief and view.memory is _scratch.memory and view.out is not None:
            return view.out
        if not brief or self._bytes > _MOST_SCRATCH:
            return torch.empty_strided(self._shape, self._stride, dtype=self._dtype, device="cpu")
        with torch.inference_mode(False), torch.no_grad():
            out = _scratch.room(self._bytes).view(self._dtype)
            out = out.as_strided(self._shape, self._stride)
        view.out, view.memory = out, _scratch.memory
        return out


class ImageSums(_Results):
    """Sums images, scaled by the coefficients that exist.

    Args:
        mask: which exist, contiguous.  # bool [F, images, C]
        images: contiguous float32.  # [images, KH, KW]
        last: whether the sums are in channels_last.
    """

    def __init__(self, mask: Tensor, images: Tensor, last: bool) -> None:
        (f, count, c), (height, width) = mask.shape, images.shape[1:]
        taps = height * width
        stride = (taps * c, 1, width * c, c) if last else (taps * c, taps, width, 1)
        super().__init__((f, c, height, width), stride, torch.float32)
        native: Any = native_engine()
        self._run, self._sizes = native.sum_images, (f, c, count, taps, last)
        self._operands = mask, images
        self._addresses = mask.data_ptr(), images.data_ptr()

    def __call__(self, w: Tensor, brief: bool = False) -> Tensor:
        """Returns the sums.

        Args:
            w: contiguous float32 coefficients; dead ones are ignored.  # [F, C·images, ...]
            brief: whether the sums are read at once and then forgotten: they may lie in memory
                that the thread's next such result is written to.

        Returns:
            The sums.  # [F, C, KH, KW]
        """
        y = self.place(brief)
        threads = torch.get_num_threads()
        self._run(w.data_ptr(), *self._addresses, y.data_ptr(), *self._sizes, threads)
        return y


class NativeMask(_Results):
    """Masks weights of one shape, layout and dtype by the engine.

    Args:
        mask: which entries exist, in the layout of the copies.  # bool [F, C, KH, KW]
        stride: of the copies.
        like: a weight.
        transposed: whether copies are in channels_last of a weight that is contiguous.
    """

    def __init__(
        self, mask: Tensor, stride: tuple[int, ...], like: Tensor, transposed: bool
    ) -> None:
        super().__init__(like.shape, stride, like.dtype)
        native: Any = native_engine()
        self._mask = mask
        f, c, *taps = like.shape
        sizes = (f, c, math.prod(taps)) if transposed else (like.numel(),)
        self._run = native.transpose_weights if transposed else native.mask_weights
        self._sizes = (*sizes, like.element_size())
        self._address = mask.data_ptr()

    def __call__(self, dense: Tensor, brief: bool) -> Tensor:
        """Returns a masked copy; a brief one may lie where the thread's next one will."""
        out = self.place(brief)
        self.mask(dense, out)
        return out

    def mask(self, dense: Tensor, out: Tensor) -> None:
        """Masks into a tensor of the copies' layout, which may be the weight itself."""
        threads = torch.get_num_threads()
        self._run(dense.data_ptr(), self._address, out.data_ptr(), *self._sizes, threads)


class _View(threading.local):
    """A thread's memory as one kind of results, and the memory that it is of."""

    out: Tensor | None = None
    memory: Tensor | None = None


class _Scratch(threading.local):
    """Memory of a thread for a copy that is read at once: fresh pages cost more than the copy."""

    memory: Tensor | None = None

    def room(self, size: int) -> Tensor:
        """Returns the memory's first bytes.  # uint8 [size]"""
        if self.memory is None or len(self.memory) < size:
            # A power of two: what views still hold of former ones is no more than this.
            room = 1 << (size - 1).bit_length()
            self.memory = torch.empty(room, dtype=torch.uint8, device="cpu")
        return self.memory[:size]


_scratch = _Scratch()
