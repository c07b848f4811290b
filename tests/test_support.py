# SPDX-License-Identifier: Apache-2.0
"""Support's constructors, groups and algebra against the definitions, weight by weight."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks, random_mask

from hetconv_kernels import Support, support

# (C, F, kernel, p): p divides both, one, none; the ends p = 1 and p = C; one tap; a flat kernel.
HET = {
    "even": (8, 12, 3, 4),
    "p-not-dividing": (100, 90, 3, 8),
    "p-divides-c-only": (12, 10, 3, 4),
    "p-divides-f-only": (10, 12, 3, 4),
    "dense-end": (6, 5, 3, 1),
    "depthwise-end": (7, 7, 3, 7),
    "more-channels-than-filters": (9, 2, 3, 9),
    "one-tap": (6, 4, 1, 3),
    "flat-kernel": (6, 4, (1, 5), 2),
}


# Constructors -----------------------------------------------------------------------------------


def test_dense_has_every_weight() -> None:
    s = Support.dense(3, 5, (1, 7))
    assert s.shape == (5, 3, 1, 7)
    assert (s.filters, s.channels, s.kernel) == (5, 3, (1, 7))
    assert s.mask.all()
    assert s.is_dense
    assert (s.live, s.density) == (105, 1.0)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_is_the_grouped_convolution_of_pytorch(groups: int) -> None:
    s = Support.grouped(6, 12, 3, groups)
    weight = torch.randn(12, 6 // groups, 3, 3).double()
    dense = torch.zeros(s.shape).double()
    dense[torch.tensor(s.mask)] = weight.flatten()
    x = torch.randn(2, 6, 5, 5).double()
    torch.testing.assert_close(F.conv2d(x, dense), F.conv2d(x, weight, groups=groups))


@pytest.mark.parametrize("order", ["blocked", "interleaved"])
@pytest.mark.parametrize("case", HET.values(), ids=HET)
def test_het_follows_its_rule(case: tuple[int, int, Any, int], order: str) -> None:
    channels, filters, kernel, p = case
    s = Support.het(channels, filters, kernel, p=p, order=order)
    kh, kw = s.kernel
    expected = np.zeros((filters, channels, kh, kw), bool)
    for f in range(filters):
        for c in range(channels):
            blocked = f * p // filters == c * p // channels
            full = blocked if order == "blocked" else (c - f) % p == 0
            expected[f, c] = full
            expected[f, c, kh // 2, kw // 2] = True
    np.testing.assert_array_equal(s.mask, expected)


@pytest.mark.parametrize("order", ["blocked", "interleaved"])
@pytest.mark.parametrize("case", HET.values(), ids=HET)
def test_het_shares_channels_out_as_evenly_as_can_be(
    case: tuple[int, int, Any, int], order: str
) -> None:
    channels, filters, kernel, p = case
    s = Support.het(channels, filters, kernel, p=p, order=order)
    full = s.mask.all((2, 3)).sum(1)
    if s.kernel == (1, 1):
        assert s.is_dense
    else:
        assert set(full) <= {channels // p, -(-channels // p)}
    assert len(s.groups) <= p


@pytest.mark.parametrize("order", ["blocked", "interleaved"])
@pytest.mark.parametrize("p", [1, 2, 4, 8, 16])
def test_het_counts_the_multiplications_of_the_paper(p: int, order: str) -> None:
    channels, filters, k = 16, 32, 3
    s = Support.het(channels, filters, k, p=p, order=order)
    per_pixel = filters * (k * k * channels // p + channels - channels // p)
    assert s.macs(1, 1) == s.live == per_pixel
    assert s.macs(7, 5) == per_pixel * 35


@pytest.mark.parametrize(("channels", "filters", "p"), [(8, 12, 4), (6, 6, 6), (16, 8, 2)])
def test_het_orders_agree_up_to_a_permutation_where_p_divides(
    channels: int, filters: int, p: int
) -> None:
    interleaved = Support.het(channels, filters, 3, p=p, order="interleaved")
    blocked = Support.het(channels, filters, 3, p=p, order="blocked")
    by_residue = [np.argsort(np.arange(n) % p, kind="stable") for n in (filters, channels)]
    assert interleaved.permute(*by_residue) == blocked
    assert (interleaved == blocked) == (channels == filters == p)


def test_het_with_p_1_is_dense() -> None:
    assert Support.het(6, 4, 3, p=1) == Support.dense(6, 4, 3)


@pytest.mark.parametrize("order", ["blocked", "interleaved"])
def test_het_with_p_c_is_depthwise_and_pointwise(order: str) -> None:
    s = Support.het(5, 5, 3, p=5, order=order)
    depthwise = Support.grouped(5, 5, 3, 5).mask
    centre = np.zeros((3, 3), bool)
    centre[1, 1] = True
    np.testing.assert_array_equal(s.mask, depthwise | centre)


def test_self_grouped_gives_whole_kernels_by_cluster() -> None:
    labels, keep = [1, 0, 1, 2], np.array([[1, 0, 1], [0, 1, 1], [0, 0, 0]], bool)
    s = Support.self_grouped(labels, keep, (3, 1))
    assert s.shape == (4, 3, 3, 1)
    for f, label in enumerate(labels):
        for c in range(3):
            assert s.mask[f, c].all() == s.mask[f, c].any() == keep[label, c]


def test_self_grouped_within_an_earlier_support_may_outnumber_the_clusters() -> None:
    within = Support.from_mask(random_mask(3, (4, 3, 3, 3), 0.5))
    keep = np.array([[1, 1, 0], [0, 1, 1]], bool)
    bare = Support.self_grouped([0, 0, 1, 1], keep, 3)
    s = Support.self_grouped([0, 0, 1, 1], keep, 3, within=within)
    np.testing.assert_array_equal(s.mask, bare.mask & within.mask)
    assert len(bare.groups) == 2
    assert len(s.groups) == 4


def test_from_mask_takes_what_numpy_reads_as_a_boolean_array() -> None:
    mask = random_mask()
    s = Support.from_mask(mask)
    np.testing.assert_array_equal(s.mask, mask)
    assert Support.from_mask(torch.tensor(mask)) == s
    assert Support.from_mask(mask.tolist()) == s
    assert Support.from_mask(np.asfortranarray(mask)) == s
    assert Support.from_mask(mask.transpose(3, 1, 2, 0)[:, ::-1]).live == s.live


# Groups -----------------------------------------------------------------------------------------


@given(masks())
def test_groups_are_the_distinct_rows_in_order_of_their_first_filter(mask: Any) -> None:
    rows: dict[bytes, list[int]] = {}
    for f, row in enumerate(mask):
        rows.setdefault(row.astype(np.uint8).tobytes(), []).append(f)
    groups = Support.from_mask(mask).groups
    assert [g.filters.tolist() for g in groups] == list(rows.values())
    for group in groups:
        np.testing.assert_array_equal(group.mask, mask[group.filters[0]])


@given(masks(), st.integers(0, 2**32 - 1))
def test_groups_move_with_a_permutation_of_the_filters(mask: Any, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(mask))
    s = Support.from_mask(mask)
    moved = s.permute(filters=order).groups
    assert {tuple(g.filters.tolist()) for g in s.groups} == {
        tuple(sorted(order[g.filters])) for g in moved
    }


def _uniform(mask: Any) -> int | None:
    """The g of an equal grouping by trying them all."""
    f, c = mask.shape[:2]
    for g in range(1, min(f, c) + 1):
        if f % g or c % g:
            continue
        full = np.zeros(mask.shape, bool)
        for i in range(g):
            full[i * f // g : (i + 1) * f // g, i * c // g : (i + 1) * c // g] = True
        if (full == mask).all():
            return g
    return None


def test_uniform_groups_recognises_every_equal_grouping() -> None:
    for f in range(1, 9):
        for c in range(1, 9):
            for g in range(1, min(f, c) + 1):
                if f % g == 0 == c % g:
                    s = Support.grouped(c, f, (1, 2), g)
                    assert s.uniform_groups == _uniform(s.mask) == g


@given(masks())
def test_uniform_groups_is_none_for_everything_else(mask: Any) -> None:
    assert Support.from_mask(mask).uniform_groups == _uniform(mask)


def test_uniform_groups_is_none_where_one_weight_is_missing_or_moved() -> None:
    whole = Support.grouped(6, 6, 3, 3)
    missing = whole.mask.copy()
    missing[0, 0, 0, 0] = False
    assert Support.from_mask(missing).uniform_groups is None
    assert whole.permute(channels=[5, 1, 2, 3, 4, 0]).uniform_groups is None
    assert whole.permute(filters=[2, 1, 0, 3, 4, 5]).uniform_groups is None


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 3, 3)])
def test_a_support_without_any_weight_is_a_support(shape: tuple[int, ...]) -> None:
    s = Support.from_mask(np.zeros(shape, bool))
    assert (s.live, s.density, s.macs(4, 4), len(s.groups)) == (0, 0.0, 0, 1)
    assert s.uniform_groups is None
    assert not s.is_dense
    assert Support.from_json(s.to_json()) == s


# Algebra ----------------------------------------------------------------------------------------


@given(masks(), st.integers(0, 2**32 - 1))
def test_intersection_keeps_what_both_have(mask: Any, seed: int) -> None:
    other = np.random.default_rng(seed).random(mask.shape) < 0.5
    a, b = Support.from_mask(mask), Support.from_mask(other)
    np.testing.assert_array_equal((a & b).mask, mask & other)
    assert a & b == b & a
    assert a & a == a
    assert a & Support.dense(a.channels, a.filters, a.kernel) == a


@given(masks(), st.integers(0, 2**32 - 1))
def test_permute_moves_row_order_i_to_row_i(mask: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, cols = rng.permutation(mask.shape[0]), rng.permutation(mask.shape[1])
    s = Support.from_mask(mask)
    np.testing.assert_array_equal(s.permute(filters=rows).mask, mask[rows])
    np.testing.assert_array_equal(s.permute(channels=cols).mask, mask[:, cols])
    assert s.permute(rows, cols).permute(np.argsort(rows), np.argsort(cols)) == s
    assert s.permute() == s


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3)])
def test_transpose_is_what_dgrad_convolves_with(kernel: tuple[int, int]) -> None:
    s = Support.from_mask(random_mask(1, (6, 4, *kernel)))
    w = torch.randn(s.shape).double() * torch.tensor(s.mask)
    dy = torch.randn(2, 6, 5, 7).double()
    flipped = torch.where(torch.tensor(s.transpose().mask), w.transpose(0, 1).flip(2, 3), 0)
    padding = (kernel[0] - 1, kernel[1] - 1)
    dx = F.conv_transpose2d(dy, w)
    torch.testing.assert_close(F.conv2d(dy, flipped, padding=padding), dx)
    assert s.transpose().live == s.live  # so none is live there that is dead here


@given(masks())
def test_transpose_is_its_own_inverse(mask: Any) -> None:
    s = Support.from_mask(mask)
    assert s.transpose().transpose() == s
    assert (s.transpose().filters, s.transpose().channels) == (s.channels, s.filters)


def test_docstring_examples_run() -> None:
    outcome = doctest.testmod(support)
    assert outcome.attempted > 0
    assert outcome.failed == 0
