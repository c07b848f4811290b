# SPDX-License-Identifier: Apache-2.0
"""Fresh processes in a moment: children of one that has imported torch, and nothing of ours.

What such a child imports, sets or breaks, no other one sees. A test whose subject is how a process
starts (its command line, hash seed, OpenMP runtime or exit) starts a real one instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
# The parent of all: for each line that it reads it forks a child, and writes how that ended.
_PARENT = """
import json, os, runpy, sys, traceback, types
import torch
for name in sys.argv[1:]:
    __import__(name)
for line in sys.stdin:
    told = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(told["out"][number - 1], os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(told["cwd"])
    sys.path[:0] = [told["cwd"]]
    sys.argv = ["-c", *told["arguments"]]
    code = 0
    try:
        if told["module"]:
            runpy.run_module(told["module"], run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(told["code"], "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


class _Parent:
    """The process whose children are given away."""

    def __init__(self, imported: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PARENT, *imported],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lock = threading.Lock()

    def run(self, told: Mapping[str, object]) -> int:
        source, answers = self.process.stdin, self.process.stdout
        assert source is not None
        assert answers is not None
        with self.lock:
            source.write(json.dumps(told) + "\n")
            source.flush()
            return int(answers.readline())


@cache
def _parent(*imported: str) -> _Parent:
    return _Parent(imported)


def python(
    code: str = "",
    *arguments: str,
    module: str = "",
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    imported: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Runs code, or a module as ``python -m`` does, in a fresh process.

    Args:
        code: Python.
        *arguments: the rest of ``sys.argv``.
        module: in the place of code.
        environment: beside this process's own, or in its place.
        cwd: the current directory, which is on ``sys.path`` too.
        imported: modules, none of ours, that the process has at its start beside torch.
    """
    files: Sequence[IO[str]] = [tempfile.NamedTemporaryFile("r") for _ in "oe"]  # noqa: SIM115
    try:
        told = {
            "code": code,
            "module": module,
            "arguments": arguments,
            "environment": {**os.environ, **(environment or {})},
            "cwd": str(cwd),
            "out": [file.name for file in files],
        }
        status = _parent(*imported).run(told)
        out, err = (file.read() for file in files)
    finally:
        for file in files:
            file.close()
    return subprocess.CompletedProcess([code or module, *arguments], status, out, err)
