# SPDX-License-Identifier: Apache-2.0
"""The switch between the fastest arithmetic and the one whose error needs no second thought."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from .errors import ArgumentError, mismatch

__all__ = ["strict_accuracy"]


def strict_accuracy(on: bool = True) -> AbstractContextManager[None]:
    """Keeps engines to direct sums of products, as a plain call or as a context manager.

    Without it the native engine may run frozen float32 layers by Winograd's F(2x2, 3x3) or
    F(4x4, 3x3), and first layers of stride 2 by F(3x3, 4x4), whose roundings are others, expected
    at 0.6, 2 and 2.2 times those of direct sums, which overflow earlier, and where an infinity of
    the input becomes NaN and reaches the outputs of its whole tile (docs/backends/cpu.md). Frozen
    bfloat16 layers may run by F(2x2, 3x3), at 2.3 to 2.6 times a direct sum's one rounding. Like
    `use_backend` it is one switch for all threads, and nothing that was prepared under the other
    setting is used. The environment variable HETCONV_WINOGRAD=0 sets it at import.

        with hk.strict_accuracy():
            y = network(x)

    Args:
        on: whether to be strict; False lifts it.
    """
    global _strict
    before, _strict = _strict, bool(on)
    return _restored(before)


def is_strict() -> bool:
    """Tells whether `strict_accuracy` or HETCONV_WINOGRAD=0 asks for direct sums."""
    return _strict


@contextmanager
def _restored(before: bool) -> Iterator[None]:
    global _strict
    try:
        yield
    finally:
        _strict = before


def _from_environment() -> bool:
    value = os.environ.get("HETCONV_WINOGRAD", "1")
    if value not in ("0", "1"):
        raise ArgumentError(mismatch("HETCONV_WINOGRAD", repr(value), "0 (strict accuracy) or 1"))
    return value == "0"


_strict = _from_environment()
