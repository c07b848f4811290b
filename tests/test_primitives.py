# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the primitives checks before it times, resumes, and refuses without a GPU."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import benchmarks.record
from benchmarks import primitives
from benchmarks.cases import GPU_CASES, GPU_TARGETS, Case, het_case
from benchmarks.record import Record
from benchmarks.table import primitive_table
from hetconv_kernels import ops
from hetconv_kernels.measure.roofline import Roofs

TINY = Case("tiny", 2, 8, 8, 6, 6, 3, het_case(2), stride=1)


@pytest.fixture(autouse=True)
def nominal_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    roofs = Roofs(1e11, 1e10, "cpu", "float32")
    monkeypatch.setattr(primitives, "measure_roofs", lambda *_: roofs)


def test_rows_are_checked_timed_written_and_resumed(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    wanted = [(TINY, verb) for verb in primitives.VERBS]
    assert primitives.run_rows(Record(tmp_path, "p"), wanted[:2], "vendor", 0.02) == 0
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [row["verb"] for row in rows] == ["fprop", "dgrad"]
    assert all(row["match"]["ok"] and row["median_s"] > 0 for row in rows)
    assert all(row["composition"]["name"] == "composition" for row in rows)
    assert primitives.run_rows(Record(tmp_path, "p"), wanted, "vendor", 0.02) == 0
    again = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert again[:2] == rows
    assert [row["verb"] for row in again] == list(primitives.VERBS)
    shown = capsys.readouterr().out
    assert "× dense" in shown
    assert "ceilings, float32: 0.2 TFLOP/s" in shown
    assert "NOT MEASURED" not in shown


def test_a_training_step_is_checked_and_timed(tmp_path: Path) -> None:
    assert primitives.run_rows(Record(tmp_path, "p"), [(TINY, "step")], "vendor", 0.02) == 0
    (row,) = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert row["macs"] == 3 * TINY.macs(TINY.build_support().live)
    assert row["composition"]["name"] == "composition"
    assert row["compiled"] is None


def test_what_there_is_no_time_for_is_named(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    wanted = [(TINY, "fprop"), (replace(TINY, name="other"), "wgrad")]
    assert primitives.run_rows(Record(tmp_path, "p"), wanted, "vendor", 0.02, budget=-1) == 0
    shown = capsys.readouterr().out
    assert "NOT MEASURED, -1 s were over (2 rows): tiny fprop, other wgrad" in shown


def test_a_case_that_fails_does_not_take_the_others_along(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    wanted = [(replace(TINY, name="bad", dtype="int8"), "fprop"), (TINY, "fprop")]
    assert primitives.run_rows(Record(tmp_path, "p"), wanted, "vendor", 0.02) == 1
    shown = capsys.readouterr().out
    assert "bad: FAILED" in shown
    assert "Traceback" in shown
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [row["case"]["name"] for row in rows] == ["tiny"]


@pytest.mark.parametrize("where", ["variant", "case"])
def test_what_takes_the_gpu_down_ends_the_process_which_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, where: str
) -> None:  # type: ignore[no-untyped-def]
    bad = replace(TINY, name="bad", **({"dtype": "int8"} if where == "case" else {}))
    if where == "variant":
        faulty(monkeypatch, "reference", "fails")
    monkeypatch.setattr(primitives, "rows_of", lambda full: [(bad, "dgrad"), (TINY, "fprop")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended")
    monkeypatch.setattr(primitives, "usable", lambda device: False)
    own = ["--backend", "vendor", "--seconds", "0.02", "--results", str(tmp_path), "--worker"]
    assert primitives.main(own) == primitives.LOST
    shown = capsys.readouterr().out
    assert "the GPU's context is lost" in shown
    begun = [line for line in shown.splitlines() if line.startswith("begin ")]
    lost = "bad/dgrad/ours-reference" if where == "variant" else "bad/*/*"
    assert begun[-1] == f"begin {lost}"
    # What watches it starts it again without that.
    assert primitives.main([*own, "--leave-out", lost]) == 1
    shown = capsys.readouterr().out
    assert f"FAILED and left out: {lost}" in shown
    rows = json.loads((tmp_path / "primitives-quick.json").read_text())["rows"]
    assert rows[-1]["case"]["name"] == "tiny"
    assert rows[-1]["median_s"] > 0


def test_a_device_is_usable_until_it_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert primitives.usable("cpu")
    monkeypatch.setattr(torch, "ones", refuse)
    assert not primitives.usable("cpu")


@pytest.mark.parametrize(("ratio", "shown"), [(2.1, "2  "), (1.9, "2  missed")])
def test_the_table_says_whether_a_target_is_met(tmp_path: Path, ratio: float, shown: str) -> None:
    record = Record(tmp_path, "p")
    primitives.run_rows(record, [(TINY, "fprop")], "vendor", 0.02)
    (row,) = record.data["rows"]
    row["case"]["name"] = "gpu-r50-conv4-128-het4"
    row["dense"]["ratio"], row["verdict"] = ratio, "win"
    line = primitive_table([row])[2]
    assert shown.strip() in line
    assert ("missed" in line) == (ratio < 2)


def test_results_do_not_make_a_checkout_another_one(tmp_path: Path) -> None:
    """A run goes on where it stopped only on the same commit; its own rows must not change it."""
    root = tmp_path / "tree"
    (root / "benchmarks" / "results").mkdir(parents=True)
    code = root / "benchmarks" / "code.py"
    code.write_text("1\n")
    (root / "benchmarks" / "results" / "old.json").write_text("{}")

    def git(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        words = ["git", *identity, "-C", str(root / "benchmarks"), *command]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    git("init", "-q", "..")
    git("add", "..")
    git("commit", "-qm", "x")
    status = ("status", "--porcelain", "--", *benchmarks.record._CODE)
    for name in ("old", "new"):
        (root / "benchmarks" / "results" / f"{name}.json").write_text("{1}")
    assert git(*status) == ""
    code.write_text("2\n")
    assert "code.py" in git(*status)


@pytest.mark.parametrize("asked", ["", "step"], ids=["alone", "step"])
@pytest.mark.parametrize("verb", primitives.VERBS)
def test_a_wrong_result_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, asked: str
) -> None:
    name = f"run_{verb}"
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *a: right(*a) * 1.01)
    assert primitives.run_rows(Record(tmp_path, "p"), [(TINY, asked or verb)], "vendor", 0.02) == 1
    (row,) = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert not row["match"]["ok"]
    assert "median_s" not in row


def test_our_other_engines_are_measured_in_the_same_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("benchmarks.bench.ENGINES", ("vendor", "reference"))
    record = Record(tmp_path, "p")
    assert primitives.run_rows(record, [(TINY, "dgrad")], "vendor", 0.02) == 0
    (row,) = record.data["rows"]
    assert list(row["engines"]) == ["reference"]
    assert row["engines"]["reference"] > 0
    assert "reference " in capsys.readouterr().out


def faulty(monkeypatch: pytest.MonkeyPatch, engine: str, how: str) -> None:
    """Makes one engine's dgrad wrong, or has it fail."""
    right, code = ops.run_dgrad, primitives.hk.backends.CODES[engine]

    def run(*arguments):  # type: ignore[no-untyped-def]
        if arguments[-1] != code:
            return right(*arguments)
        if how == "fails":
            raise RuntimeError("CUDA error: misaligned address")
        return right(*arguments) * 1.01

    monkeypatch.setattr("benchmarks.bench.ENGINES", ("vendor", "reference"))
    monkeypatch.setattr(ops, "run_dgrad", run)


@pytest.mark.parametrize("how", ["wrong", "fails"])
def test_a_faulty_second_engine_is_named_and_costs_nobody_else_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, how: str
) -> None:  # type: ignore[no-untyped-def]
    faulty(monkeypatch, "reference", how)
    assert primitives.run_rows(Record(tmp_path, "q"), [(TINY, "dgrad")], "vendor", 0.02) == 1
    (row,) = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert list(row["left_out"]) == ["ours-reference"]
    assert ("misaligned" if how == "fails" else "wrong by") in row["left_out"]["ours-reference"]
    assert row["median_s"] > 0
    assert row["match"]["ok"]
    assert row["dense"]["ratio"] > 0
    assert row["composition"]["median_s"] > 0
    assert row["engines"] == {}
    assert "WITHOUT ours-reference" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["wrong", "fails"])
def test_where_the_engine_that_was_asked_for_is_faulty_another_of_ours_has_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    faulty(monkeypatch, "vendor", how)
    assert primitives.run_rows(Record(tmp_path, "q"), [(TINY, "dgrad")], "vendor", 0.02) == 1
    (row,) = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert list(row["left_out"]) == ["ours"]
    assert row["backend"] == {"asked": "vendor", "ran": "reference"}
    assert row["median_s"] > 0


def test_what_hung_before_is_not_begun_again(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    wanted = [(TINY, "dgrad"), (replace(TINY, name="other"), "fprop"), (TINY, "wgrad")]
    without = {"tiny/dgrad/composition", "other/*/*", "tiny/wgrad/*"}
    more = (False, float("inf"), without)
    assert primitives.run_rows(Record(tmp_path, "q"), wanted, "vendor", 0.02, *more) == 1
    rows = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert [(row["verb"], list(row["left_out"])) for row in rows] == [
        ("dgrad", ["composition"]),
        ("wgrad", ["*"]),
    ]
    assert rows[0]["median_s"] > 0
    assert "median_s" not in rows[1]
    said = capsys.readouterr().out
    assert "begin tiny/dgrad/ours\n" in said  # before it begins


@pytest.mark.parametrize("kind", ["dense", "grouped", "self_group"])
def test_every_kind_of_support_has_its_rivals(tmp_path: Path, kind: str) -> None:
    value = {"dense": 1, "grouped": 2, "self_group": 60}[kind]
    spec = replace(het_case(2), kind=kind, value=value)  # type: ignore[arg-type]
    case = replace(TINY, name=kind, support=spec, c=16, f=32)
    bench = primitives.Bench(case, "vendor")
    assert {"ours", "dense"} <= set(bench.variants["dgrad"])
    assert ("composition" in bench.variants["fprop"]) == (kind != "dense")
    for verb in primitives.VERBS:
        assert all(bench.check(verb, name).ok for name in bench.variants[verb])


def test_the_quick_table_is_what_the_targets_are_stated_for() -> None:
    quick = primitives.rows_of(full=False)
    assert len(quick) == 6 * 4 * 3 + 6 + 6
    assert [verb for _, verb in quick].count("step") == 6
    assert quick[0][0].support == het_case(4)
    cases = [case.name for case, _ in quick]
    assert sum(a != b for a, b in pairwise(cases)) == 29  # the rows of a case stand together
    assert {name for name, _ in GPU_TARGETS} <= set(cases)
    # One image of each shape, behind the other rows of HetConv: what `auto` knows of launches.
    one = [(case.support, verb) for case, verb in quick if case.n != 128]
    assert one == [(het_case(4), "fprop")] * 6
    kinds = [case.support.kind == "het" for case, _ in quick]
    assert kinds == sorted(kinds, reverse=True)
    assert {case.n for case, _ in quick} == {128, 1}
    assert {case.dtype for case, _ in quick} == {"bfloat16"}
    full = primitives.rows_of(full=True)
    assert set(quick) < set(full)
    assert {case.n for case, _ in full} == {128, 32, 1}
    assert {case.dtype for case, _ in full} == {"bfloat16", "float16", "float32"}
    assert len({(case.name, verb) for case, verb in full}) == len(full)
    assert len(full) < 3 * (len(GPU_CASES) + 12)


def test_shards_share_out_the_cases() -> None:
    rows = primitives.rows_of(full=True)
    shards = [primitives.shard_of(rows, part, 7) for part in range(1, 8)]
    assert sorted((c.name, v) for shard in shards for c, v in shard) == sorted(
        (c.name, v) for c, v in rows
    )
    names = [{c.name for c, _ in shard} for shard in shards]
    assert sum(map(len, names)) == len(set().union(*names))
    for shard in shards:
        cases = [c.name for c, _ in shard]
        assert sum(a != b for a, b in pairwise(cases)) == len(set(cases)) - 1


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

    *_, found = tune.measured_entries(cases, (9, 0), measure, most=3)
    assert seen == [("fprop", 3), ("dgrad", 3), ("wgrad", 3)] * 2
    assert set(found) == {table.table_key(p, (9, 0)) for c in cases for p in tune.problems_of(c)}
    assert all(entry["seconds"] == 1e-5 for entry in found.values())
