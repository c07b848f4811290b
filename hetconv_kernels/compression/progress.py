# SPDX-License-Identifier: Apache-2.0
"""Progress: what a compression does at the moment, with rich on a terminal, in lines elsewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from typing import Any, TextIO


class _Stage:
    """Epochs in a row, from which the time of those to come follows.

    Attributes:
        name: of the stage.
        left: epochs that have not ended; a run that goes on has fewer than the stage.
        batches: of all epochs so far.
    """

    def __init__(self, name: str, left: int = 0) -> None:
        self.name, self.left = name, left
        self.batches = self._done = self._of_done = 0
        self._began = time.perf_counter()

    @property
    def of_this_epoch(self) -> int:
        """Batches since the last epoch ended."""
        return self.batches - self._of_done

    @property
    def total(self) -> int | None:
        """Batches of all epochs; None as long as no epoch has ended."""
        if not self._done:
            return None
        return self._of_done + self.left * self._of_done // self._done

    def epoch_ended(self, now: float) -> float:
        """Counts an epoch, and returns the seconds that the others will take."""
        if not self.left:
            return 0.0
        self._done, self._of_done, self.left = self._done + 1, self.batches, self.left - 1
        return (now - self._began) / self._done * self.left


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
        self._stage = _Stage("")
        self._bar: Any = None
        if shown and self.stream.isatty() and importlib.util.find_spec("rich") is not None:
            from rich import console, progress

            self._bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.TextColumn("{task.description}"),
                progress.TextColumn("batch {task.fields[batch]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=console.Console(file=self.stream),
            )
            self._task = self._bar.add_task("", total=None, batch=0)
            self._bar.start()

    def begin(self, what: str) -> None:
        """Says which round begins; of one that is an epoch, how many are to come is known."""
        name, left = _epochs(what)
        if name != self._stage.name:
            self._stage = _Stage(name, left)
            if self._bar is not None:  # the times of another stage say nothing of this one
                self._bar.reset(self._task)
        if self._bar is not None:
            self._bar.update(self._task, description=what, batch=0)

    def batch(self) -> None:
        """Counts a batch."""
        stage = self._stage
        stage.batches += 1
        if self._bar is not None:
            self._bar.update(
                self._task,
                total=stage.total,
                completed=stage.batches,
                batch=stage.of_this_epoch,
            )

    def end(self, number: int, what: str, result: object) -> None:
        """Says how a round ended."""
        if not self.shown:
            return
        now = time.perf_counter()
        left = self._stage.epoch_ended(now)
        more = f", {left:.0f} s left" if left >= 1 else ""
        self._line(f"[{number:3d}] {now - self.started:6.1f} s  {what}{_told(result)}{more}")

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


def _epochs(what: str) -> tuple[str, int]:
    """Splits the name of a round that is an epoch into its stage's, and the epochs from it on."""
    found = re.fullmatch(r"(.*), epoch (\d+)/(\d+)", what)
    return (found[1], int(found[3]) - int(found[2]) + 1) if found else (what, 0)


def _told(result: object) -> str:
    if isinstance(result, float):
        return f": {result:.4f}"
    if isinstance(result, dict):
        parts = [f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, int | float)]
        return f": {', '.join(parts)}" if parts else ""
    return "" if result is None or isinstance(result, list) else f": {result}"
