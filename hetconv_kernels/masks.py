# SPDX-License-Identifier: Apache-2.0
"""Boolean masks of weights: packing into bits, spreading over taps, and checks of their sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .errors import SupportError, mismatch
from .integers import is_integer

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]

# A position in a mask fits the 32-bit integers of kernels; more is refused before it is allocated.
MAX_ENTRIES = 2**31 - 1


def pack_mask(mask: BoolArray) -> npt.NDArray[np.uint8]:
    """Packs a mask into bits, lowest first, each filter's columns in whole bytes.

    # bool [F, C, KH, KW] -> uint8 [F, ceil(C·KH·KW/8)]
    """
    return np.packbits(mask.reshape(len(mask), -1), axis=-1, bitorder="little")


def unpack_mask(bits: npt.NDArray[np.uint8], columns: tuple[int, int, int]) -> BoolArray:
    """Unpacks what `pack_mask` packed, for columns (C, KH, KW).

    # uint8 [F, ceil(C·KH·KW/8)] -> bool [F, C, KH, KW]
    """
    flat = np.unpackbits(bits, axis=-1, count=math.prod(columns), bitorder="little")
    return flat.reshape(len(bits), *columns).view(np.bool_)


def kernel_pair(kernel: int | Sequence[int]) -> tuple[int, int]:
    """Returns (KH, KW) for one number or a pair.

    Raises:
        SupportError: not one or two positive integers.
    """
    pair = tuple(kernel) if isinstance(kernel, tuple | list) else (kernel, kernel)
    if len(pair) != 2 or not all(is_integer(k) and k >= 1 for k in pair):
        raise SupportError(mismatch("kernel size", kernel, "one or two positive integers"))
    return int(pair[0]), int(pair[1])


def owner(count: int, groups: int) -> IntArray:
    """Returns the group of each of `count` indices cut into equal contiguous groups."""
    return np.arange(count) * groups // count


def spread(pairs: BoolArray, kh: int, kw: int) -> BoolArray:
    """Gives every (filter, channel) pair all or none of the taps.  # [F, C] -> [F, C, KH, KW]"""
    return np.repeat(pairs[:, :, None], kh * kw, axis=2).reshape(*pairs.shape, kh, kw)


def mask_shape(C: int, F: int, kernel: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Returns (F, C, KH, KW) for the sizes of a layer.

    Raises:
        SupportError: one is not a positive integer, or a mask of them has too many entries.
    """
    for name, size in (("C", C), ("F", F)):
        if not is_integer(size) or size < 1:
            raise SupportError(mismatch(name, size, "a positive integer"))
    shape = (int(F), int(C), *kernel_pair(kernel))
    check_entries(math.prod(shape))
    return shape


def check_entries(count: int) -> None:
    """Refuses a mask that is too large.

    Raises:
        SupportError: it has more than `MAX_ENTRIES` entries.
    """
    if count > MAX_ENTRIES:
        raise SupportError(mismatch("entries of a Support", count, f"at most {MAX_ENTRIES}"))


def permutation(name: str, order: npt.ArrayLike, size: int) -> IntArray:
    """Returns the order as an array.

    Raises:
        SupportError: it is not a permutation of 0…size-1.
    """
    array = np.asarray(order)
    integers = np.issubdtype(array.dtype, np.integer) and array.shape == (size,)
    if not integers or not np.array_equal(np.sort(array), np.arange(size)):
        raise SupportError(mismatch(f"order of {name}", order, f"a permutation of 0…{size - 1}"))
    return array
