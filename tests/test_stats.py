# SPDX-License-Identifier: Apache-2.0
"""The MAC counter: right by hand-made sums, and invisible to the network it counts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hetconv_kernels as hk
from hetconv_kernels import stats
from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.pooling import Pool


class Lambda(nn.Module):
    """Wraps a function of (module, x); what it owns is given by name."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("layer", "size", "expected"),
    [
        (nn.Conv2d(3, 8, 3), (3, 10, 12), 8 * 3 * 9 * 8 * 10),
        (nn.Conv2d(4, 8, (1, 5), stride=2, padding=(0, 2)), (4, 9, 9), 8 * 4 * 5 * 5 * 5),
        (nn.Conv2d(8, 16, 3, padding="same", groups=4), (8, 6, 6), 16 * 2 * 9 * 36),
        (nn.Conv2d(8, 8, 3, dilation=2, groups=8), (8, 9, 9), 8 * 9 * 25),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (4, 7, 7), 16 * 9 * 49),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5), 4 * 6 * 9 * 25),
        (nn.Conv1d(4, 6, 3), (2, 4, 9), 2 * 4 * 6 * 3 * 7),
        (nn.Linear(12, 5), (12,), 60),
        (nn.Linear(12, 5), (3, 12), 180),
        (hk.nn.HetConv2d(8, 8, 3, p=4, padding=1), (8, 5, 5), 8 * (2 * 9 + 6) * 25),
        (hk.nn.HetConv2d(8, 8, 3, p=4, stride=2), (2, 8, 7, 7), 2 * 8 * (2 * 9 + 6) * 9),
        (hk.nn.GroupedConv2d(8, 16, 3, groups=4), (8, 6, 6), 16 * 2 * 9 * 16),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_one_layer_by_hand(layer, size, expected):
    size = torch.empty(size) if isinstance(layer, nn.Conv1d) else size
    assert stats.macs(layer, size) == expected


def test_chosen_supports_by_hand():
    rng = np.random.default_rng(0)
    support = hk.Support.from_mask(rng.random((6, 4, 3, 3)) < 0.4)
    conv = hk.nn.SelfGroupConv2d(4, 6, 3, support=support)
    assert stats.macs(conv, (4, 8, 8)) == support.live * 36 == support.macs(6, 6)
    pruned = hk.Support.from_mask(rng.random((5, 12, 1, 1)) < 0.5)
    linear = hk.nn.SupportLinear(12, 5, support=pruned)
    assert stats.macs(linear, (3, 12)) == 3 * pruned.live
    assert stats.macs(linear, (3, 12), fc=False) == 0


def test_table_names_each_layer_in_call_order():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), hk.nn.HetConv2d(8, 8, 3, p=4), nn.Flatten(),
        nn.Linear(8 * 4 * 4, 10),
    )  # fmt: skip
    rows = stats.layer_macs(model, (2, 3, 8, 8))
    assert [(r.name, r.kind) for r in rows] == [
        ("0", "Conv2d"), ("2", "HetConv2d"), ("4", "Linear"),
    ]  # fmt: skip
    assert [r.live for r in rows] == [216, 192, 1280]
    assert [r.dense for r in rows] == [216, 576, 1280]
    assert [r.positions for r in rows] == [2 * 36, 2 * 16, 2]
    assert [r.macs for r in rows] == [r.live * r.positions for r in rows]
    assert [r.output_shape for r in rows] == [(8, 6, 6), (8, 4, 4), (10,)]


def test_flags_add_and_remove_kinds_of_work():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Flatten(),
        nn.Linear(4 * 36, 10),
    )  # fmt: skip
    convs, linear = 216 * 36 + 32 * 36, 1440
    assert stats.macs(model, (3, 8, 8)) == convs + linear
    assert stats.macs(model, (3, 8, 8), fc=False) == convs
    assert stats.macs(model, (3, 8, 8), bias=True) == convs + linear + 4 * 36 + 10
    assert stats.macs(model, (3, 8, 8), fc=False, bias=True) == convs + 4 * 36
    assert stats.macs(model, (3, 8, 8), bn=True) == convs + linear + 8 * 36


def test_a_layer_called_twice_counts_twice_in_one_row():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = Lambda(lambda m, x: m.a(F.max_pool2d(m.a(x), 2)), a=conv, b=conv)
    rows = stats.layer_macs(model, (4, 8, 8))
    assert [(r.name, r.macs, r.positions) for r in rows] == [("a", 144 * 80, 80)]


def test_work_outside_of_layers_is_not_lost():
    def function(module, x):
        x = F.conv2d(module.conv(x), torch.ones(2, 4, 1, 1))
        x = hk.functional.support_conv2d(x, torch.ones(8, 2, 3, 3), hk.Support.het(2, 8, 3, p=2))
        return F.linear(x.flatten(1), torch.ones(5, 8 * 16))

    model = nn.Sequential(Lambda(function, conv=nn.Conv2d(3, 4, 3)))
    rows = stats.layer_macs(model, (3, 8, 8))
    assert [(r.name, r.macs) for r in rows] == [
        ("0.conv", 108 * 36), ("0", 8 * 36), ("0", 80 * 16), ("0", 5 * 128),
    ]  # fmt: skip
    assert stats.macs(model, (3, 8, 8), fc=False) == 108 * 36 + 8 * 36 + 80 * 16


def test_parametrised_weights_count_once():
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))
    assert stats.macs(conv, (4, 5, 5)) == 144 * 9


def _network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), hk.nn.HetConv2d(8, 8, 3, p=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def test_counting_leaves_no_trace():
    model = _network()
    model[4].eval()
    twin = copy.deepcopy(model)
    attributes = [set(vars(m)) for m in model.modules()]
    random_state = torch.get_rng_state()
    stats.macs(model, (3, 9, 9), bias=True, bn=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for (name, old), new in zip(
        twin.state_dict().items(), model.state_dict().values(), strict=True
    ):
        if isinstance(old, torch.Tensor):
            assert torch.equal(old, new), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())

    # Nothing fake stays behind in a cache: the network runs and trains as its untouched twin.
    x = torch.randn(2, 3, 9, 9)
    results = []
    for network in (twin, model):
        torch.manual_seed(1)
        out = network(x)
        out.square().sum().backward()
        results.append((out.detach(), *(p.grad for p in network.parameters())))
    for expected, found in zip(*results, strict=True):
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_flags_come_back_when_the_network_fails():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(5, 4, 3))
    with pytest.raises(ArgumentError, match="to have 5 channels"):
        stats.macs(model, (3, 9, 9))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_supports_first_met_while_counting_work_afterwards():
    support = hk.Support.het(8, 8, 3, p=2)
    weight = torch.ones(8, 8, 3, 3)
    model = Lambda(lambda m, x: hk.functional.support_conv2d(x, weight, support))
    assert stats.macs(model, (8, 5, 5)) == support.macs(3, 3)
    with FlopCounterMode(display=False):
        y = model(torch.ones(1, 8, 5, 5))
    assert type(y) is torch.Tensor
    assert y[0, :, 0, 0].tolist() == [4 * 9 + 4] * 8


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_device_and_dtype_of_the_network_are_used(device, dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), hk.nn.HetConv2d(8, 8, 3, p=2)).to(device, dtype)
    assert stats.macs(model, (3, 8, 8)) == 216 * 36 + 8 * (36 + 4) * 16


def test_frozen_layers_count_the_same():
    layer = hk.nn.HetConv2d(8, 8, 3, p=4)
    before = stats.macs(layer, (8, 6, 6)), stats.live_parameters(layer)
    layer.freeze()
    assert (stats.macs(layer, (8, 6, 6)), stats.live_parameters(layer)) == before
    assert layer(torch.randn(1, 8, 6, 6)).isfinite().all()


def test_fused_layers_count_their_shift_as_bias():
    fused = hk.nn.fuse(hk.nn.HetConv2d(8, 8, 3, p=4, bias=False), nn.BatchNorm2d(8).eval(), "relu")
    assert stats.macs(fused, (8, 6, 6)) == 192 * 16
    assert stats.macs(fused, (8, 6, 6), bias=True) == 192 * 16 + 8 * 16
    assert stats.live_parameters(fused) == 192 + 8


def test_pooled_layers_count_what_they_compute_not_what_is_left():
    conv, pool = hk.nn.HetConv2d(8, 8, 3, p=4, bias=False), Pool((3, 3), (2, 2), (1, 1))
    pooled = hk.nn.fuse(conv, None, "relu", pool)
    assert pooled(torch.randn(2, 8, 6, 6)).shape == (2, 8, 2, 2)
    assert stats.macs(pooled, (2, 8, 6, 6)) == stats.macs(conv, (2, 8, 6, 6)) == 2 * 192 * 16
    assert stats.macs(pooled, (8, 6, 6), bias=True) == 192 * 16 + 8 * 16


def test_networks_that_look_at_values_run_for_real():
    def function(module, x):
        y = module.drop(module.conv(x))
        return y if y.sum().item() > 0 else -y

    model = Lambda(function, conv=nn.Conv2d(3, 4, 3), drop=nn.Dropout())
    state = torch.get_rng_state()
    assert stats.macs(model, (3, 5, 5)) == 108 * 9
    assert torch.equal(torch.get_rng_state(), state)


def test_wrapped_and_compiled_networks():
    conv = nn.Conv2d(3, 4, 3)
    assert stats.layer_macs(nn.DataParallel(conv), (3, 5, 5))[0].name == ""
    compiled = torch.compile(nn.Sequential(conv), backend="eager")
    compiled(torch.zeros(1, 3, 5, 5))
    assert stats.macs(compiled, (3, 5, 5)) == 108 * 9


def test_live_parameters_count_what_exists_once():
    conv = nn.Conv2d(3, 8, 3)
    het = hk.nn.HetConv2d(8, 8, 3, p=4)
    model = nn.ModuleDict({"a": conv, "b": conv, "c": het, "d": nn.BatchNorm2d(8)})
    assert stats.live_parameters(het) == het.support.live + 8
    assert stats.live_parameters(model) == 216 + 8 + het.support.live + 8 + 16
    assert sum(p.numel() for p in model.parameters()) > stats.live_parameters(model)


@pytest.mark.parametrize("size", [(), (3, 0, 5), (3, -1, 5), (3, 5.0, 5)], ids=str)
def test_bad_sizes_are_refused(size):
    with pytest.raises(ArgumentError, match="input_size: received"):
        stats.macs(nn.Conv2d(3, 4, 3), size)


def test_networks_that_cannot_be_observed_are_refused():
    with pytest.raises(InputTypeError, match=r"expected an nn\.Module"):
        stats.macs(torch.relu, (3, 5, 5))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Call the model once first"):
        stats.macs(nn.Sequential(nn.LazyConv2d(4, 3)), (3, 5, 5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_networks_are_refused():
    scripted = torch.jit.script(nn.Conv2d(3, 4, 3))
    with pytest.raises(InputTypeError, match="Count before scripting"):
        stats.macs(nn.Sequential(scripted), (3, 5, 5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_count_like_those_they_came_from() -> None:
    from torch.ao.nn import quantized
    from torch.ao.quantization import quantize_dynamic

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 2))
    ours = quantize_dynamic(model.eval(), {nn.Linear})
    assert stats.macs(ours, (3, 4, 4)) == stats.macs(model, (3, 4, 4)) == 3 * 4 * 16 + 640 + 20
    assert stats.macs(ours, (3, 4, 4), bias=True) == stats.macs(model, (3, 4, 4), bias=True)
    assert stats.macs(ours, (3, 4, 4), fc=False) == 3 * 4 * 16
    assert stats.live_parameters(ours) == stats.live_parameters(model)
    conv = quantized.Conv2d(8, 4, 3, groups=2)
    assert stats.live_weights(conv) == stats.live_weights(nn.Conv2d(8, 4, 3, groups=2))
    assert stats.live_parameters(conv) == 4 * 4 * 9 + 4
    assert stats.live_weights(quantized.Linear(5, 3)) == 15


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_work_that_is_not_counted_is_warned_of() -> None:
    linear = torch.ao.nn.quantized.dynamic.Linear(4, 3)

    class Raw(nn.Module):
        def forward(self, x):
            return torch.ops.quantized.linear_dynamic(x, linear._packed_params._packed_params)

    with pytest.warns(UserWarning, match=r"work of quantized.linear_dynamic .* is not counted"):
        assert stats.macs(Raw(), (2, 4)) == 0
