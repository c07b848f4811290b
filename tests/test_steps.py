# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training steps: everybody computes the same step, and a wrong one is noticed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import record, steps, table
from benchmarks.cases import SupportSpec
from benchmarks.networks import NetworkCase
from benchmarks.report import schema
from hetconv_kernels import ops
from hetconv_kernels.measure.timing import interleaved
from hetconv_kernels.nn import SupportConv2d

SMALL = NetworkCase("small", "resnet20", SupportSpec("het", 4), n=2, size=8)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def test_all_forms_compute_the_same_step(x: torch.Tensor) -> None:
    networks = steps.build_step_networks(SMALL)
    match = steps.check(networks, x)
    assert match.ok, match
    assert match.worst > 0
    assert sum(isinstance(m, SupportConv2d) for m in networks["ours"].modules()) == 18
    for rival in ("dense", "composition"):
        assert not any(isinstance(m, SupportConv2d) for m in networks[rival].modules())


class Wrong(torch.autograd.Function):
    """Passes a value through, and its gradient a hundredth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.01 * dy


def test_a_wrong_gradient_is_noticed(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = steps.build_step_networks(SMALL)
    right = ops.run_wgrad
    with monkeypatch.context() as patch:
        patch.setattr(ops, "run_wgrad", lambda *args: 1.01 * right(*args))
        assert not steps.check(networks, x).ok
    hook = networks["composition"].layer2[0].register_forward_hook(lambda m, a, y: Wrong.apply(y))
    assert not steps.check(networks, x).ok
    hook.remove()
    assert steps.check(networks, x).ok


def test_a_step_changes_the_weights_and_lowers_the_loss(x: torch.Tensor) -> None:
    run = steps.step(steps.build_step_networks(SMALL)["ours"], x, torch.channels_last)
    first = run()
    for _ in range(30):
        last = run()
    assert last < first


def test_row_and_table(x: torch.Tensor) -> None:
    networks = steps.build_step_networks(SMALL)
    timings = interleaved(
        steps.variants(networks, x), baseline="dense:nchw", target="ours", rounds=6, warmup=0
    )
    row = record.training_row(SMALL, steps.check(networks, x), timings)
    assert schema.problems(json.loads(json.dumps(row)), schema.TRAINING_ROW) == []
    assert set(timings.samples) == {
        "ours", "dense:nchw", "dense:nhwc", "composition:nchw", "composition:nhwc",
    }  # fmt: skip
    bare = record.training_row(SMALL, steps.check(networks, x))
    header, _, line, wrong = table.training_table([row, bare])
    assert header.startswith("network")
    assert line.startswith("small")
    assert "MISMATCH" in wrong
