# SPDX-License-Identifier: Apache-2.0
"""The choice that runs a problem: what tuning found, else the table, else the predicted best.

Imports no Triton; only a choice that tuning measures does, when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...problem import Problem
from . import table
from .choice import GatherChoice, choice_key, gather_choices
from .wgrad_choice import WgradChoice, wgrad_choices

TritonChoice = GatherChoice | WgradChoice
# Choices that tuning measures, of those that are predicted to be best.
MOST_TUNED = 8


def pick_choice(problem: Problem) -> TritonChoice:
    """Picks tiles and lowering of a problem; the answer is kept with the Support."""
    key = ("triton choice", *choice_key(problem))
    found: TritonChoice | None = problem.support.derived.get(key)
    if found is None:
        found = problem.support.derived[key] = _picked(problem, all_choices(problem))
    return found


def all_choices(problem: Problem) -> list[TritonChoice]:
    """Lists all ways to run a problem, best predicted first."""
    listed: Sequence[TritonChoice] = (
        wgrad_choices(problem) if problem.verb == "wgrad" else gather_choices(problem)
    )
    return sorted(listed, key=lambda c: c.seconds)


def _picked(problem: Problem, choices: Sequence[TritonChoice]) -> TritonChoice:
    named = {c.name: c for c in reversed(choices)}
    name = _tuned(problem, choices[:MOST_TUNED]) or table.look_up(problem)
    return named.get(name or "", choices[0])


def _tuned(problem: Problem, choices: Sequence[TritonChoice]) -> str | None:
    """Returns the choice that this user's tuning found best, measuring it where that is on."""
    if problem.device.type != "cuda" or not problem.batch:
        return None
    from ...measure import tuning  # not needed without a GPU

    key = " ".join(map(str, choice_key(problem)))
    return tuning.pick(key, {c.name: attempt(problem, c) for c in choices}, problem.device)


def attempt(problem: Problem, choice: TritonChoice) -> Callable[[], object]:
    """Returns a call that runs a choice once on random operands, made at its first run."""
    ready: list[Callable[[], object]] = []

    def run() -> object:
        if not ready:
            if isinstance(choice, WgradChoice):
                from .wgrad_calls import WgradCall

                gradient = WgradCall(problem, choice)
                dy, x = _wgrad_operands(problem)
                ready.append(lambda: gradient.run(dy, x))
            else:
                from .calls import GatherCall

                call = GatherCall(problem, choice)
                shape = problem.y_shape if problem.verb == "dgrad" else problem.x_shape
                x = random_operand(problem, shape, problem.strides)
                w = torch.randn(problem.support.shape, dtype=problem.dtype, device=problem.device)
                ready.append(lambda: call.run(x, w))
        return ready[0]()

    return run


def _wgrad_operands(problem: Problem) -> tuple[Tensor, Tensor]:
    _, c, h, w = problem.x_shape
    strides = (c * h * w, 1, w * c, c) if problem.channels_last else (c * h * w, h * w, w, 1)
    x = random_operand(problem, problem.x_shape, strides)
    return random_operand(problem, problem.y_shape, problem.strides), x


def random_operand(problem: Problem, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Makes an operand of those strides, zeros among them, on the problem's device."""
    own = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
    made = torch.empty_strided(own, strides, dtype=problem.dtype, device=problem.device)
    return made.normal_().expand(*shape)
