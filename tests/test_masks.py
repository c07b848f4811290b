# SPDX-License-Identifier: Apache-2.0
"""The helpers that masks are made, packed and checked with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks

from hetconv_kernels.errors import SupportError
from hetconv_kernels.masks import (
    MAX_ENTRIES,
    check_entries,
    kernel_pair,
    mask_shape,
    owner,
    pack_mask,
    permutation,
    spread,
    unpack_mask,
)


@pytest.mark.parametrize("kernel", [(1, 1), (2, 4), (3, 3), (1, 8), (4, 4), (5, 5)], ids=str)
def test_packed_columns_are_bits_of_whole_bytes_lowest_first(kernel: tuple[int, int]) -> None:
    columns = 3 * math.prod(kernel)
    for column in range(columns):
        mask = np.zeros((2, columns), bool)
        mask[1, column] = True
        bits = pack_mask(mask.reshape(2, 3, *kernel))
        assert bits.shape == (2, -(-columns // 8))
        assert bits[1, column // 8] == 1 << column % 8
        assert np.count_nonzero(bits) == 1


@given(masks())
def test_unpacking_gives_the_mask_back(mask: Any) -> None:
    unpacked = unpack_mask(pack_mask(mask), mask.shape[1:])
    assert unpacked.dtype == np.bool_
    np.testing.assert_array_equal(unpacked, mask)


def test_unpacking_ignores_the_bits_past_the_last_tap() -> None:
    bits = np.full((1, 2), 255, np.uint8)
    assert unpack_mask(bits, (1, 3, 3)).tolist() == np.ones((1, 1, 3, 3), bool).tolist()


@given(st.integers(1, 40), st.integers(1, 40))
def test_owner_cuts_into_contiguous_groups_of_nearly_equal_size(count: int, groups: int) -> None:
    owners = owner(count, groups)
    assert owners.shape == (count,)
    assert (np.diff(owners) >= 0).all()
    assert owners[0] == 0
    assert owners[-1] < groups
    sizes = np.bincount(owners, minlength=groups)
    assert sizes.max() - sizes.min() <= 1


def test_spread_gives_a_pair_all_taps_or_none() -> None:
    pairs = np.array([[True, False, True], [False, False, True]])
    taps = spread(pairs, 2, 3)
    assert taps.shape == (2, 3, 2, 3)
    np.testing.assert_array_equal(taps.all((2, 3)), pairs)
    np.testing.assert_array_equal(taps.any((2, 3)), pairs)
    taps[0, 0, 0, 0] = False  # its own memory, which the constructors write to
    assert pairs[0, 0]


@pytest.mark.parametrize(
    ("kernel", "pair"),
    [(3, (3, 3)), ((1, 5), (1, 5)), ([2, 3], (2, 3)), (np.int64(4), (4, 4))],
    ids=str,
)
def test_kernel_pair_takes_one_or_two_integers(kernel: Any, pair: tuple[int, int]) -> None:
    assert kernel_pair(kernel) == pair
    assert all(type(size) is int for size in kernel_pair(kernel))


def test_mask_shape_is_filters_first_and_plain_integers() -> None:
    shape = mask_shape(np.int64(4), 6, (np.int32(3), 1))
    assert shape == (6, 4, 3, 1)
    assert all(type(size) is int for size in shape)


def test_as_many_entries_as_32_bits_number_are_the_most() -> None:
    check_entries(MAX_ENTRIES)
    with pytest.raises(SupportError, match=r"received 2147483648, expected at most 2147483647"):
        check_entries(MAX_ENTRIES + 1)


def test_permutation_takes_any_integers() -> None:
    for order in (
        [2, 0, 1],
        (2, 0, 1),
        np.array([2, 0, 1], np.int32),
        np.array([2, 0, 1], np.uint8),
    ):
        np.testing.assert_array_equal(permutation("filters", order, 3), [2, 0, 1])


@pytest.mark.parametrize(
    "order", [[0, 1], [0, 1, 3], [0, 1, 1], [-1, 0, 1], [[0, 1, 2]], 0, [0.0, 1.0, 2.0]], ids=str
)
def test_what_is_no_permutation_is_refused(order: Any) -> None:
    with pytest.raises(SupportError, match=r"order of channels: .*a permutation of 0…2"):
        permutation("channels", order, 3)
