# SPDX-License-Identifier: Apache-2.0
"""The benchmark of planned memory: its rows compare the same numbers, and tell what they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

from benchmarks import memory
from hetconv_kernels.backends import available_backends


@pytest.mark.skipif("cpu" not in available_backends(), reason="the engine is not built here")
def test_a_row_compares_equal_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    def network() -> nn.Module:
        return nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)))

    case: dict[str, Any] = {"small": (network, (1, 16, 96, 96), 4)}
    monkeypatch.setattr(memory, "CASES", case)
    row = memory.measure_plan("small", 0.1)
    assert row == json.loads(json.dumps(row))
    assert row["equal"]
    assert row["arena_bytes"] == 2 * 16 * 96 * 96 * 4
    assert row["page_faults"]["planned"] <= row["page_faults"]["plain"]
    assert "| small | default |" in memory.memory_table({"default": [row]})
    assert 0 < row["speedup"]["low"] <= row["speedup"]["ratio"] <= row["speedup"]["high"]


def test_the_table_has_both_allocators_and_marks_losses() -> None:
    row = {
        "case": "net", "median_s": {"plain": 2e-3, "planned": 1e-3},
        "speedup": {"ratio": 2.0, "low": 1.9, "high": 2.1},
        "page_faults": {"plain": 500.0, "planned": 7.0}, "arena_bytes": 3_000_000,
    }  # fmt: skip
    slower = row | {"speedup": {"ratio": 0.9, "low": 0.8, "high": 1.0}, "disturbed": ["load"]}
    *_, first, second = memory.memory_table({"default": [row], "kept": [slower]}).splitlines()
    assert first == "| net | default | 2.0 | 1.0 | 2.00 | 1.90 to 2.10 | 500 | 7 | 3.0 |"
    assert "| kept |" in second
    assert "**0.90** disturbed" in second
