# SPDX-License-Identifier: Apache-2.0
"""Schedules that the methods share: rising rates, falling learning rates, widths that fit."""

from __future__ import annotations

import numpy as np

from ..errors import ArgumentError, mismatch
from ..masks import BoolArray


def rising(step: float, target: float) -> list[float]:
    """Lists step, 2·step, … up to the target, which is always the last.

    >>> rising(0.25, 0.6)
    [0.25, 0.5, 0.6]

    Raises:
        ArgumentError: not 0 < step, or not 0 <= target < 1.
    """
    if not 0 < step <= 1:
        raise ArgumentError(mismatch("step", step, "more than 0, at most 1"))
    check_fraction("target", target)
    values = []
    count = 1
    while (value := round(count * step, 9)) < target - 1e-9:
        values.append(value)
        count += 1
    return [*values, target] if target > 0 else []


def step_decay(epoch: int, epochs: int) -> float:
    """Returns what scales the learning rate: a tenth after a third, a hundredth after two thirds.

    With 90 epochs these are the steps at 30 and 60 that self-grouping and WSP fine-tune with.
    """
    return float(10.0 ** -(3 * epoch // epochs))


def check_fraction(name: str, value: float) -> None:
    """Refuses what is not 0 ≤ value < 1."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise ArgumentError(mismatch(name, repr(value), "a fraction, 0 <= value < 1"))


def check_count(name: str, value: int, least: int = 0) -> None:
    """Refuses what is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(mismatch(name, repr(value), f"an integer, at least {least}"))


def check_positive(name: str, value: float, zero: bool = False) -> None:
    """Refuses what is not a finite number above zero (or zero, if that is allowed)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value >= 0 if zero else value > 0) or not value < float("inf"):
        least = "a finite number, at least 0" if zero else "a finite number above 0"
        raise ArgumentError(mismatch(name, repr(value), least))


def weakest(
    scores: np.ndarray, alive: BoolArray, count: int, multiple: int = 1, least: int = 1
) -> BoolArray:
    """Picks filters to remove: the ``count`` alive ones of least score.

    Fewer are picked where the width would not be a multiple of ``multiple``, or would fall under
    ``least``. A width that is no multiple already comes down to one.

    >>> weakest(np.array([3, 1, 2, 5, 4]), np.ones(5, bool), 2, multiple=2).tolist()
    [False, True, False, False, False]

    Args:
        scores: of all filters; small goes first, ties by number.  # [F]
        alive: which are still there.  # bool [F]
        count: how many to remove.
        multiple: what the remaining width is to be a multiple of.
        least: filters that always remain; raised to ``multiple``.

    Returns:
        Which filters to remove.  # bool [F]
    """
    width = int(alive.sum())
    remaining = max(-(-(width - count) // multiple) * multiple, least, min(multiple, width))
    remove = np.zeros(len(alive), bool)
    order = np.argsort(np.where(alive, scores, np.inf), kind="stable")
    remove[order[: max(width - remaining, 0)]] = True
    return remove
