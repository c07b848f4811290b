# SPDX-License-Identifier: Apache-2.0
"""Goal and until: repeat a step of pruning until accuracy or work says stop, and take back the
step that was one too many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .run import Run
from .schedule import check_count, check_fraction, check_positive


@dataclass(frozen=True)
class Goal:
    """When to stop.

    Attributes:
        tolerance: the loss of accuracy that is allowed, in the unit of ``evaluate``.
        target: the fraction of multiply-accumulates that is enough to remove.
        steps: at most so many.

    Raises:
        ArgumentError: a value out of range.
    """

    tolerance: float
    target: float
    steps: int

    def __post_init__(self) -> None:
        check_positive("tolerance", self.tolerance, zero=True)
        check_fraction("target", self.target)
        check_count("number of steps", self.steps, 1)


def until(run: Run, goal: Goal, step: Callable[[int], bool]) -> None:
    """Repeats ``step`` while the accuracy is within the tolerance and the target not reached.

    Args:
        run: the network.
        goal: when to stop.
        step: does one step in rounds, given its number; False when there is nothing left to do.
    """
    baseline = run.evaluate("accuracy at the start")
    assert baseline is not None
    dense = run.round("work at the start", run.macs)
    for number in range(1, goal.steps + 1):
        run.round(f"keep before {number}", lambda: run.snapshot("good"))
        if not step(number):
            run.note(f"it found nothing more to remove in step {number}")
            return
        accuracy = run.evaluate(f"accuracy after {number}")
        assert accuracy is not None
        if accuracy < baseline - goal.tolerance:
            run.round(f"take back {number}", lambda: _revert(run))
            run.note(f"step {number} cost more than the tolerance and was taken back")
            return
        if run.round(f"work after {number}", run.macs) <= (1 - goal.target) * dense:
            return


def _revert(run: Run) -> Any:
    run.revert("good")
    return run.macs()
