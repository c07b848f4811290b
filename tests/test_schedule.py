# SPDX-License-Identifier: Apache-2.0
"""Schedules: rates, learning rates, and widths."""

from __future__ import annotations

import numpy as np
import pytest

from hetconv_kernels.compression.schedule import removable, rising, share, step_decay, weakest
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


def test_a_width_that_has_to_be_a_multiple_is_one_or_stays() -> None:
    for width in range(1, 80):
        for multiple in (1, 2, 3, 8, 16):
            for least in (1, 2, 10):
                floor = -(-least // multiple) * multiple
                for count in range(width + 3):
                    left = width - removable(width, count, multiple, least)
                    assert left == width or (left % multiple == 0 and left >= floor)
                    assert left >= width - count
                    # One multiple fewer would be more than was asked for, or less than may stay.
                    lower = (left - 1) // multiple * multiple
                    assert lower < width - count or lower < floor


@pytest.mark.parametrize("multiple", [1, 4, 8, 16])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.5])
def test_no_width_stalls_above_the_least_multiple(multiple: int, fraction: float) -> None:
    for first in range(max(multiple, 2), 81):
        width, steps = first, 0
        owed: dict[str, int] = {}
        while True:
            now, owed = share({"a": width}, fraction, owed, multiple, 2)
            if not now["a"]:
                break
            width, steps = width - now["a"], steps + 1
            assert width % multiple == 0
        assert width == max(multiple, 2)
        assert steps <= first


def test_rounding_keeps_the_pace_of_every_layer() -> None:
    """Beside a wide layer that loses some in each step, a narrow one loses as fast on average."""
    widths, owed = {"narrow": 32, "wide": 640}, {}
    for step in range(1, 11):
        now, owed = share({"narrow": 32, "wide": 640}, 0.1, owed, 8)
        widths = {name: width - now[name] for name, width in widths.items()}
        wanted = {"narrow": 3 * step, "wide": 64 * step}
        for name, first in (("narrow", 32), ("wide", 640)):
            assert first - widths[name] == wanted[name] // 8 * 8
            assert owed[name] == wanted[name] % 8


def test_without_a_multiple_each_step_removes_its_fraction_and_owes_nothing() -> None:
    assert share({"a": 40, "b": 3}, 0.1, {}) == ({"a": 4, "b": 1}, {"a": 0, "b": 0})
    assert share({"a": 2}, 0.1, {}, least=2) == ({"a": 0}, {"a": 0})
