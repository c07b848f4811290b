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
    without = overhead.measure_chain(2, 0.1)
    assert "C library" not in without["median_s"]
    assert overhead.overhead_table([without]).splitlines()[-1].count("|") == 7


def test_the_table_is_in_microseconds_and_says_what_python_takes() -> None:
    row = {
        "layers": 20,
        "median_s": {"layer by layer": 3e-4, "program": 5e-5, "native part": 4e-5},
        "overhead_s": 1e-5,
    }
    *_, plain, spoilt = overhead.overhead_table([row, row | {"disturbed": ["load"]}]).splitlines()
    assert plain == "| 20 | 300.0 | 50.0 | 40.0 |  | 10.0 |"
    assert spoilt.endswith("| 10.0 disturbed |")
