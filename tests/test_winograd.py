# SPDX-License-Identifier: Apache-2.0
"""The derivation behind Winograd's forms: its matrices, and what the choice of points is worth."""

from __future__ import annotations

import numpy as np
import pytest

import hetconv_kernels as hk
from hetconv_kernels.backends import winograd


@pytest.mark.parametrize("tile", (winograd.TILES | winograd.PHASES).values())
def test_its_transforms_are_a_convolution(tile: int) -> None:
    """An axis of a tile, in double: what errors are derived from is what the engine computes by."""
    by, rng = winograd.transforms(tile), np.random.default_rng(0)
    r = winograd.taps(tile)
    d, g = rng.standard_normal(tile + r - 1), rng.standard_normal(r)
    y = by.outputs @ ((by.weights @ g) * (by.inputs @ d))
    assert np.allclose(y, np.correlate(d, g))


def test_the_points_err_less_than_half_as_much_as_one_and_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the documents say, by the derivation."""
    support = hk.Support.het(64, 64, 3, p=4)
    ours = winograd.errors(support, 4).expected
    monkeypatch.setitem(winograd._POINTS, 4, (0.0, 1.0, -1.0, 2.0, -2.0))
    assert winograd.errors(support, 4).expected > 2 * ours
