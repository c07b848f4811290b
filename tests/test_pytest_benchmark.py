# SPDX-License-Identifier: Apache-2.0
"""The options of pytest-benchmark do here what its users expect of them, beside our own record."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import pytest

pytest.importorskip("pytest_benchmark", reason="the dev extra is not installed")
ROOT = Path(__file__).parents[1]
# One row of the cheapest benchmark, by the name that pytest gives it.
ROW = "test_dispatch[vendor-without-grad]"


def bench(folder: Path, *options: str, rows: str = ROW) -> tuple[int, str]:
    """Runs one benchmark in a process of its own; returns pytest's exit code and what it said."""
    done = fresh.python(
        "", "-p", "no:cacheprovider", "--rootdir", str(ROOT),
        f"{ROOT / 'benchmarks' / 'test_dispatch.py'}::{rows}",
        "--results", str(folder / "results"), "--seconds", "0.2",
        f"--benchmark-storage={folder / 'storage'}", *options, module="pytest",
    )  # fmt: skip
    # The row asserts a speed, which a busy machine may miss; that is not what is asked here.
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode, done.stderr + done.stdout


def counted(said: str, word: str) -> int:
    """Reads a number off pytest's closing line."""
    words = said.rstrip().splitlines()[-1].replace(",", "").split()
    return int(words[words.index(word) - 1]) if word in words else 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that saved itself in every way, twice."""
    folder = tmp_path_factory.mktemp("benchmark")
    bench(folder, "--benchmark-autosave", f"--benchmark-json={folder / 'run.json'}")
    return folder


def test_json_has_our_row_with_hardware_and_the_rounds(saved: Path) -> None:
    data = json.loads((saved / "run.json").read_text())
    (found,) = data["benchmarks"]
    assert found["name"] == ROW
    assert found["stats"]["rounds"] == len(found["stats"]["data"]) > 5
    assert 0 < found["stats"]["median"] < 1, "seconds of a call"
    ours = found["extra_info"]
    assert ours["kind"] == "dispatch"
    assert ours["environment"]["threads"] > 0
    own = json.loads((saved / "results" / "dispatch-quick.json").read_text())
    assert [row["extra_us"] for row in own["rows"]] == [ours["extra_us"]]


def test_autosave_numbers_the_runs(saved: Path) -> None:
    (file,) = (saved / "storage").rglob("*.json")
    assert file.name.startswith("0001_")
    assert json.loads(file.read_text())["benchmarks"][0]["name"] == ROW


def test_a_run_is_set_beside_the_saved_one_in_the_columns_that_are_asked_for(saved: Path) -> None:
    options = ("--benchmark-only", "--benchmark-compare", "--benchmark-columns=min,ops")
    _, said = bench(saved, *options)
    assert "(0001_" in said
    assert "(NOW)" in said
    table = next(line for line in said.splitlines() if line.startswith("Name (time in"))
    assert "Min" in table
    assert "OPS" in table
    assert "Median" not in table
    assert counted(said, "skipped") == 0
    assert counted(said, "passed") + counted(said, "failed") == 1


def test_a_comparison_fails_where_it_is_asked_to(saved: Path) -> None:
    data = json.loads(next((saved / "storage").rglob("0001_*.json")).read_text())
    stats = data["benchmarks"][0]["stats"]
    for key in ("min", "max", "mean", "median", "q1", "q3"):
        stats[key] /= 1000  # as if it had been that much faster
    data["benchmarks"][0]["stats"] = stats
    faster = next((saved / "storage").rglob("0001_*.json")).with_name("0002_faster.json")
    faster.write_text(json.dumps(data))
    code, said = bench(saved, "--benchmark-compare=0002", "--benchmark-compare-fail=median:500%")
    assert code == 1
    assert "Performance has regressed" in said
    faster.unlink()


def test_skip_runs_none(tmp_path: Path) -> None:
    code, said = bench(tmp_path, "--benchmark-skip")
    assert (code, counted(said, "skipped")) == (0, 1)
    assert "Median" not in said


def test_histogram_draws_one(tmp_path: Path) -> None:
    pytest.importorskip("pygal", reason="pytest-benchmark's histogram extra is not installed")
    bench(tmp_path, f"--benchmark-histogram={tmp_path / 'figure'}")
    (figure,) = tmp_path.glob("figure*.svg")
    assert "test_dispatch" in figure.read_text()
