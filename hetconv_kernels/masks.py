# SPDX-License-Identifier: Apache-2.0
"""Boolean masks of weights: packing into bits, spreading over taps, and checks of their sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .errors import SupportError, mismatch

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


def pack_mask(mask: BoolArray) -> npt.NDArray[np.uint8]:
    """Packs a mask, each kernel's taps into whole bytes.

    # bool [F, C, KH, KW] -> uint8 [F, C, B]
    """
    return np.packbits(mask.reshape(*mask.shape[:2], -1), axis=-1, bitorder="little")


def unpack_mask(bits: npt.NDArray[np.uint8], kernel: tuple[int, int]) -> BoolArray:
    """Unpacks what `pack_mask` packed.  # uint8 [F, C, B] -> bool [F, C, KH, KW]"""
    taps = kernel[0] * kernel[1]
    flat = np.unpackbits(bits, axis=-1, count=taps, bitorder="little")
    return flat.reshape(*bits.shape[:2], *kernel).view(np.bool_)


def kernel_pair(kernel: int | Sequence[int]) -> tuple[int, int]:
    """Returns (KH, KW) for one number or a pair.

    Raises:
        SupportError: not one or two positive integers.
    """
    pair = (kernel, kernel) if isinstance(kernel, int | np.integer) else tuple(kernel)
    if len(pair) != 2 or not all(isinstance(k, int | np.integer) and k >= 1 for k in pair):
        raise SupportError(mismatch("kernel size", kernel, "one or two positive integers"))
    return int(pair[0]), int(pair[1])


def owner(count: int, groups: int) -> IntArray:
    """Returns the group of each of `count` indices cut into equal contiguous groups."""
    return np.arange(count) * groups // count


def spread(pairs: BoolArray, kh: int, kw: int) -> BoolArray:
    """Gives every (filter, channel) pair all or none of the taps.  # [F, C] -> [F, C, KH, KW]"""
    return np.repeat(pairs[:, :, None], kh * kw, axis=2).reshape(*pairs.shape, kh, kw)


def positive(**sizes: int) -> None:
    """Refuses sizes that are not positive integers.

    Raises:
        SupportError: one is not.
    """
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise SupportError(mismatch(name, size, "a positive integer"))


def permutation(name: str, order: npt.ArrayLike, size: int) -> IntArray:
    """Returns the order as an array.

    Raises:
        SupportError: it is not a permutation of 0…size-1.
    """
    array = np.asarray(order)
    if array.shape != (size,) or not np.array_equal(np.sort(array), np.arange(size)):
        raise SupportError(
            mismatch(f"order of {name}", f"shape {array.shape}", f"a permutation of 0…{size - 1}")
        )
    return array
