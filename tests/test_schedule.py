# SPDX-License-Identifier: Apache-2.0
"""Schedules: rates, learning rates, and widths."""

from __future__ import annotations

import numpy as np
import pytest

from hetconv_kernels.compression.schedule import rising, step_decay, weakest
from hetconv_kernels.errors import ArgumentError


def test_rising_ends_at_the_target() -> None:
    assert rising(0.1, 0.7) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert rising(0.1, 0.65)[-2:] == [0.6, 0.65]
    assert rising(0.5, 0.2) == [0.2]
    assert rising(0.1, 0.0) == []


@pytest.mark.parametrize(("step", "target"), [(0, 0.5), (0.1, 1.0), (0.1, -0.1), (0.1, "0.5")])
def test_rising_refuses(step: float, target: float) -> None:
    with pytest.raises(ArgumentError):
        rising(step, target)


def test_the_paper_s_90_epochs_fall_at_30_and_60() -> None:
    rates = [step_decay(epoch, 90) for epoch in range(90)]
    assert rates == pytest.approx([1.0] * 30 + [0.1] * 30 + [0.01] * 30)


@pytest.mark.parametrize(
    ("count", "multiple", "least", "gone"),
    [
        (3, 1, 1, [1, 2, 4]),
        (3, 4, 1, [1, 2]),  # 3 would remain; 4 do
        (1, 4, 1, []),  # 5 would remain, 8 are not there: 6 stay
        (9, 1, 2, [0, 1, 2, 4]),
        (9, 8, 1, []),  # narrower than the multiple
    ],
)
def test_weakest(count: int, multiple: int, least: int, gone: list[int]) -> None:
    alive = np.array([True, True, True, True, True, False, True])
    scores = np.array([5.0, 1, 2, 6, 3, 0, 7])
    assert np.flatnonzero(weakest(scores, alive, count, multiple, least)).tolist() == gone
