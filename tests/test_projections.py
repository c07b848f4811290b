# SPDX-License-Identifier: Apache-2.0
"""Projections: which units stay, by hand, and that no other choice is nearer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hetconv_kernels.compression.projections import keep_largest, project
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
