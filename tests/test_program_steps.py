# SPDX-License-Identifier: Apache-2.0
"""The table of a program's steps: all of them, in order, and the network computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from benchmarks.program_steps import steps_of
from hetconv_kernels import stats
from hetconv_kernels.graph.planned import observe_steps
from hetconv_kernels.graph.program_builder import ProgramStep

pytestmark = pytest.mark.skipif(
    "cpu" not in hk.available_backends(), reason="the native engine is not built here"
)


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = nn.Sequential(
        hk.nn.HetConv2d(16, 32, 3, padding=1, p=4), nn.ReLU(), nn.AdaptiveAvgPool2d(5),
        hk.nn.HetConv2d(32, 32, 3, padding=1, p=4), nn.Sigmoid(),
    )  # fmt: skip
    x = torch.randn(2, 16, 12, 12).to(memory_format=torch.channels_last)
    with torch.no_grad(), hk.use_backend("cpu"):
        return hk.optimize(layers.eval(), x, leave_plain=False).model, x


def test_every_step_is_there_in_order_with_what_it_executes() -> None:
    made, x = network()
    with hk.use_backend("cpu"):
        steps = steps_of(made, x, rounds=3)
    assert [s.kind for s in steps] == ["conv", "call", "conv", "call"]
    assert [s.macs > 0 for s in steps] == [True, False, True, False]
    assert sum(s.macs for s in steps) == 2 * stats.macs(made, (16, 12, 12))
    assert steps[0].bytes == 4 * x.numel() + 4 * 2 * 32 * 12 * 12
    assert all(s.seconds > 0 for s in steps)


def test_the_network_runs_as_before_while_and_after_it_is_looked_at() -> None:
    made, x = network()
    with torch.no_grad(), hk.use_backend("cpu"):
        want = made(x)
        plans = made._memory
        seen: list[str] = []

        def noting(step: ProgramStep, run: Callable[[], Any]) -> Any:
            seen.append(step.kind)
            return run()

        with observe_steps(made, noting):
            assert torch.equal(made(x), want)
            assert seen == []  # is recorded
            assert torch.equal(made(x), want)
            assert seen == ["conv", "call", "conv", "call"]
        assert made._memory is plans
        assert torch.equal(made(x), want)
        assert len(seen) == 4


def test_steps_that_follow_one_another_are_seen_one_by_one() -> None:
    layers = [hk.nn.HetConv2d(16, 16, 3, padding=1, p=4) for _ in range(3)]
    x = torch.randn(1, 16, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad(), hk.use_backend("cpu"):
        made = hk.optimize(nn.Sequential(*layers).eval(), x, leave_plain=False).model
        want = made(x)
        steps = steps_of(made, x, rounds=2)
        assert [s.kind for s in steps] == ["conv"] * 3
        assert [s.macs for s in steps] == [64 * layer.support.live for layer in layers]
        assert torch.equal(made(x), want)


def test_an_observer_that_fails_leaves_the_plans_as_they_were() -> None:
    made, x = network()

    def failing(step: ProgramStep, run: Callable[[], Any]) -> Any:
        raise RuntimeError(step.kind)

    with torch.no_grad(), hk.use_backend("cpu"):
        want = made(x)
        with observe_steps(made, failing):
            made(x)
            with pytest.raises(RuntimeError, match="conv"):
                made(x)
        assert torch.equal(made(x), want)
