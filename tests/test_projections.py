# SPDX-License-Identifier: Apache-2.0
"""Projections: which units stay, by hand, and that no other choice is nearer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hetconv_kernels.compression.projections import KINDS, keep_largest, project
from hetconv_kernels.errors import ArgumentError

# Two filters, three channels, two taps.
WEIGHT = torch.tensor([[[[3.0, 1]], [[0, 2]], [[2, 2]]], [[[1, 1]], [[4, 0]], [[0, 1]]]])


@pytest.mark.parametrize(
    ("kind", "pruned", "kept"),
    [
        # Squares 9 1 0 4 4 4 1 1 16 0 0 1: the four largest are 16, 9 and the first two 4s.
        ("irregular", 2 / 3, [[[1, 0], [0, 1], [1, 0]], [[0, 0], [1, 0], [0, 0]]]),
        # Energies of kernels 10 4 8 / 2 16 1.
        ("kernels", 0.5, [[[1, 1], [0, 0], [1, 1]], [[0, 0], [1, 1], [0, 0]]]),
        # Columns over both filters: 10 2 / 16 4 / 4 5.
        ("columns", 0.5, [[[1, 0], [1, 0], [0, 1]], [[1, 0], [1, 0], [0, 1]]]),
        # Blocks of 1 filter × 2 channels: 14 (0, 1), 8 (2) / 18, 1.
        ("blocks", 0.5, [[[1, 1], [1, 1], [0, 0]], [[1, 1], [1, 1], [0, 0]]]),
        # Runs of 2 channels of one tap: 9 4 5 4 / 17 0 1 1, where the last of a row are single.
        ("runs", 0.5, [[[1, 1], [1, 1], [1, 0]], [[1, 0], [1, 0], [0, 0]]]),
        # Filters 22 / 19, channels 12 20 9.
        ("filters", 0.5, [[[1, 1], [1, 1], [1, 1]], [[0, 0], [0, 0], [0, 0]]]),
        ("channels", 1 / 3, [[[1, 1], [1, 1], [0, 0]], [[1, 1], [1, 1], [0, 0]]]),
    ],
)
def test_by_hand(kind: str, pruned: float, kept: list) -> None:
    filters = 1 if kind == "blocks" else 2
    mask = keep_largest(WEIGHT, pruned, kind, filters, 2)
    assert mask[:, :, 0].astype(int).tolist() == kept
    assert torch.equal(project(WEIGHT, mask), WEIGHT * torch.tensor(mask))


def test_irregular_is_the_nearest_of_all_choices() -> None:
    weight = torch.tensor([[1.0, -5, 2], [4, -2.5, 0.5]])
    mask = keep_largest(weight, 0.5)
    best = min(
        (
            float((weight - weight * torch.tensor(choice).reshape(2, 3)).square().sum()),
            choice,
        )
        for choice in itertools.product([False, True], repeat=6)
        if sum(choice) == 3
    )
    assert mask.flatten().tolist() == list(best[1])


def test_sizes_that_do_not_divide_leave_smaller_last_units() -> None:
    weight = torch.ones(5, 3, 1, 1)
    weight[4] = 10.0
    mask = keep_largest(weight, 0.5, "columns", filters=2)  # 3 × 3 units
    assert mask[4].all()
    assert mask.sum() == 3 + 2 * (round(4.5) - 3)


def test_fully_connected_weights_keep_their_shape() -> None:
    assert keep_largest(torch.randn(8, 16), 0.75, "blocks", 4, 4).shape == (8, 16)
    assert keep_largest(torch.randn(8, 16), 0.0).all()


@pytest.mark.parametrize(("kind", "pruned"), [("x", 0.5), ("kernels", 1.0), ("kernels", -0.1)])
def test_refuses(kind: str, pruned: float) -> None:
    with pytest.raises(ArgumentError):
        keep_largest(WEIGHT, pruned, kind)


def test_ties_go_by_order() -> None:
    assert np.flatnonzero(keep_largest(torch.ones(1, 6), 0.5)).tolist() == [0, 1, 2]


def kernels(*taps: dict[int, float]) -> torch.Tensor:
    """Makes kernels [len(taps), 1, 3, 3] of the given taps."""
    weight = torch.zeros(len(taps), 9)
    for row, chosen in zip(weight, taps, strict=True):
        for tap, value in chosen.items():
            row[tap] = value
    return weight.reshape(-1, 1, 3, 3)


def test_a_pattern_has_the_centre_and_the_largest_other_taps() -> None:
    mask = keep_largest(kernels({0: 5.0, 4: 0.1, 8: 4.0, 2: 1.0}), 0.0, "patterns", entries=3)
    assert mask.flatten().nonzero()[0].tolist() == [0, 4, 8]


def test_kernels_take_the_commonest_pattern_that_keeps_most() -> None:
    corner, row = {0: 1.0, 4: 1.0, 8: 1.0}, {3: 2.0, 4: 2.0, 5: 2.0}
    odd = {0: 3.0, 4: 1.0, 1: 2.0}  # of its own pattern there is one alone
    weight = kernels(corner, corner, row, row, odd)
    mask = keep_largest(weight, 0.0, "patterns", entries=3, patterns=2).reshape(5, 9)
    assert len(np.unique(mask, axis=0)) == 2
    assert mask[4].nonzero()[0].tolist() == [0, 4, 8]
    assert mask.sum() == 15


def test_with_patterns_what_more_is_to_go_goes_in_whole_kernels() -> None:
    weight = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    assert keep_largest(weight, 0.1, "patterns").sum() == 48 * 4  # 56 % go at least
    mask = keep_largest(weight, 0.75, "patterns").reshape(48, 9)
    assert sorted(set(mask.sum(1))) == [0, 4]
    assert mask.sum() == 108
    assert len(np.unique(mask[mask.any(1)], axis=0)) <= 8
    one = torch.randn(8, 6, 1, 1, generator=torch.Generator().manual_seed(0))
    assert keep_largest(one, 0.75, "patterns").sum() == 12  # single weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_stays_at_any_rate(kind: str) -> None:
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = keep_largest(weight, 0.9999, kind, 2, 2)
    unit = {"irregular": 1, "kernels": 9, "columns": 2, "runs": 2, "blocks": 36, "filters": 36,
            "channels": 36, "patterns": 4}  # fmt: skip
    assert mask.sum() == unit[kind]
