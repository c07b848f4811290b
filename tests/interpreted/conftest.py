# SPDX-License-Identifier: Apache-2.0
"""Tests of kernels in Triton's interpreter: run by `test_triton`, in a process of their own."""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path) -> bool | None:  # type: ignore[no-untyped-def]
    """Leaves these files to `test_triton`, unless the interpreter was asked for by hand."""
    return None if INTERPRETED else True


@pytest.fixture(autouse=True)
def few_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the cost model see a small part, so that it prefers few programs, which cost most."""
    from hetconv_kernels.backends.gpu import devices

    small = devices.GPU_SPECS[9, 0]._replace(processors=2)
    monkeypatch.setitem(devices.GPU_SPECS, (9, 0), small)
