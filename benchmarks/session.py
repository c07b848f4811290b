# SPDX-License-Identifier: Apache-2.0
"""The first ten minutes on a GPU: what `make gpu` runs, so that each minute brings evidence.

    python -m benchmarks.session [--results DIR] [--seconds S] [...]

Builds; checks each part of each engine by itself (`benchmarks.smoke`); measures the table of the
primitives without the parts that failed (`benchmarks.primitives`); and runs the tests until the
time is over. Everything that may hang is a process of its own under watch. What is said goes to
``gpu.log`` beside the results at once, and both survive a kill. Arguments that it does not know go
to `benchmarks.primitives`. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import smoke
from benchmarks.watch import Log, end_on_term, restarted, run_watched

ROOT = Path(__file__).resolve().parents[1]
# Of the time: for the build at most, and left for the tests after the table.
_BUILD, _TESTS = 240.0, 60.0
# Seconds that a case of the table, or a test, may say nothing.
QUIET = 45.0
# Exit statuses of a table, and of pytest, that came to their end.
_TABLE, _PYTEST = (0, 1, 2), (0, 1, 5)


def tests() -> list[str]:
    """Lists the files with tests that want a GPU: CUDA's first, which compile nothing."""
    marked = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]
    names = [str(path.relative_to(ROOT)) for path in marked]
    first = ("gpu_cuda_wide", "gpu_cuda", "gpu_engines", "gpu_triton")
    order = {f"tests/test_{name}.py": place for place, name in enumerate(first)}
    return sorted(names, key=lambda name: order.get(name, len(first)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all of it; 1 when anything failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=smoke.RESULTS)
    parser.add_argument("--seconds", type=float, default=570.0, help="for all of it")
    parser.add_argument("--limit", type=float, default=40.0, help="seconds for a part's smoke test")
    parser.add_argument("--quiet", type=float, default=QUIET, help="seconds of silence = a hang")
    parser.add_argument("--python", default="", help="the interpreter with its own arguments")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--tests", nargs="*", default=None, help="instead of all tests for GPUs")
    options, more = parser.parse_known_args(arguments)
    end_on_term()
    started = time.monotonic()
    python = shlex.split(options.python) or [sys.executable]
    log = Log(options.results / "gpu.log")
    log(f"make gpu: {datetime.now(UTC).isoformat(timespec='seconds')}")
    failed = []

    def left() -> float:
        return options.seconds - (time.monotonic() - started)

    if not options.no_build:
        command = [*python, "setup.py", "--quiet", "build_ext", "--inplace"]
        built = run_watched(command, log, limit=min(_BUILD, left()))
        log(f"make gpu: the build took {built.seconds:.0f} s ({built.status})")
        failed += ["the build"] * (built.status != "ok")
    found = smoke.run_parts(smoke.CHECKS, python, options.limit, options.results, log)
    without = smoke.without(found)
    failed += [f"smoke test of {name}" for name in without]
    for name in without:
        log(f"make gpu: {name} is LEFT OUT: {smoke.left_out_because(name, found)}")
    environment = {"HETCONV_WITHOUT": ",".join(without)}
    for_table = max(left() - _TESTS, 60.0)
    command = [*python, "-m", "benchmarks.primitives", "--worker"]
    command += ["--results", str(options.results), "--budget", str(for_table - 20), *more]
    status, lost = restarted(
        command,
        log,
        limit=for_table,
        quiet=options.quiet,
        option="--leave-out",
        done=_TABLE,
        environment=environment,
    )
    log(f"make gpu: the table ended with exit status {status}, {left():.0f} s are left")
    failed += ["the table"] * (status != 0) + lost
    if status == 2:
        return 2
    command = [*python, "-m", "benchmarks.calibrate", "--device", "cuda"]
    command += ["--results", str(options.results)]
    command += ["--out", str(options.results / "gpu-constants.json")]
    fitted = run_watched(command, log, limit=max(min(60.0, left()), 20.0), environment=environment)
    log(f"make gpu: the constants of `auto` were {'' if fitted.status == 'ok' else 'not '}fitted")
    wanted = tests() if options.tests is None else options.tests
    if wanted:
        command = [*python, "-m", "pytest", "-m", "gpu", "-q", "-p", "benchmarks.announce", *wanted]
        status, lost = restarted(
            command,
            log,
            limit=max(left(), 30.0),
            quiet=options.quiet,
            option="--deselect",
            done=_PYTEST,
            environment=environment,
        )
        cut = " (cut short)" if status == 124 else ""
        log(f"make gpu: the tests ended with exit status {status}{cut}")
        failed += ["tests"] * (status not in (0, 124)) + lost
    words = ", ".join(re.sub(r"^tests/", "", name) for name in failed)
    outcome = f"FAILED: {words}" if words else "all right"
    log(f"make gpu: {time.monotonic() - started:.0f} s in all; {outcome}")
    log(f"make gpu: results and log are in {os.path.relpath(options.results)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
