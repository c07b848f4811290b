# SPDX-License-Identifier: Apache-2.0
"""Schedules that the methods share: rising rates, falling learning rates, widths that fit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..errors import ArgumentError, HetconvError, mismatch
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


def check_loss(name: str, loss: float) -> None:
    """Refuses a training that diverged; ``name`` is of its epoch.

    Raises:
        HetconvError: the mean loss is not finite.
    """
    if not math.isfinite(loss):
        raise HetconvError(
            mismatch(
                f"mean loss of {name}", loss, "a finite number",
                "The training diverged: take a smaller learning rate, or look at the data. "
                "Nothing of this epoch was kept.",
            )
        )  # fmt: skip


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
        least: filters that always remain; raised to a multiple of ``multiple``.

    Returns:
        Which filters to remove.  # bool [F]
    """
    remove = np.zeros(len(alive), bool)
    order = np.argsort(np.where(alive, scores, np.inf), kind="stable")
    remove[order[: removable(int(alive.sum()), count, multiple, least)]] = True
    return remove


def removable(width: int, count: int, multiple: int = 1, least: int = 1) -> int:
    """Returns how many of ``count`` filters may go so that a layer's width fits.

    >>> removable(20, 3, multiple=8), removable(20, 4, multiple=8), removable(20, 15, multiple=8)
    (0, 4, 12)

    Args:
        width: filters that are there.
        count: how many are to go.
        multiple: what the remaining width is to be a multiple of.
        least: filters that always remain; raised to a multiple of ``multiple``.
    """
    floor = -(-max(least, 1) // multiple) * multiple
    remaining = max(-(-(width - count) // multiple) * multiple, floor)
    return max(width - remaining, 0)


def share(
    widths: Mapping[str, int],
    fraction: float,
    owed: Mapping[str, int],
    multiple: int = 1,
    least: int = 1,
) -> tuple[dict[str, int], dict[str, int]]:
    """Divides what one step is to remove into what goes now and what is owed to the next step.

    A step asks for a fraction of each layer, at least one filter. Where the width has to be a
    multiple, that rarely goes in one step, and what is left over is added in the next: a layer
    loses its fraction a step on average, whatever the multiple. A step in which no layer could
    lose anything would change nothing, so the asking is repeated until one can.

    >>> share({"a": 16}, 0.25, {}, multiple=8), share({"a": 16, "b": 64}, 0.125, {}, multiple=8)
    (({'a': 8}, {'a': 0}), ({'a': 0, 'b': 8}, {'a': 2, 'b': 0}))

    Args:
        widths: filters that are there, by name of the layer.
        fraction: of them to remove in a step.
        owed: what the last step left over.
        multiple: what remaining widths are to be multiples of.
        least: filters that every layer keeps.

    Returns:
        How many filters go now, and how many are owed; nothing goes only where no layer can lose
        any more.
    """
    most = {name: removable(width, width, multiple, least) for name, width in widths.items()}
    due = {name: owed.get(name, 0) for name in widths}
    while True:
        for name, width in widths.items():
            due[name] = min(due[name] + max(int(fraction * width), 1), most[name])
        now = {name: removable(w, due[name], multiple, least) for name, w in widths.items()}
        if any(now.values()) or due == most:
            return now, {name: due[name] - now[name] for name in widths}
