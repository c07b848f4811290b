# SPDX-License-Identifier: Apache-2.0
"""What values an option of the command line may have: a wrong one is exit code 2, in a sentence."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

# What torch's generators take as a seed.
MOST_SEED = 2**63 - 1


def whole(least: int = 1, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Returns the type of an option that is an integer in a range."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            upper = "" if most == 2**31 - 1 else f" and at most {most}"
            raise argparse.ArgumentTypeError(
                f"received {text!r}, expected an integer, at least {least}{upper}"
            )
        return value

    return integer


def real(low: float, high: float = math.inf, *, low_too: bool = False) -> Callable[[str], float]:
    """Returns the type of an option that is a finite number above ``low`` and at most ``high``.

    Args:
        low: the bound below, which is no value itself unless ``low_too``.
        high: the largest value.
        low_too: whether ``low`` is a value.
    """

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (value >= low if low_too else value > low) and value <= high
        if not inside or not math.isfinite(value):
            least = f"at least {low:g}" if low_too else f"above {low:g}"
            upper = "" if math.isinf(high) else f", at most {high:g}"
            raise argparse.ArgumentTypeError(
                f"received {text!r}, expected a finite number {least}{upper}"
            )
        return value

    return number


def size(text: str) -> tuple[int, int]:
    """Reads a height and width in pixels, such as 56 or 56x48."""
    height, _, width = text.partition("x")
    try:
        pair = int(height), int(width or height)
    except ValueError:
        pair = (0, 0)
    if min(pair) < 1:
        raise argparse.ArgumentTypeError(
            f"received {text!r}, expected a height in pixels such as 56, or HEIGHTxWIDTH such as "
            "56x48"
        )
    return pair


seed = whole(0, MOST_SEED)
