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
from xml.etree import ElementTree

import in_parts
import pytest
from sampling import is_left, is_ours
from tree import ROOT

FILES = ("tests/test_errors.py", "tests/test_tables.py", "tests/test_citation.py")


def test_what_one_process_took_no_other_runs(tmp_path: Path) -> None:
    """Two processes, at once as always."""
    shared = tmp_path / "shared"
    shared.mkdir()
    lists = [tmp_path / f"{part}.xml" for part in "ab"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES]
    processes = [
        subprocess.Popen(
            [*command, f"--share={shared}", f"--junitxml={ran}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for ran in lists
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    names = [
        (case.get("classname"), case.get("name"))
        for ran in lists
        for case in ElementTree.parse(ran).iter("testcase")
    ]
    assert len(names) == len(set(names))
    assert {str(file).replace(".", "/") + ".py" for file, _ in names} == set(FILES)
    taken = {path.name for path in shared.iterdir()}
    assert taken == {file.replace("/", "-") for file in FILES}


def test_a_file_is_the_first_one_s_that_asks(tmp_path: Path) -> None:
    ours = is_ours.__wrapped__  # without what this process remembers
    files = [Path("tests/test_a.py"), Path("tests/interpreted/test_a.py")]
    assert [ours(tmp_path, file) for file in (*files, *files)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("engine", "file"),
    [
        ("cuda", "test_cuda_host.py"),
        ("triton", "test_aot.py"),
        ("triton", "interpreted/test_kernels.py"),
        ("session", "test_session.py"),
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
    output = in_parts_says(
        "--collect-only", "tests/test_cuda_wide_tiles.py", FILES[0], "--cuda-sample", "3"
    )
    assert re.search(r"\(\d+ deselected\)", output)


def item(nodeid: str) -> Any:
    """Stands in for an item of pytest."""
    return SimpleNamespace(nodeid=nodeid, path=Path(nodeid.split("::")[0]))


@pytest.mark.parametrize(
    ("path", "engines"),
    [
        ("csrc/cuda/narrow.h", {"cuda"}),
        ("benchmarks/session.py", {"session"}),
        ("benchmarks/cases.py", {"cuda", "session"}),
        ("csrc/cuda/wide_work.h", {"cuda"}),
        ("tests/shim.py", {"cuda"}),
        ("hetconv_kernels/backends/triton/fprop.py", {"triton", "session"}),
        ("tests/interpreted/test_kernels.py", {"triton"}),
        ("hetconv_kernels/backends/gpu/axes.py", {"cuda", "triton", "session"}),
        ("hetconv_kernels/support.py", {"cuda", "triton", "session"}),
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
    monkeypatch.setenv("CI", "")
    assert in_parts.passed() == set()
    in_parts.RECORD.write_text(json.dumps({"cuda": in_parts.digest("cuda"), "triton": "other"}))
    assert in_parts.passed() == {"cuda"}
    in_parts.PASSED.mkdir()
    (in_parts.PASSED / in_parts.digest("triton")).touch()
    assert in_parts.passed() == {"cuda", "triton"}


def test_ci_believes_the_record_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(in_parts, "_run", lambda arguments: given.append(arguments) or [1])
    monkeypatch.setattr(in_parts, "PASSED", tmp_path)
    monkeypatch.setattr(in_parts, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(sys, "argv", ["in_parts.py"])
    for engine in in_parts.SOURCES:
        (tmp_path / in_parts.digest(engine)).touch()
    in_parts.RECORD.write_text(json.dumps({"cuda": in_parts.digest("cuda"), "triton": "old"}))
    for value, sampled in (("true", ["cuda"]), ("", sorted(in_parts.SOURCES))):
        monkeypatch.setenv("CI", value)
        in_parts.main()
        assert [option.partition("-sample")[0] for option in given.pop()] == [
            f"--{engine}" for engine in sampled
        ]


def test_a_record_takes_every_file_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(in_parts, "_run", lambda arguments: given.append(arguments) or [1])
    monkeypatch.setattr(in_parts, "passed", lambda: set(in_parts.SOURCES))
    monkeypatch.setattr(sys, "argv", ["in_parts.py", "--record"])
    assert in_parts.main() == 1
    (files,) = given
    assert {"tests/test_cuda.py", "tests/test_aot.py", "tests/test_triton.py"} < set(files)
    assert "tests/test_session.py" in files
    assert not [file for file in files if file.startswith("--")]


def test_without_files_the_options_are_known_too() -> None:
    assert "@pytest.mark.slow" in in_parts_says("--markers")


def in_parts_says(*arguments: str) -> str:
    """Runs in_parts.py as on a machine with one core; returns its output."""
    script = "import os, runpy, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    script += "; sys.path.insert(0, 'tests'); runpy.run_path('tests/in_parts.py', None, '__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
