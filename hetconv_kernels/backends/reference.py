# SPDX-License-Identifier: Apache-2.0
"""`reference`: the meaning of the primitives in plain PyTorch, for every device and dtype."""

from __future__ import annotations

from torch import Tensor

from ..packing import dense_weight
from ..problem import Problem
from ..reference import group_dgrad, group_fprop, group_wgrad
from ..support import Support
from .common import epilogue, weight_gradient
from .dense_cost import dense_seconds
from .protocol import Runner


class Reference:
    """One ``index_select`` and one ``F.conv2d`` per group, put into place."""

    name = "reference"

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Nothing is refused."""
        return []

    def estimate(self, problem: Problem) -> float:
        """Predicts the time from the work of the groups at a dense engine's rate, in seconds."""
        launches = 3 * len(problem.support.groups)
        return dense_seconds(problem, _work(problem.support), launches)

    def measured(self, problem: Problem) -> bool:
        """The prediction rests on nominal rates."""
        return False

    def efficiency(self, problem: Problem) -> float:
        """A group multiplies all taps of every channel that it reads."""
        return problem.support.density / max(_work(problem.support), 1e-30)

    def fprop(self, problem: Problem) -> Runner:
        """Prepares y = act(scale · conv(x, w) + shift + residual)."""

        def run(
            x: Tensor,
            w: Tensor,
            scale: Tensor | None,
            shift: Tensor | None,
            residual: Tensor | None,
        ) -> Tensor:
            y = group_fprop(problem.geometry, x, dense_weight(problem.support, w, x.dtype))
            y = epilogue(y, scale, shift, residual, problem.act)
            return y.contiguous(memory_format=problem.format)

        return run

    def dgrad(self, problem: Problem) -> Runner:
        """Prepares dx."""

        def run(dy: Tensor, w: Tensor) -> Tensor:
            dense = dense_weight(problem.support, w, dy.dtype)
            dx = group_dgrad(problem.geometry, problem.height, problem.width, dy, dense)
            return dx.contiguous(memory_format=problem.format)

        return run

    def wgrad(self, problem: Problem) -> Runner:
        """Prepares dw."""

        def run(dy: Tensor, x: Tensor) -> Tensor:
            return weight_gradient(problem, group_wgrad(problem.geometry, dy, x))

        return run


def _work(support: Support) -> float:
    """Returns the fraction of the dense multiply-accumulates that the groups execute."""
    pairs = sum(len(g.filters) * int(g.mask.any((1, 2)).sum()) for g in support.groups)
    return pairs / (support.filters * support.channels)
