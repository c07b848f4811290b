# SPDX-License-Identifier: Apache-2.0
"""The table of all methods, at its smallest, and what its full run recorded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import methods
from hetconv_kernels import compress

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
RECORD = Path(methods.__file__).with_name("methods-digits.json")


def test_quick_run_has_every_method_in_both_forms(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        words = ["--quick", "--part", "digits", "--seconds", "0.01", "--out", str(tmp_path)]
        assert methods.main(words) == 0
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "methods.json").read_text())["digits"]
    classes = [value for value in vars(compress).values() if isinstance(value, type)]
    kinds = {c.title for c in classes if issubclass(c, compress.Method) and c.title}
    for paper in (True, False):
        assert {r["method"] for r in record if r["paper"] is paper} == kinds
    table = (tmp_path / "methods.txt").read_text()
    for row in record:
        assert row["name"] in table
        assert 0 < row["macs"][1] <= row["macs"][0]
        assert min(row["seconds"]) > 0
        fits = row["test_accuracy"][1] >= row["test_accuracy"][0] - methods.TOLERANCE
        assert row["within"] == (fits and row["macs"][1] <= row["macs"][0] / 2)


def test_settings_of_the_full_run_are_those_of_the_papers_where_they_say_so() -> None:
    for row in methods.rows(15):
        hardware = {"granularity": 1, "tile": 0, "multiple": 1, "bands": False,
                    "projection": "irregular"}  # fmt: skip
        settings = dataclasses.asdict(row.method)
        ours = [name for name, value in hardware.items() if settings.get(name, value) != value]
        assert not (row.paper and ours), row.name


@pytest.mark.skipif(not RECORD.exists(), reason="the full run was not recorded yet")
def test_record_of_the_full_run_is_of_these_rows() -> None:
    record = json.loads(RECORD.read_text())
    assert [r["name"] for r in record["digits"]] == [row.name for row in methods.rows(15)]
    for row in record["digits"]:
        assert row["test_accuracy"][0] > 0.97
        # Where the predicted path is the dense one, nothing is saved; the table says so.
        if row["paper"] and "by prediction" not in row["name"]:
            assert row["within"], f"{row['name']}: {row['test_accuracy']}, {row['macs']}"
