# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a call's overhead measures equal networks, by each of the ways to call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planning import needs_engine

from benchmarks import overhead

pytestmark = needs_engine


def test_a_row_compares_equal_networks_in_each_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Path] = []

    def timed(host: Path, program: Path, calls: int = 0) -> float:
        asked.append(program)
        assert program.is_file()
        return 1e-6 * len(asked)

    monkeypatch.setattr(overhead, "time_host", timed)
    row = overhead.measure_chain(2, 0.1, tmp_path / "server")
    assert row == json.loads(json.dumps(row))
    assert row["equal"]
    assert row["layers"] == 2
    assert list(row["median_s"]) == ["layer by layer", "program", "native part", "C library"]
    assert row["median_s"]["C library"] == pytest.approx(3e-6)  # the median of five rounds
    assert "C library" not in overhead.measure_chain(2, 0.1)["median_s"]
