# SPDX-License-Identifier: Apache-2.0
"""Integers of arguments: Python's and numpy's are taken alike, everything else is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np

from .errors import ArgumentError, mismatch

INT32_MAX = 2**31 - 1


def is_integer(value: object) -> TypeGuard[int]:
    """Tells a Python or numpy integer from everything else, booleans included."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_count(name: str, value: object, least: int = 1) -> int:
    """Returns an integer of at least ``least`` as a Python one.

    Raises:
        ArgumentError: it is no integer, or out of range.
    """
    if not is_integer(value) or not least <= value <= INT32_MAX:
        raise ArgumentError(mismatch(name, value, f"an integer from {least} to {INT32_MAX}"))
    return int(value)


def as_pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """Returns one or two integers of at least ``least`` as a pair of Python ones.

    Raises:
        ArgumentError: they are no integers, too many, or out of range.
    """
    pair = tuple(value) if isinstance(value, tuple | list) else (value,)
    if (
        len(pair) not in (1, 2)
        or not all(map(is_integer, pair))
        or not all(least <= v <= INT32_MAX for v in pair)
    ):
        raise ArgumentError(
            mismatch(name, value, f"one or two integers from {least} to {INT32_MAX}")
        )
    return int(pair[0]), int(pair[-1])
