# SPDX-License-Identifier: Apache-2.0
"""The comparison of two results files: what counts as slower, and what cannot be compared."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
Json = dict[str, Any]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def old() -> Json:
    data = json.loads((RESULTS / "layers-full-avx2.json").read_text())
    data["rows"] = data["rows"][:4]
    return dict(data)


def slowed(data: Json, ours: float, dense: float, rows: slice = slice(1)) -> Json:
    """Returns the file as it would be had our layers and the dense ones taken longer."""
    data = copy.deepcopy(data)
    for row in data["rows"][rows]:
        for name, variant in row["timings"]["variants"].items():
            factor = ours if name.startswith("ours") else dense
            variant["samples_s"] = [s * factor for s in variant["samples_s"]]
            variant["median_s"] *= factor
        for field in ("ratio", "low", "high"):
            row["dense"][field] *= dense / ours
    return data


def run(tmp_path: Path, old: Json, new: Json, *options: str) -> int:
    for name, data in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])


@pytest.mark.parametrize(
    ("ours", "dense", "verdict", "code"),
    [
        (1.0, 1.0, "same", 0),
        (1.5, 1.0, "slower", 1),
        (0.5, 1.0, "faster", 0),
        (1.5, 1.5, "drift", 0),
        (2.0, 1.4, "unsteady", 2),
        (0.5, 0.7, "unsteady", 2),
        (1.02, 1.0, "same", 0),
    ],
)
def test_verdicts(
    tmp_path: Path, capsys: Capture, old: Json, ours: float, dense: float, verdict: str, code: int
) -> None:
    new = slowed(old, ours, dense)
    first, *others = compare.compare_rows(old, new, 0.05)
    assert first.verdict == verdict
    assert {c.verdict for c in others} == {"same"}
    assert first.ours is not None
    assert first.ours.low <= first.ours.value <= first.ours.high
    assert first.ours.value == pytest.approx(1 / ours)
    assert first.beside_dense is not None
    assert first.beside_dense.value == pytest.approx(dense / ours)
    assert run(tmp_path, old, new) == code
    text = capsys.readouterr().out
    assert ("<--" in text) == (code == 1)
    assert ("SLOWER" in text) == (code == 1)


def test_wide_intervals_hide_nothing_and_accuse_nobody(old: Json) -> None:
    """The same medians from samples that scatter: the interval covers 1."""
    new = slowed(old, 1.3, 1.0)
    samples = new["rows"][0]["timings"]["variants"]["ours"]["samples_s"]
    new["rows"][0]["timings"]["variants"]["ours"]["samples_s"] = [
        s * (0.5 if i % 2 else 1.5) for i, s in enumerate(samples)
    ]
    assert compare.compare_rows(old, new, 0.05)[0].verdict != "slower"


def test_dispatch_is_compared_beside_dense_too() -> None:
    old = json.loads((RESULTS / "dispatch-full.json").read_text())
    for factors, verdict in (((1.6, 1.6), "drift"), ((1.6, 1.0), "slower")):
        new = copy.deepcopy(old)
        for name, factor in zip(("ours", "dense"), factors, strict=True):
            variant = new["rows"][0]["timings"]["variants"][name]
            variant["samples_s"] = [s * factor for s in variant["samples_s"]]
        assert compare.compare_rows(old, new, 0.05)[0].verdict == verdict


def test_a_wrong_result_fails_and_a_right_one_does_not(tmp_path: Path, old: Json) -> None:
    new = copy.deepcopy(old)
    row = new["rows"][0]
    row["match"] = {"ok": False, "worst": None, "max_error": None}
    for field in ("timings", "median_s", "dense", "verdict"):
        del row[field]
    assert run(tmp_path, old, new) == 1
    assert run(tmp_path, new, old) == 0
    assert compare.compare_rows(new, old, 0.05)[0].verdict == "right again"


def test_rows_that_ask_another_question_are_not_compared(old: Json) -> None:
    new = copy.deepcopy(old)
    new["rows"][0]["case"]["h"] = 99
    new["rows"][1]["support"]["digest"] = "other"
    new["rows"][2]["timings"]["cold"] = True
    new["rows"][3]["case"]["name"] = "renamed"
    new["rows"][3]["case"]["target"] = 9.0
    verdicts = [c.verdict for c in compare.compare_rows(old, new, 0.05)]
    assert verdicts == [
        "another case: h", "another Support", "cold: False then, True now", "gone", "new",
    ]  # fmt: skip


@pytest.mark.parametrize("field", ["processor", "threads", "instructions"])
def test_other_hardware_is_refused_unless_asked_for(
    tmp_path: Path, capsys: Capture, old: Json, field: str
) -> None:
    new = copy.deepcopy(old)
    new["environment"][field] = "another"
    assert run(tmp_path, old, new) == 2
    assert "the hardware differs" in capsys.readouterr().err
    assert run(tmp_path, old, new, "--across") == 0
    assert f"WARNING: {field}" in capsys.readouterr().out


def test_other_versions_are_said_loudly(tmp_path: Path, capsys: Capture, old: Json) -> None:
    new = copy.deepcopy(old)
    new["environment"]["torch"] = "9.9"
    assert run(tmp_path, old, new) == 0
    text = capsys.readouterr().out
    assert "WARNING: torch: 2.13.0+cpu then, 9.9 now" in text
    assert old["environment"]["commit"] in text


def test_what_is_no_results_file_is_refused(tmp_path: Path, capsys: Capture, old: Json) -> None:
    assert compare.main([str(tmp_path / "gone"), str(tmp_path / "gone")]) == 2
    assert "is no file" in capsys.readouterr().err
    assert run(tmp_path, old, {"schema": 1}) == 2
    assert "no results file" in capsys.readouterr().err
    (tmp_path / "bad").write_text("{")
    assert compare.main([str(tmp_path / "bad")] * 2) == 2
    empty = {**old, "rows": []}
    assert run(tmp_path, old, empty) == 2
    assert "no case in common" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main(["a", "b", "--tolerance", "2"])


def test_every_kind_of_committed_row_is_compared_with_itself(capsys: Capture) -> None:
    for path in RESULTS.glob("*.json"):
        assert compare.main([str(path), str(path)]) == 0, path.name
        data = json.loads(path.read_text())
        changes = compare.compare_rows(data, data, 0.05)
        assert {c.verdict for c in changes} <= {"same"}, path.name
        assert all(c.ours is not None and c.ours.value == 1 for c in changes)
    assert "0 slower" in capsys.readouterr().out


def test_two_commits_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: Json) -> None:
    """A repository of its own, with two versions of one results file."""

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True,
                       capture_output=True)  # fmt: skip

    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    git("init", "-q")
    for data in (old, slowed(old, 2.0, 1.0)):
        (folder / "layers-x.json").write_text(json.dumps(data))
        git("add", ".")
        git("commit", "-q", "-m", "measured")
    monkeypatch.setattr(compare, "__file__", str(tmp_path / "benchmarks" / "compare.py"))
    assert compare.main(["HEAD~1", "HEAD", "--results", "layers-x.json"]) == 1
    assert compare.main(["HEAD", "HEAD~1", "--results", "layers-x"]) == 0
    path = "benchmarks/results/layers-x.json"
    assert compare.main([f"HEAD~1:{path}", str(folder / "layers-x.json")]) == 1
    assert compare.main(["HEAD~9", "HEAD", "--results", "layers-x"]) == 2
