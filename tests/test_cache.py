# SPDX-License-Identifier: Apache-2.0
"""The size of the last-level cache, and the flush that empties it."""

from __future__ import annotations

import torch

from hetconv_kernels.measure import cache


def test_a_real_flush_is_larger_than_the_cache() -> None:
    flush = cache.Flush(torch.device("cpu"))
    assert flush._buffer.numel() * flush._buffer.element_size() >= cache.last_level_cache()
    flush()
    assert int(flush._buffer.max()) == 1


def test_last_level_cache_and_rotations() -> None:
    size = cache.last_level_cache()
    assert 2**18 <= size <= 2**33
    assert cache.rotations(size) == 3
    assert cache.rotations(100 * size) == 2
    assert cache.rotations(size // 10) >= 30
