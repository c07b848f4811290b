# SPDX-License-Identifier: Apache-2.0
"""Which tests of the GPU engines' code run on a day, where all of them passed before."""

from __future__ import annotations

import hashlib

import pytest

# The tests that say the same while what they are made from is the same; see `in_parts.SOURCES`.
FILES = {
    "cuda": ("test_cuda",),
    "triton": ("test_aot", "test_engine", "test_fuzz", "test_kernels"),
}


def is_left(item: pytest.Item, engine: str, day: int) -> bool:
    """Tells whether a test of an engine's code is none of the eighth of that day."""
    name = hashlib.sha256(item.nodeid.encode()).digest()
    return item.path.name.startswith(FILES[engine]) and name[0] % 8 != day % 8
