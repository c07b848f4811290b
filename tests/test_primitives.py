# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the primitives checks before it times, resumes, and refuses without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import primitives
from benchmarks.cases import GPU_CASES, Case, het
from benchmarks.record import Record
from hetconv_kernels import ops
from hetconv_kernels.roofs import Roofs

TINY = Case("tiny", 2, 8, 8, 6, 6, 3, het(2), stride=1)


@pytest.fixture(autouse=True)
def nominal_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    roofs = Roofs(1e11, 1e10, "cpu", "float32")
    monkeypatch.setattr(primitives, "measure_roofs", lambda *_: roofs)


def test_rows_are_checked_timed_written_and_resumed(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    wanted = [(TINY, verb) for verb in primitives.VERBS]
    assert primitives.run(Record(tmp_path, "p"), wanted[:2], "vendor", 0.02) == 0
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [row["verb"] for row in rows] == ["fprop", "dgrad"]
    assert all(row["match"]["ok"] and row["median_s"] > 0 for row in rows)
    assert all(row["composition"]["name"] == "composition" for row in rows)
    assert primitives.run(Record(tmp_path, "p"), wanted, "vendor", 0.02) == 0
    again = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert again[:2] == rows
    assert [row["verb"] for row in again] == list(primitives.VERBS)
    assert "× dense" in capsys.readouterr().out


@pytest.mark.parametrize("verb", primitives.VERBS)
def test_a_wrong_result_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    name = f"run_{verb}"
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *a: right(*a) * 1.01)
    assert primitives.run(Record(tmp_path, "p"), [(TINY, verb)], "vendor", 0.02) == 1
    (row,) = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert not row["match"]["ok"]
    assert "median_s" not in row


def test_our_other_engines_are_measured_in_the_same_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(primitives, "ENGINES", ("vendor", "reference"))
    record = Record(tmp_path, "p")
    assert primitives.run(record, [(TINY, "dgrad")], "vendor", 0.02) == 0
    (row,) = record.data["rows"]
    assert list(row["engines"]) == ["reference"]
    assert row["engines"]["reference"] > 0
    assert "reference " in capsys.readouterr().out
    # One that is wrong spoils the row.
    right = ops.run_dgrad
    code = primitives.hk.backends.CODES["reference"]
    monkeypatch.setattr(ops, "run_dgrad", lambda *a: right(*a) * (1.01 if a[-1] == code else 1))
    assert primitives.run(Record(tmp_path, "q"), [(TINY, "dgrad")], "vendor", 0.02) == 1


@pytest.mark.parametrize("kind", ["dense", "grouped", "self_group"])
def test_every_kind_of_support_has_its_rivals(tmp_path: Path, kind: str) -> None:
    value = {"dense": 1, "grouped": 2, "self_group": 60}[kind]
    spec = replace(het(2), kind=kind, value=value)  # type: ignore[arg-type]
    case = replace(TINY, name=kind, support=spec, c=16, f=32)
    bench = primitives.Bench(case, "vendor")
    assert {"ours", "dense"} <= set(bench.variants["dgrad"])
    assert ("composition" in bench.variants["fprop"]) == (kind != "dense")
    assert all(bench.check(verb).ok for verb in primitives.VERBS)


def test_the_quick_table_is_what_the_targets_are_stated_for() -> None:
    quick = primitives.rows_of(full=False)
    assert len(quick) == 6 * 4 * 3
    assert {case.n for case, _ in quick} == {128}
    assert {case.dtype for case, _ in quick} == {"bfloat16"}
    full = primitives.rows_of(full=True)
    assert set(quick) < set(full)
    assert {case.n for case, _ in full} == {128, 32, 1}
    assert {case.dtype for case, _ in full} == {"bfloat16", "float16", "float32"}
    assert len({(case.name, verb) for case, verb in full}) == len(full)
    assert len(full) < 3 * (len(GPU_CASES) + 12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys) -> None:  # type: ignore[no-untyped-def]
    assert primitives.main([]) == 2
    assert "nothing was measured" in capsys.readouterr().out


def test_the_table_keeps_what_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import tune
    from hetconv_kernels.backends.triton import table

    cases = [replace(c, device="cpu") for c in GPU_CASES if c.quick][:2]
    seen = []

    def measure(problem, choices):  # type: ignore[no-untyped-def]
        seen.append((problem.verb, len(choices)))
        return choices[-1].name, 1e-5

    found = tune.entries(cases, (9, 0), measure, most=3)
    assert seen == [("fprop", 3), ("dgrad", 3)] * 2
    assert set(found) == {table.key_of(p, (9, 0)) for c in cases for p in tune.problems(c)}
    assert all(entry["seconds"] == 1e-5 for entry in found.values())
