# SPDX-License-Identifier: Apache-2.0
"""Tests shared out among processes: each file is run once, and a sample is a part of all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_parts
import pytest
from sampling import is_left
from tree import ROOT

FILES = ("tests/test_errors.py", "tests/test_seed_numbers.py")


def run(*arguments: str) -> str:
    """Runs pytest in a process; returns its output."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def passed(output: str) -> int:
    """Reads how many tests passed."""
    found = re.search(r"(\d+) passed", output)
    return int(found[1]) if found else 0


def test_what_one_process_took_no_other_runs(tmp_path: Path) -> None:
    both = passed(run(*FILES))
    first = passed(run("--share", str(tmp_path), FILES[0]))
    second = passed(run("--share", str(tmp_path), *FILES))
    assert first > 0
    assert second > 0
    assert first + second == both
    assert passed(run("--share", str(tmp_path), *FILES)) == 0


@pytest.mark.parametrize(
    ("engine", "file"),
    [
        ("cuda", "test_cuda_host.py"),
        ("triton", "test_aot.py"),
        ("triton", "interpreted/test_kernels.py"),
    ],
)
def test_samples_of_eight_days_are_all_tests_of_the_kernels_once(engine: str, file: str) -> None:
    kernels = [item(f"tests/{file}::test[{number}]") for number in range(100)]
    others = [item(f"tests/test_conv.py::test[{number}]") for number in range(100)]
    samples = [[each for each in kernels if not is_left(each, engine, day)] for day in range(8)]
    assert sorted(each.nodeid for sample in samples for each in sample) == sorted(
        each.nodeid for each in kernels
    )
    assert all(0 < len(sample) < 50 for sample in samples)
    assert not any(is_left(each, engine, 3) for each in others)


def test_a_sample_is_said_to_be_one() -> None:
    output = run("--collect-only", "tests/test_cuda_wide_tiles.py", FILES[0], "--cuda-sample", "3")
    assert re.search(r"\(\d+ deselected\)", output)


def item(nodeid: str) -> Any:
    """Stands in for an item of pytest."""
    return SimpleNamespace(nodeid=nodeid, path=Path(nodeid.split("::")[0]))


@pytest.mark.parametrize(
    ("path", "engines"),
    [
        ("csrc/cuda/narrow.h", {"cuda"}),
        ("csrc/cuda/wide_work.h", {"cuda"}),
        ("tests/shim.py", {"cuda"}),
        ("hetconv_kernels/backends/triton/fprop.py", {"triton"}),
        ("tests/interpreted/test_kernels.py", {"triton"}),
        ("hetconv_kernels/backends/gpu/axes.py", {"cuda", "triton"}),
        ("hetconv_kernels/support.py", {"cuda", "triton"}),
        ("hetconv_kernels/export.py", set()),
    ],
)
def test_the_digest_follows_what_the_kernels_are_made_from(
    path: str, engines: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = {e: in_parts.digest(e) for e in in_parts.SOURCES}, Path.read_bytes

    def changed(own: Path) -> bytes:
        return read(own) + (b" " if own == ROOT / path else b"")

    assert {e: in_parts.digest(e) for e in in_parts.SOURCES} == before
    monkeypatch.setattr(Path, "read_bytes", changed)
    assert {e for e, key in before.items() if in_parts.digest(e) != key} == engines


def test_code_counts_as_passed_by_the_record_or_a_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_parts, "PASSED", tmp_path / "passed")
    monkeypatch.setattr(in_parts, "RECORD", tmp_path / "record.json")
    assert in_parts.passed() == set()
    in_parts.RECORD.write_text(json.dumps({"cuda": in_parts.digest("cuda"), "triton": "other"}))
    assert in_parts.passed() == {"cuda"}
    in_parts.PASSED.mkdir()
    (in_parts.PASSED / in_parts.digest("triton")).touch()
    assert in_parts.passed() == {"cuda", "triton"}


def test_ci_runs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(in_parts, "_run", lambda arguments: given.append(arguments) or [1])
    monkeypatch.setattr(in_parts, "passed", lambda: {"cuda", "triton"})
    monkeypatch.setattr(sys, "argv", ["in_parts.py"])
    for value, options in (("true", 0), ("", 2)):
        monkeypatch.setenv("CI", value)
        in_parts.main()
        assert len(given.pop()) == options


def test_without_files_the_options_are_known_too() -> None:
    done = subprocess.run(
        [sys.executable, "tests/in_parts.py", "--markers"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "@pytest.mark.slow" in done.stdout
