# SPDX-License-Identifier: Apache-2.0
"""Progress: what a compression does at the moment, with rich on a terminal, in lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any, TextIO


class Progress:
    """Shows the rounds of a run.

    Args:
        shown: False shows nothing.
        stream: where to; by default the standard error, so that a report can be piped.
    """

    def __init__(self, shown: bool = True, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.shown = shown
        self.started = time.perf_counter()
        self._bar: Any = None
        if shown and self.stream.isatty() and importlib.util.find_spec("rich") is not None:
            from rich import console, progress

            self._bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.TextColumn("{task.description}"),
                progress.TextColumn("batch {task.completed:.0f}"),
                progress.TimeElapsedColumn(),
                console=console.Console(file=self.stream),
            )
            self._task = self._bar.add_task("", total=None)
            self._bar.start()

    def begin(self, what: str) -> None:
        """Says which round begins."""
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=0)

    def batch(self) -> None:
        """Counts a batch."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1)

    def end(self, number: int, what: str, result: object) -> None:
        """Says how a round ended."""
        if not self.shown:
            return
        seconds = time.perf_counter() - self.started
        self._line(f"[{number:3d}] {seconds:6.1f} s  {what}{_told(result)}")

    def resumed(self, number: int) -> None:
        """Says which round a run that was killed goes on with; the others are in its state.

        Args:
            number: of the round, as `end` shows it.
        """
        if self.shown:
            self._line(f"resumed at round {number}")

    def _line(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Ends the display."""
        if self._bar is not None:
            self._bar.stop()


def _told(result: object) -> str:
    if isinstance(result, float):
        return f": {result:.4f}"
    if isinstance(result, dict):
        parts = [f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, int | float)]
        return f": {', '.join(parts)}" if parts else ""
    return "" if result is None or isinstance(result, list) else f": {result}"
