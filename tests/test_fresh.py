# SPDX-License-Identifier: Apache-2.0
"""Fresh processes: they know nothing of one another, and end as a process of Python does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import fresh
import pytest


@pytest.mark.parametrize(
    ("code", "status", "out", "err"),
    [
        ("print('a'); raise SystemExit(3)", 3, "a\n", ""),
        ("import sys; sys.exit('a sentence')", 1, "", "a sentence\n"),
        ("1 / 0", 1, "", "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "", ""),
        ("import os; os.write(1, b'raw')", 0, "raw", ""),
        ("print(input())", 1, "", "EOFError: EOF when reading a line\n"),
    ],
    ids=["status", "sentence", "exception", "killed", "descriptor", "no input"],
)
def test_it_ends_as_a_process_does(code: str, status: int, out: str, err: str) -> None:
    done = fresh.python(code)
    assert (done.returncode, done.stdout) == (status, out)
    assert done.stderr.endswith(err)


def test_what_one_did_the_next_does_not_see(tmp_path: Path) -> None:
    first = "import os, sys, torch; os.environ['A'] = '1'; sys.modules['json'] = None; torch.a = 1"
    assert fresh.python(first, cwd=tmp_path).returncode == 0
    second = (
        "import os, sys, torch\n"
        "print(os.environ.get('A'), 'hetconv_kernels' in sys.modules, hasattr(torch, 'a'))\n"
        "import json; print(sys.argv, os.getcwd(), __name__)"
    )
    done = fresh.python(second, "x", "y")
    said = ["None False False", f"{['-c', 'x', 'y']} {fresh.ROOT} __main__"]
    assert done.stdout.splitlines() == said, done.stderr


def test_it_has_the_environment_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETCONV_OWN", "now")
    code = "import os; print(os.environ['HETCONV_OWN'], os.environ['HETCONV_GIVEN'])"
    done = fresh.python(code, environment={"HETCONV_GIVEN": "it"})
    assert done.stdout == "now it\n"
    assert "HETCONV_GIVEN" not in os.environ


def test_a_module_runs_as_by_python_m() -> None:
    done = fresh.python("", "--version", module="hetconv_kernels")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hetconv ")
