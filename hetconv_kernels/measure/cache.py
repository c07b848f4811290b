# SPDX-License-Identifier: Apache-2.0
"""The last-level cache of a device: how large it is, and how to measure without its help."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_FALLBACK_BYTES = 64 * 2**20


class Flush:
    """Evicts a device's last-level cache by writing a buffer of twice its size."""

    def __init__(self, device: torch.device) -> None:
        size = 2 * last_level_cache(device)
        self._buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        """Writes the whole buffer."""
        self._buffer.add_(1)


def last_level_cache(device: torch.device | str = "cpu") -> int:
    """Returns the size of a device's last-level cache in bytes.

    A GPU's L2 comes from its properties; a CPU's from the operating system. Where neither tells, 64
    MiB is assumed, which is more than most processors have.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, size = (index / "level").read_text(), (index / "size").read_text().strip()
        except OSError:
            continue
        if size.endswith("K"):
            sizes.append((int(level), int(size[:-1]) * 1024))
    if sizes:
        return max(sizes)[1]
    names = ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE")
    known = [os.sysconf(n) for n in names if n in getattr(os, "sysconf_names", {})]
    return next((size for size in known if size > 0), _FALLBACK_BYTES)


def rotations(bytes_per_call: int, device: torch.device | str = "cpu") -> int:
    """Returns how many sets of buffers exceed the last-level cache three times over, at least 2."""
    return max(2, -(-3 * last_level_cache(device) // max(1, bytes_per_call)))
