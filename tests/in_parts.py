# SPDX-License-Identifier: Apache-2.0
"""Runs all tests, a process for each core; `make test` without ARGS is this.

The processes take file after file, whoever is free. Tests of the CUDA kernels on the CPU are more
than a third of the time, and say the same while what they are made from is the same: after a run
that passed, a part of them is run, another one each day, until their sources change. CI runs all.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PASSED = ROOT / "build" / "cuda-tests"
MOST_PROCESSES = 4
# What the tests of the CUDA kernels depend on.
SOURCES = (
    "csrc/*.h",
    "csrc/cuda/*",
    "hetconv_kernels/backends/cuda/*.py",
    "hetconv_kernels/backends/gpu/*",
    *(f"hetconv_kernels/{name}.py" for name in ("masks", "ops", "packing", "problem", "support")),
    "hetconv_kernels/testing.py",
    "benchmarks/cases.py",
    "tests/native/cuda/*",
    "tests/test_cuda*.py",
    *(f"tests/{name}.py" for name in ("cuda_host", "narrow_cases", "shim")),
    "tests/wide_*.py",
)


def digest() -> str:
    """Names the state of all that the tests of the CUDA kernels depend on."""
    key = hashlib.sha256()
    for pattern in SOURCES:
        found = sorted(path for path in ROOT.glob(pattern) if path.is_file())
        assert found, f"nothing is named {pattern}"
        for path in found:
            key.update(path.name.encode() + path.read_bytes())
    return key.hexdigest()[:16]


def main() -> int:
    """Runs the processes, prints what each said, and returns the worst exit status."""
    count = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    key = digest()
    sample = not os.environ.get("CI") and (PASSED / key).exists()
    day = datetime.datetime.now(tz=datetime.UTC).toordinal()
    options = [f"--cuda-sample={day}"] if sample else []
    # Threads that wait leave the core to the other process.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", f"--share={folder}", *options, *sys.argv[1:]]
        logs = [Path(folder, f"{part}.log") for part in range(1, count)]
        others = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for log in logs
        ]
        states = [subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode]
        for log, process in zip(logs, others, strict=True):
            states.append(process.wait())
            print(f"\n== the tests of another process\n{log.read_text(errors='replace')}")
    print(f"exit status of each of {count} processes: {states}")
    if not any(states) and not sample and not sys.argv[1:]:
        PASSED.mkdir(parents=True, exist_ok=True)
        (PASSED / key).touch()
    return max(map(abs, states))


if __name__ == "__main__":
    sys.exit(main())
