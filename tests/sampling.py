# SPDX-License-Identifier: Apache-2.0
"""Which tests a process runs, of those that processes share, and which ones run on a day.

Of the GPU engines' code only a part is tested where all of its tests passed before.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import pytest

# The tests that say the same while what they are made from is the same; see `in_parts.SOURCES`.
FILES = {
    "cuda": ("test_cuda",),
    "triton": ("test_aot", "test_engine", "test_fuzz", "test_kernels"),
    "session": ("test_session", "test_rehearsal"),
}


def is_left(item: pytest.Item, engine: str, day: int) -> bool:
    """Tells whether a test of an engine's code is none of the eighth of that day."""
    name = hashlib.sha256(item.nodeid.encode()).digest()
    return item.path.name.startswith(FILES[engine]) and name[0] % 8 != day % 8


@cache
def is_ours(folder: Path, file: Path) -> bool:
    """Tells whether this process was the first to ask for a file of tests, and may run it.

    Args:
        folder: in which the processes that share tests leave what they took.
        file: relative to the root of the tree.
    """
    try:
        (folder / "-".join(file.parts)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
