# SPDX-License-Identifier: Apache-2.0
"""Runs all tests, a process for each core; `make test` without ARGS is this.

The processes take file after file, whoever is free. Tests of the GPU engines' code (the CUDA
kernels on the CPU, Triton's in its interpreter, what nvcc and Triton compile, and `make gpu` as a
rehearsal) are more than a third of the time, and say the same while what they are made from is the
same: where all of them passed on these sources, here or as ``tests/gpu_code.json`` records, an
eighth of them is run, another one each day. In CI that record alone counts, so a change of those
sources is tested whole there until it is recorded with them.

    python tests/in_parts.py --record

runs those tests alone, all of them, and writes that record.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sampling import FILES

ROOT = Path(__file__).resolve().parents[1]
PASSED = ROOT / "build" / "gpu-code-tests"
RECORD = ROOT / "tests" / "gpu_code.json"
MOST_PROCESSES = 4
# What the tests of an engine's code depend on.
_BOTH = (
    "hetconv_kernels/backends/gpu/*",
    *(f"hetconv_kernels/{name}.py" for name in ("masks", "ops", "packing", "problem", "support")),
    "hetconv_kernels/testing.py",
    "tests/sampling.py",
)
SOURCES = {
    "cuda": (
        *_BOTH,
        "csrc/*.h",
        "csrc/cuda/*",
        "hetconv_kernels/backends/cuda/*.py",
        "benchmarks/cases.py",
        "tests/native/cuda/*",
        "tests/test_cuda*.py",
        *(
            f"tests/{name}.py"
            for name in ("cuda_host", "machine_code", "machine_limits", "narrow_cases", "shim")
        ),
        "tests/wide_*.py",
    ),
    "triton": (
        *_BOTH,
        "hetconv_kernels/backends/triton/*",
        "tests/interpreted/*.py",
        *(f"tests/{name}.py" for name in ("aot", "shipped", "test_aot")),
    ),
    "session": (
        *_BOTH,
        *(f"benchmarks/{name}.py" for name in ("announce", "bench", "cases", "primitives")),
        *(f"benchmarks/{name}.py" for name in ("session", "smoke", "watch")),
        "hetconv_kernels/backends/cuda/*.py",
        "hetconv_kernels/backends/triton/*",
        *(f"tests/{name}.py" for name in ("pretending", "rehearsal", "stand_in")),
        "tests/test_rehearsal.py",
        "tests/test_session.py",
    ),
}
# The interpreter is started by this one.
_STARTERS = {"triton": ("test_triton",)}


def digest(engine: str) -> str:
    """Names the state of all that the tests of an engine's code depend on."""
    key = hashlib.sha256()
    for pattern in SOURCES[engine]:
        found = sorted(path for path in ROOT.glob(pattern) if path.is_file())
        assert found, f"nothing is named {pattern}"
        for path in found:
            key.update(path.name.encode() + path.read_bytes())
    return key.hexdigest()[:16]


def passed() -> set[str]:
    """Lists the engines whose code is what all its tests passed on, here or as recorded."""
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    found = {engine: digest(engine) for engine in SOURCES}
    here = {e for e, key in found.items() if (PASSED / key).exists() and not os.environ.get("CI")}
    return here | {e for e, key in found.items() if recorded.get(e) == key}


def main() -> int:
    """Runs the processes, prints what each said, and returns the worst exit status."""
    arguments = sys.argv[1:]
    recording = arguments == ["--record"]
    if recording:
        names = [name for engine in FILES for name in (*FILES[engine], *_STARTERS.get(engine, ()))]
        code = {path for name in names for path in ROOT.glob(f"tests/{name}*.py")}
        arguments = [str(path.relative_to(ROOT)) for path in sorted(code)]
    keys = {engine: digest(engine) for engine in SOURCES}
    sampled = set() if recording else passed()
    day = datetime.datetime.now(tz=datetime.UTC).toordinal()
    options = [f"--{engine}-sample={day}" for engine in sorted(sampled)]
    print(f"samples: {' '.join(options) or 'none, everything is run'}", flush=True)
    states = _run(options + arguments)
    print(f"exit status of each of {len(states)} processes: {states}")
    if not any(states) and (recording or not sys.argv[1:]):
        PASSED.mkdir(parents=True, exist_ok=True)
        for engine in keys.keys() - sampled:
            (PASSED / keys[engine]).touch()
        if recording:
            RECORD.write_text(json.dumps(keys, indent=1) + "\n")
    return max(map(abs, states))


def _run(arguments: list[str]) -> list[int]:
    """Runs pytest in a process for each core; returns their exit statuses."""
    count = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    # Threads that wait leave the core to the other process.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    # The tests start hundreds of processes, which need not compile the package's Python each anew.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", f"--share={folder}", *arguments]
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
    return states


if __name__ == "__main__":
    sys.exit(main())
