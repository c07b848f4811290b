# SPDX-License-Identifier: Apache-2.0
"""Children under watch: a process that hangs is killed, and what it said is kept.

A kernel that never ends cannot be interrupted from inside its process: the wait for it answers to
no signal but SIGKILL. So whatever may hang runs in a process of its own, and says what it begins
*before* it begins, in a line that starts with `BEGIN`. Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

BEGIN = "begin "
# Seconds that a killed process has to go away, and lines of its output that are kept.
_GOING, _KEPT = 10.0, 200


class Ended(NamedTuple):
    """How a child ended.

    Attributes:
        status: ``ok``, ``failed`` or ``hung``.
        code: its exit status; None if it was killed here.
        begun: what it said last that it began; empty if nothing.
        lines: the last ones that it wrote.
        seconds: that it took.
    """

    status: str
    code: int | None
    begun: str
    lines: list[str]
    seconds: float


class Log:
    """Writes lines to the terminal and to a file, at once, so that a kill loses none.

    Args:
        path: of the file, which grows; None for the terminal alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._file: IO[str] | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", buffering=1, errors="replace")

    def __call__(self, line: str, shown: bool = True) -> None:
        """Writes a line; to the file alone where it is not to be shown."""
        if shown:
            with contextlib.suppress(BrokenPipeError):  # the reader went away, the file did not
                print(line, flush=True)
        if self._file is not None:
            self._file.write(line + "\n")


def run_watched(
    command: Sequence[str],
    log: Log,
    *,
    limit: float,
    quiet: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Runs a command in a session of its own, and kills all of it when it takes too long.

    Args:
        command: the program and its arguments.
        log: takes its output, line by line.
        limit: seconds that it may take.
        quiet: seconds that it may say nothing; None: as many as it may take.
        environment: variables that it has beside those of this process.
    """
    started = time.monotonic()
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        start_new_session=True,
    )
    said: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(child, said), daemon=True).start()
    lines: deque[str] = deque(maxlen=_KEPT)
    begun, heard, status = "", started, ""
    try:
        while not status:
            now = time.monotonic()
            end = min(started + limit, heard + quiet) if quiet is not None else started + limit
            if now >= end:
                status = "hung"
                break
            try:
                line = said.get(timeout=min(end - now, 1.0))
            except queue.Empty:
                if child.poll() is not None:  # somebody else holds its output open
                    status = "ok" if child.returncode == 0 else "failed"
                continue
            if line is None:
                break
            heard = time.monotonic()
            lines.append(line)
            if line.startswith(BEGIN):
                begun = line.removeprefix(BEGIN)
            log(line, shown=not line.startswith(BEGIN))
        if not status:
            try:
                status = "ok" if child.wait(max(1.0, end - time.monotonic())) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "hung"
    finally:
        _kill(child)
    code = None if status == "hung" else child.returncode
    return Ended(status, code, begun, list(lines), time.monotonic() - started)


def _read(child: subprocess.Popen[str], said: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    with contextlib.suppress(ValueError, OSError):
        for line in child.stdout:
            said.put(line.rstrip("\n"))
    said.put(None)


def _kill(child: subprocess.Popen[str]) -> None:
    """Ends the child and what it started; nothing waits for one that cannot be ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GOING)


def end_on_term() -> None:
    """Has SIGTERM end this process as an exception does, so that no child is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def restarted(
    command: Sequence[str],
    log: Log,
    *,
    limit: float,
    quiet: float,
    option: str,
    done: Sequence[int],
    environment: Mapping[str, str] | None = None,
    times: int = 12,
) -> tuple[int, list[str]]:
    """Runs a command again and again, each time without what hung or ended it.

    Args:
        command: the program and its arguments.
        log: takes its output.
        limit: seconds for all runs together.
        quiet: seconds that it may say nothing.
        option: what tells the command to leave out something that it had said it begins.
        done: exit statuses of a run that came to its end.
        environment: variables that it has beside those of this process.
        times: that it is started at most.

    Returns:
        Its last exit status (124: the time was over, 125: it ended it with nothing to blame); and
        what was left out.
    """
    started, without = time.monotonic(), list[str]()
    for _ in range(times):
        left = limit - (time.monotonic() - started)
        if left <= 0:
            return 124, without
        more = [word for name in without for word in (option, name)]
        ended = run_watched(
            [*command, *more], log, limit=left, quiet=quiet, environment=environment
        )
        if ended.code in done:
            return int(ended.code or 0), without
        if time.monotonic() - started >= limit:
            return 124, without
        how = "said nothing and was killed" if ended.status == "hung" else f"ended ({ended.code})"
        if not ended.begun or ended.begun in without:
            log(f"{how} with nothing new to leave out.")
            return 125, without
        log(f"{how} in {ended.begun}, which is LEFT OUT of what is run now.")
        without.append(ended.begun)
    return 125, without
