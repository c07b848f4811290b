# SPDX-License-Identifier: Apache-2.0
"""The probe of the matrix unit's rate, with its kernel on the CPU."""

from __future__ import annotations

from types import ModuleType

import cuda_host
import pytest
import torch

from benchmarks import smoke
from hetconv_kernels.errors import BackendError


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return cuda_host.install(monkeypatch, "wide")


@pytest.mark.parametrize("form", smoke.RATES)
def test_the_probe_multiplies_by_what_begins_at_any_16_bytes(host: ModuleType, form: str) -> None:
    """Sums of ones, of both warpgroups; the host has no clocks."""
    row, plane, taps = smoke.RATES[form]
    clocks = torch.full((2, 2), -1, dtype=torch.int64)
    values = torch.full((2, 2), float("nan"))
    host.wide_rate(clocks.data_ptr(), values.data_ptr(), 2, 12, row, plane, taps, 0)
    assert (values == 64 * 12).all()
    assert (clocks == 0).all()


@pytest.mark.parametrize(
    ("shape", "words"),
    [((9, 345, 3), "rows are shorter"), ((10, 339, 3), "planes are shorter"),
     ((10, 2001, 3), "do not fit into shared memory"), ((8, 272, 0), "rows are shorter")],
    ids=["row", "plane", "memory", "taps"],
)  # fmt: skip
def test_the_probe_refuses_what_would_read_beyond_its_planes(
    host: ModuleType, shape: tuple[int, int, int], words: str
) -> None:
    with pytest.raises(BackendError, match=words):
        host.wide_rate(0, 0, 1, 1, *shape, 0)
