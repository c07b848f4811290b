# SPDX-License-Identifier: Apache-2.0
"""The table of a program's steps: all of them, in order, and the network computes what it did."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from benchmarks import ceilings, low_precision, program_steps
from benchmarks.networks import NETWORKS
from benchmarks.program_steps import StepTime, program_row, program_table, steps_of
from benchmarks.report.schema import problems
from hetconv_kernels import stats
from hetconv_kernels.backends import cpu_int8
from hetconv_kernels.graph.planned import observe_steps
from hetconv_kernels.graph.program_builder import ProgramStep
from hetconv_kernels.measure.roofline import Roofs

ROOFS = Roofs(1e9, 1e9, "cpu", "int8")
INT8 = next(case for case in NETWORKS if case.name == "resnet18-het4-int8")

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


def test_a_step_is_counted_as_the_engine_lowers_it() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(
        hk.nn.HetConv2d(16, 64, 3, padding=1, p=4), nn.ReLU(),
        hk.nn.HetConv2d(64, 64, 3, padding=1, p=4),
    )  # fmt: skip
    x = torch.randn(1, 16, 8, 8)
    made = hk.quantize(layers.eval(), [x], measure=False).model
    with torch.no_grad():
        steps = steps_of(made, x, rounds=2)
    row = program_row(INT8, steps, ROOFS)
    assert all(len(step.samples) == 2 for step in steps)
    assert row["rounds"] == 2
    found = {step["name"]: step for step in row["steps"] if step["macs"]}
    assert len(found) == 2
    for layer, step in zip(layers[::2], found.values(), strict=True):
        plan = cpu_int8.plan_of(layer.support)
        assert step["macs"] == 64 * layer.support.live
        assert step["floor_s"] == pytest.approx(step["macs"] / 1e9)
        assert step["counted_s"] == pytest.approx(step["macs"] / 1e9 * plan.cost / plan.useful)
        assert step["counted_s"] > step["floor_s"]
    for step in row["steps"]:
        if not step["macs"]:
            assert step["counted_s"] == step["floor_s"] == step["bytes"] / 1e9
    for key in ("median_s", "floor_s", "counted_s"):
        assert row[key] == pytest.approx(sum(step[key] for step in row["steps"]))


def test_the_table_shows_both_shares_of_every_step() -> None:
    steps = [
        StepTime("a", "qconv", (4e-3, 4e-3), 2_000_000, 10, 1.5),
        StepTime("b", "call", (1e-3, 1e-3), 0, 0),
    ]
    header, _, a, b, total = program_table(program_row(INT8, steps, ROOFS)).splitlines()
    assert re.sub(" +", " ", header) == "step is ms floor ms % counted ms % MMACs MB"
    assert a.split() == ["a", "qconv", "4.000", "2.000", "50", "3.000", "75", "2.0", "0.00"]
    assert b.split() == ["b", "call", "1.000", "0.000", "0.000"]
    assert total.split() == ["sum", "5.000", "2.000", "40", "3.000", "60"]


def test_the_command_writes_a_result_by_the_ceiling_of_the_layers_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four times the rate in float32, not that of PyTorch's own product of integers."""
    measured: list[torch.dtype] = []

    def given(device: str, dtype: torch.dtype, *, rounds: int) -> Roofs:
        measured.append(dtype)
        slower = 1 if len(measured) == 1 else 2
        return Roofs(1e11 / slower, 5e9 * slower, device, "float32")

    monkeypatch.setattr(ceilings, "measure_roofs", given)
    small = replace(INT8, network="resnet20", n=1, size=16)
    monkeypatch.setattr(program_steps, "NETWORKS", [small])
    monkeypatch.setattr(
        sys, "argv",
        ["program_steps", small.name, "--rounds", "2", "--results", str(tmp_path), "--threads",
         str(torch.get_num_threads())],
    )  # fmt: skip
    program_steps.main()
    assert measured == [torch.float32] * 2
    data = json.loads((tmp_path / f"steps-{small.name}.json").read_text())
    assert problems(data) == []
    assert data["roofs"][0] == {
        "macs_per_s": 4e11, "bytes_per_s": 1e10, "device": "cpu", "dtype": "int8"
    }  # fmt: skip
    (row,) = data["rows"]
    assert row["kind"] == "program"
    with torch.no_grad():
        made, x = low_precision.our_network(small, torch.randn(small.shape))
        assert len(row["steps"]) == len(steps_of(made, x, 1))
    assert f"{1e3 * row['median_s']:.3f}" in capsys.readouterr().out
