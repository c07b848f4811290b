# SPDX-License-Identifier: Apache-2.0
"""Prepared launches against Triton's own launcher, on a stand-in for the driver."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil

import host_time
import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own driver"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a compiler"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing"
    ),
]


def test_the_driver_gets_what_triton_gives_it_byte_for_byte() -> None:
    done = host_time.start("--check")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("a profiler is told") == 1
    kernels = {name.split(": ")[1].split()[0] for name in found}
    assert len(kernels) == 6, kernels
    for name, row in found.items():
        assert row["prepared"], name
        assert row["same"], name
        assert row["after a refusal"], name
        assert row["encoded again"] == 0, name
        # Two scratch addresses, and more than a pointer.
        assert row["parameters"] > 3, name
