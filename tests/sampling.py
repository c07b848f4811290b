# SPDX-License-Identifier: Apache-2.0
"""Which tests of the CUDA kernels run on a day, where all of them passed before."""

from __future__ import annotations

import hashlib

import pytest


def is_left(item: pytest.Item, day: int) -> bool:
    """Tells whether a test of the CUDA kernels is none of the eighth of that day."""
    name = hashlib.sha256(item.nodeid.encode()).digest()
    return item.path.name.startswith("test_cuda") and name[0] % 8 != day % 8
