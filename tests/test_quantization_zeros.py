# SPDX-License-Identifier: Apache-2.0
"""Supports of quantised weights, from their zeros: holes are filled, nothing is dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels.quantization.zeros import support_of_zeros


@pytest.mark.parametrize(
    "support",
    [
        hk.Support.dense(32, 32, 3),
        hk.Support.dense(64, 10, 1),
        hk.Support.het(64, 64, 3, p=4),
        hk.Support.het(64, 64, 3, p=64),
        hk.Support.het(60, 36, 3, p=4, order="interleaved"),
        hk.Support.grouped(64, 64, 1, 4),
    ],
    ids=["dense", "linear", "het", "het-C", "interleaved", "groups-1x1"],
)
def test_weights_that_were_rounded_to_zero_leave_no_holes(support: hk.Support) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.as_tensor(support.mask.copy())
    live = torch.randint(1, 128, support.shape, generator=generator) * mask
    rounded = torch.rand(support.shape, generator=generator) < 0.01
    weight = live.masked_fill(rounded, 0).to(torch.int8)
    assert bool((rounded & mask).any()), "no weight was rounded to zero"
    found = support_of_zeros(weight)
    assert np.array_equal(found.mask, support.mask)


def test_single_weights_stay_single() -> None:
    mask = torch.rand(32, 32, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.2
    found = support_of_zeros((mask * 5).to(torch.int8))
    assert np.array_equal(found.mask, mask.numpy())


def test_every_weight_that_is_not_zero_is_kept() -> None:
    generator = torch.Generator().manual_seed(3)
    for density in (0.02, 0.5, 0.85, 0.9):
        weight = torch.randint(-127, 128, (24, 20, 3, 3), generator=generator).to(torch.int8)
        weight[torch.rand(weight.shape, generator=generator) > density] = 0
        alive = weight.ne(0).numpy()
        assert not (alive & ~support_of_zeros(weight).mask).any()


def test_a_layer_without_weights_is_one_of_zeros() -> None:
    assert support_of_zeros(torch.zeros(4, 4, 3, 3, dtype=torch.int8)).live == 0


def test_equal_groups_are_kept_as_such() -> None:
    weight = torch.zeros(16, 16, 3, 3, dtype=torch.int8)
    for g in range(4):
        weight[4 * g : 4 * g + 4, 4 * g : 4 * g + 4] = 3
    assert support_of_zeros(weight, 4).uniform_groups == 4
