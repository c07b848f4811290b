# SPDX-License-Identifier: Apache-2.0
"""Writes small files in the format of CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import numpy as np

RECORD = 3073


def write_cifar(folder: Path, counts: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Writes random records in the original format; returns them by file."""
    rng, written = np.random.default_rng(seed), {}
    for name, count in counts.items():
        records = rng.integers(0, 256, (count, RECORD), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)
        written[name] = records
    return written
