# SPDX-License-Identifier: Apache-2.0
"""Amdahl's bound: of networks whose times are known, because they set the clock themselves."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

from benchmarks import amdahl
from benchmarks.amdahl import TimedRun


class Clock:
    """A clock that stands still unless somebody takes time."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class Takes(nn.Module):
    """Takes a known time, another one at each call."""

    def __init__(self, clock: Clock, *seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.time += self.seconds[self.calls % len(self.seconds)]
        self.calls += 1
        return x


def toy(clock: Clock) -> nn.Module:
    return nn.Sequential(
        Takes(clock, 50.0, 6.0), Takes(clock, 9.0, 2.0), nn.Sequential(Takes(clock, 2.0))
    )


def test_parts_and_whole_of_a_run_are_known() -> None:
    clock = Clock()
    runs = amdahl.hooked_runs(toy(clock), torch.ones(1), ["0", "2"], 1, clock)
    assert runs == [TimedRun(10.0, {"0": 6.0, "2": 2.0})]  # the first run, of 61 s, is not counted
    assert runs[0].rest == 2.0
    assert amdahl.bound(runs, {"0": 3.0, "2": 2.0}) == {
        "total_s": 10.0, "layers_s": 8.0, "rest_s": 2.0, "speedup": 2.0,
    }  # fmt: skip


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    clock = Clock()
    layer = Takes(clock, 3.0)
    runs = amdahl.hooked_runs(nn.Sequential(layer, layer), torch.ones(1), ["0"], 2, clock)
    assert runs == [TimedRun(6.0, {"0": 6.0})] * 2


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    clock = Clock()
    network = nn.Sequential(Takes(clock, 1.0), nn.Linear(2, 2))
    with pytest.raises(RuntimeError):
        amdahl.hooked_runs(network, torch.ones(3), ["0"], 1, clock)
    assert not network[0]._forward_hooks
    assert not network[0]._forward_pre_hooks


def test_the_median_bound_counts_and_its_times_belong_together() -> None:
    """The bounds are 4 / 2.5, 10 / 5 and 100 / 96; the second total is no median of totals."""
    runs = [
        TimedRun(4.0, {"a": 3.0}), TimedRun(10.0, {"a": 10.0}), TimedRun(100.0, {"a": 8.0}),
    ]  # fmt: skip
    found = amdahl.bound(runs, {"a": 2.0})
    assert found == {"total_s": 4.0, "layers_s": 3.0, "rest_s": 1.0, "speedup": 1.6}


def test_nothing_saved_is_no_speedup_and_nothing_left_is_the_rest() -> None:
    run = TimedRun(10.0, {"a": 8.0})
    assert amdahl.speedup(run, {}) == 1.0
    assert amdahl.speedup(run, {"a": 1e12}) == pytest.approx(5.0)


def test_ratios_count_the_parts_of_a_layer() -> None:
    dense = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1))
    parts = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8))
    sparse = nn.Sequential(parts, nn.Conv2d(8, 8, 1))
    found = amdahl.layer_mac_ratios(dense, sparse, torch.ones(1, 4, 5, 5), ["0", "1"])
    # 3×3 positions of 288 weights; 5×5 of 32 and 3×3 of 72.
    assert found == {"0": 9 * 288 / (25 * 32 + 9 * 72), "1": 1.0}


def test_medians_are_by_layer() -> None:
    runs = [TimedRun(9.0, {"a": float(a), "b": float(b)}) for a, b in ((1, 6), (2, 5), (3, 4))]
    assert amdahl.medians(runs) == {"a": 2.0, "b": 5.0}


def test_the_example_in_the_text() -> None:
    assert doctest.testmod(amdahl).failed == 0
    assert doctest.testmod(amdahl).attempted == 1
