# SPDX-License-Identifier: Apache-2.0
"""Children under watch: what hangs is killed, what it said is kept, and the rest is run again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.watch import Log, restarted, run_watched

PYTHON = [sys.executable, "-c"]
DEAF = "import signal; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]\n"


@pytest.mark.parametrize(
    ("code", "status", "begun"),
    [
        ("print('begin a')", "ok", "a"),
        ("print('begin a'); raise SystemExit(3)", "failed", "a"),
        ("import os; print('begin b', flush=True); os._exit(139)", "failed", "b"),
        (DEAF + "print('begin a\\nbegin b')\nwhile True: pass", "hung", "b"),
        ("import time; time.sleep(60)", "hung", ""),
    ],
    ids=["ok", "failed", "ended", "deaf", "silent"],
)
def test_a_child_is_watched_to_its_end(code: str, status: str, begun: str, tmp_path: Path) -> None:
    started = time.monotonic()
    ended = run_watched([*PYTHON, code], Log(tmp_path / "log"), limit=2.0)
    assert (ended.status, ended.begun) == (status, begun)
    assert (ended.code is None) == (status == "hung")
    assert time.monotonic() - started < 30
    # What was said before the kill is in the log.
    assert (tmp_path / "log").read_text() == "".join(f"{line}\n" for line in ended.lines)


def test_silence_is_a_hang_and_words_are_none(tmp_path: Path) -> None:
    code = "import time\nfor i in range(8): print(i, flush=True); time.sleep(0.25)"
    assert run_watched([*PYTHON, code], Log(), limit=60, quiet=20).status == "ok"
    silent = "import time\nprint(1, flush=True)\ntime.sleep(60)"
    assert run_watched([*PYTHON, silent], Log(), limit=60, quiet=1.5).status == "hung"


def test_a_grandchild_does_not_outlive_the_hang(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    ended = run_watched([*PYTHON, code], Log(), limit=2.0)
    assert ended.status == "hung"
    assert gone(int(ended.lines[0]))


def gone(process: int) -> bool:
    """Tells whether a process ends within seconds; a zombie, whom nobody asks for, has ended."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


ROWS = """
import sys, time
without = sys.argv[2::2]
for name in "abcd":
    print("begin", name, flush=True)
    if name in without: continue
    if name == "b": time.sleep(60)
    if name == "c": raise SystemExit(3)
    print("row", name, flush=True)
raise SystemExit(1 if without else 0)
"""


def test_what_hangs_or_ends_a_table_is_left_out_of_the_next_one(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    status, without = restarted(
        [*PYTHON, ROWS], log, limit=60, quiet=1.5, option="--leave-out", done=(0, 1)
    )
    assert (status, without) == (1, ["b", "c"])
    said = (tmp_path / "log").read_text()
    assert said.count("row a") == 3
    assert said.count("row d") == 1
    assert "killed in b, which is LEFT OUT" in said
    assert "ended (3) in c, which is LEFT OUT" in said


@pytest.mark.parametrize(
    ("code", "limit", "status"),
    [
        ("raise SystemExit(7)", 60, 125),
        ("print('begin a'); raise SystemExit(7)", 60, 125),  # again, though left out
        ("import time\nwhile True: print('begin a', flush=True); time.sleep(0.1)", 1.5, 124),
    ],
    ids=["nothing to blame", "the same again", "no time left"],
)
def test_it_does_not_go_on_for_ever(code: str, limit: float, status: int) -> None:
    got, _ = restarted([*PYTHON, code], Log(), limit=limit, quiet=30, option="-x", done=(0,))
    assert got == status


def test_a_terminated_watcher_leaves_no_child(tmp_path: Path) -> None:
    code = (
        "from benchmarks.watch import *\nimport sys\nend_on_term()\n"
        "run_watched([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); "
        "time.sleep(600)'], Log(), limit=600)"
    )
    watcher = subprocess.Popen([*PYTHON, code], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    child = int(watcher.stdout.readline())
    watcher.send_signal(signal.SIGTERM)
    assert watcher.wait(30) == 143
    assert gone(child)
