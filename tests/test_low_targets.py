# SPDX-License-Identifier: Apache-2.0
"""What is said of the layers in low precision beside float32: the counts, and who meets what."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import low_targets, summary, table
from benchmarks.cases import CPU_CASES

PLAIN = "8x64x56-het4"


def row(name: str, ratio: float, **more: Any) -> dict[str, Any]:
    """A layer of 1 s in float32 and of a tenth of that at the ceilings below."""
    dtype, target = ("int8", 3.3) if name.endswith("int8") else ("bfloat16", 1.7)
    found = {"ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1, "median_s": 1.0}
    case = {"name": name, "dtype": dtype, "target_float32": target}
    return {"case": case, "float32": found, "macs": 100, "bytes": 1, **more}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    rates = {"int8": 1000.0, "bfloat16": 1000.0}
    roofs = [
        {"macs_per_s": rate, "bytes_per_s": 100.0, "device": "cpu", "dtype": dtype}
        for dtype, rate in rates.items()
    ]
    data: dict[str, Any] = {"roofs": roofs, "rows": []}
    monkeypatch.setattr(summary, "results", lambda name: data)
    return data


def lines() -> list[list[str]]:
    return [text.strip("| ").split(" | ") for text in low_targets.targets("x").splitlines()[2:]]


def test_a_target_is_met_or_beyond_a_bound_or_open(results: dict[str, Any]) -> None:
    more = low_targets.times_counted(f"{PLAIN}-int8")
    assert more is not None
    assert 1.1 < more < 1.2
    results["rows"] = [
        row(f"{PLAIN}-int8", 3.31),
        row(f"{PLAIN}-int8", 3.29),
        row(f"{PLAIN}-int8", 3.0, macs=310),  # 3.23 at the ceiling
        row(f"{PLAIN}-int8", 3.0, macs=290),  # 3.45 at the ceiling, 3.01 as counted
        row(f"{PLAIN}-int8", 3.0, bytes=40),  # 2.5: its bytes take longer than its products
        row(f"{PLAIN}-bf16", 1.75, macs=700),  # more than direct sums, by Winograd
        row(f"{PLAIN}-bf16", 1.6, macs=700),
        row(f"{PLAIN}-bf16", 1.6, disturbed=["x"]),
        row(PLAIN, 1.6) | {"float32": None},
    ]
    assert [line[-1] for line in lines()] == [
        "met",
        "missed, open",
        "missed, beyond direct sums",
        "missed, beyond this lowering",
        "missed, beyond direct sums",
        "met",
        "missed, beyond direct sums",
        "disturbed",
    ]
    assert lines()[3][1:6] == ["3.00", "2.90 to 3.10", "3.3", "3.45", f"{1 / (0.29 * more):.2f}"]
    assert lines()[6][4:6] == ["1.43", ""]
    said = low_targets.outcomes("x")
    assert said.startswith("Of 8 layers 2 meet it, 3 would miss it at the ceiling too, 1 would")


@pytest.mark.parametrize("name", ["layers-full", "zen5/layers-low-precision"])
def test_every_committed_row_with_a_target_is_in_the_table(name: str) -> None:
    cases = [case for case in CPU_CASES if case.target_float32 is not None]
    assert all(case.c >= 64 for case in cases)
    assert [line[0] for line in lines_of(name)] == [case.name for case in cases]
    missed = [line for line in lines_of(name) if line[-1] != "met"]
    assert missed
    for line in missed:
        assert float(line[1]) < float(line[3])


def lines_of(name: str) -> list[list[str]]:
    return [text.strip("| ").split(" | ") for text in low_targets.targets(name).splitlines()[2:]]


def test_the_counts_are_those_of_the_engine() -> None:
    """Where the processor has the instructions; elsewhere the engine lowers in another way."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    pytest.importorskip("hetconv_kernels._cpu", reason="the native engine is not built here")
    if not set(low_targets.NEEDED) <= set(flags):
        pytest.skip("the counts are of instructions that this processor has not")
    assert json.loads(low_targets.FILE.read_text())["layers"] == low_targets.counts()


def test_the_page_says_what_the_engine_counts_for_an_epilogue() -> None:
    engine = pytest.importorskip(
        "hetconv_kernels._cpu", reason="the native engine is not built here"
    )
    if low_targets.ISA not in engine.int8_isas():
        pytest.skip("the page is of instructions that this processor has not")
    plan = engine.Int8Plan(np.ones((64, 64, 1, 1), np.uint8), low_targets.ISA, "filters")
    page = (Path(__file__).parents[1] / "docs" / "low-precision.md").read_text()
    said = re.search(r"For an epilogue with filters in vectors it counts (\d+) operations", page)
    assert said is not None
    assert plan.cost - plan.useful == int(said[1])


def test_programs_stand_beside_the_composition_of_their_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = {"name": "net", "n": 8, "size": 224}
    program = {"kind": "program", "case": case, "median_s": 0.016, "floor_s": 0.012,
               "counted_s": 0.0133}  # fmt: skip
    model = {"kind": "model", "case": case, "composition": {"median_s": 0.020}}
    files = {"steps": {"rows": [program]}, "other": {"rows": [model]}}
    monkeypatch.setattr(summary, "all_results", lambda machine: files if machine else {})
    assert low_targets.programs() == "None is committed yet."
    line = low_targets.programs("zen5").splitlines()[2]
    assert line == "| net, 8 images of 224² | 16.0 | 12.0 | 13.3 | 1.25 | 1.50 |"
    del files["other"]
    assert low_targets.programs("zen5").splitlines()[2].endswith("| 13.3 |  |  |")


def measured() -> dict[str, Any]:
    """A row of the committed results, to be changed."""
    rows = summary.results("layers-full")["rows"]
    return copy.deepcopy(next(row for row in rows if row["case"]["name"] == f"{PLAIN}-int8"))


def test_the_target_over_our_own_float32_is_shown_and_when_it_is_missed() -> None:
    row = measured()
    place = table.layer_cells([])[0].index("× float32")

    def shown() -> tuple[str, ...]:
        return table.layer_cells([row])[1][0][place : place + 2]

    row["float32"]["ratio"] = 3.35
    assert shown() == ("3.35", "3.3")
    row["float32"]["ratio"] = 3.25
    assert shown() == ("3.25", "3.3  missed")
    row["disturbed"] = ["somebody else"]
    assert shown() == ("3.25", "3.3")
    row["float32"] = None
    assert shown() == ("", "")


def test_a_page_has_every_ratio_below_1_in_bold() -> None:
    row = measured()
    row["composition"]["ratio"] = 0.96
    (line,) = table.layer_cells([row], bold=True)[1]
    assert [cell for cell in line if cell.startswith("**")] == ["**0.96**"]
    assert "**" not in "".join(table.layer_cells([row])[1][0])
