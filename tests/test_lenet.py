# SPDX-License-Identifier: Apache-2.0
"""The benchmark of LeNet-5: what it says of a line, and what it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import lenet
from hetconv_kernels.compression import Method
from hetconv_kernels.errors import HetconvError


def test_the_methods_of_the_lines_are_methods() -> None:
    found = lenet.lenet_methods()
    assert set(found) == {"filter correlation", "stability", "Play and Prune", "ADMM"}
    assert all(isinstance(method, Method) for method in found.values())


def test_a_finished_line_is_told_and_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {
        "name": "ADMM", "seed": 3, "weights": [1000, 10], "macs": [1000, 100],
        "accuracy": [0.985, 0.983], "notes": [],
    }  # fmt: skip
    (tmp_path / "admm-3.json").write_text(json.dumps(record))
    assert lenet.main(["--only", "ADMM", "--seed", "3", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ADMM, seed 3: 100.0× fewer weights, 10.0× fewer MACs, 98.50 % -> 98.30 % (-0.20)"
    ]


def test_without_the_digits_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(HetconvError, match="train-images"):
        lenet.main(["--only", "ADMM", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
