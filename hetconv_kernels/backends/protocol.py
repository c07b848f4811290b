# SPDX-License-Identifier: Apache-2.0
"""What an engine offers, and what of it is kept once it was chosen: `Backend`, `Choice`, `Runner`.

Engines import it from here; `backends`, which imports the engines, chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ..problem import Problem

# A prepared primitive: called again and again with the tensors of the problem.
Runner = Callable[..., Any]

# How much faster than `vendor` a prediction must be where nothing was measured on this hardware.
UNMEASURED_MARGIN = 1.3


class Backend(Protocol):
    """What every engine offers.

    An engine whose tiles have sizes may say them in an attribute ``grain``: the filters and the
    channels that groups should have multiples of; and, where it is more than one, how many filters
    that follow each other should be in one group, and how many channels a group should fill.

    Attributes:
        name: one of `backends.CODES`.
    """

    name: str

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Lists, in sentences, why this engine cannot run the problem; empty when it can."""
        ...

    def estimate(self, problem: Problem) -> float:
        """Predicts the time of one call, pooling left out, in seconds."""
        ...

    def measured(self, problem: Problem) -> bool:
        """Tells whether the prediction rests on a measurement of this kind of hardware."""
        ...

    def efficiency(self, problem: Problem) -> float:
        """Returns useful over executed multiply-accumulates, at most 1."""
        ...

    def fprop(self, problem: Problem) -> Runner:
        """Prepares y = act(scale · conv(x, w) + shift + residual).

        An engine with a method ``pools(problem)`` that answers True computes max-pooling of it too.

        Returns:
            A callable (x, w, scale, shift, residual) -> y.  # [N, F, OH, OW]
        """
        ...

    def dgrad(self, problem: Problem) -> Runner:
        """Prepares the gradient of conv(x, w) by x.

        Returns:
            A callable (dy, w) -> dx.  # [N, C, H, W]
        """
        ...

    def wgrad(self, problem: Problem) -> Runner:
        """Prepares the gradient of conv(x, w) by w, dead entries zero, in `weight_dtype`.

        Returns:
            A callable (dy, x) -> dw.  # [F, C, KH, KW] or [live]
        """
        ...


class Choice(NamedTuple):
    """The engine that runs a problem, made ready.

    Attributes:
        backend: the engine.
        problem: what it runs.
        run: the prepared callable of the problem's verb.
    """

    backend: Backend
    problem: Problem
    run: Runner
