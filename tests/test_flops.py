# SPDX-License-Identifier: Apache-2.0
"""FlopCounterMode sees our operators: two FLOPs for each multiply-accumulate of a live weight."""

from __future__ import annotations

import fresh
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import hetconv_kernels as hk
from hetconv_kernels import flops, models, stats


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def small_network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Conv2d(12, 12, 3, groups=4), nn.Conv2d(12, 8, (3, 5), padding="same"),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    return hk.convert(model, hk.rules.first_of(hk.rules.het(p=4), hk.rules.grouped())).model


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("batch", [1, 3])
def test_forward_flops_are_twice_the_macs(batch, grad):
    model = small_network()
    x = torch.randn(batch, 3, 16, 12)
    with torch.set_grad_enabled(grad):
        assert count(lambda: model(x)) == 2 * stats.macs(model, x)


def test_training_step_costs_three_forwards():
    layer = hk.nn.HetConv2d(8, 8, 3, p=4, stride=2, padding=1)
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    assert count(lambda: layer(x).sum().backward()) == 3 * 2 * stats.macs(layer, x)
    # Without a gradient for x there is no dgrad.
    x = torch.randn(2, 8, 9, 9)
    assert count(lambda: layer(x).sum().backward()) == 2 * 2 * stats.macs(layer, x)


def test_converted_resnet20():
    torch.manual_seed(0)
    report = hk.convert(models.resnet20(), hk.rules.het(p=4))
    x = torch.randn(1, 3, 16, 16)
    report.model.eval()
    with torch.no_grad():
        found = count(lambda: report.model(x))
    before, after = report.macs(x)
    assert found == 2 * after
    assert after < 0.45 * before


def test_fake_tensors_count_and_leave_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = hk.nn.HetConv2d(8, 12, 3, p=2)
    x = torch.randn(2, 8, 6, 6)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert count(lambda: layer(fake)) == 2 * stats.macs(layer, x)
    with FlopCounterMode(display=False):
        y = layer(x)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, layer(x))


def test_registering_again_changes_nothing():
    before = dict(flop_registry)
    flops.register_flop_formulas()
    assert flop_registry == before
    assert torch.ops.hetconv.fprop in before


@pytest.mark.parametrize("order", ["package first", "counter first"])
def test_registration_waits_for_the_counter(order):
    package, counter = "import hetconv_kernels", "import torch.utils.flop_counter as c"
    lines = [package, counter] if order == "package first" else [counter, package]
    if order == "package first":
        lines.insert(1, "import sys; assert 'torch.utils.flop_counter' not in sys.modules")
        lines.insert(1, "import sys; before = len(sys.meta_path)")
        lines.append("assert len(sys.meta_path) == before - 1")
    lines += [
        "import torch",
        "for name in ('fprop', 'dgrad', 'wgrad'):",
        "    assert getattr(torch.ops.hetconv, name) in c.flop_registry, name",
    ]
    done = fresh.python("\n".join(lines))
    assert done.returncode == 0, done.stderr
