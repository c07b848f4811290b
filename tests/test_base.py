# SPDX-License-Identifier: Apache-2.0
"""The weights of a layer: their start, dead entries, optimisers, a new Support, averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from layers import (
    BUILDERS,
    DTYPES,
    IRREGULAR,
    NARROWER,
    C,
    F,
    assert_equals_conv2d,
    assert_projected,
    build,
    dead,
    fill_dead,
    image,
    through_file,
    twin,
)
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import InputTypeError, SupportError
from hetconv_kernels.nn import GroupedConv2d, SupportConv2d, SupportLinear

# Those that have dead entries.
SPARSE = [kind for kind in BUILDERS if kind != "grouped"]


# Initial weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dense_and_grouped_layers_start_as_conv2d_does(groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    conv = nn.Conv2d(C, F, 3, groups=groups, dtype=dtype)
    rest = torch.rand(3)
    torch.manual_seed(5)
    layer = GroupedConv2d(C, F, 3, groups=groups, dtype=dtype)
    assert torch.equal(layer.weight, conv.weight)
    torch.testing.assert_close(layer.bias, conv.bias)
    assert torch.equal(torch.rand(3), rest)  # and what is drawn next is the same too
    if groups == 1:
        torch.manual_seed(5)
        full = SupportConv2d(C, F, 3, support=hk.Support.dense(C, F, 3), dtype=dtype)
        assert torch.equal(full.weight, conv.weight)


def test_dense_linear_starts_as_linear_does() -> None:
    torch.manual_seed(5)
    linear = nn.Linear(40, 30)
    torch.manual_seed(5)
    layer = SupportLinear(40, 30, support=hk.Support.dense(40, 30, 1))
    assert torch.equal(layer.weight, linear.weight)
    torch.testing.assert_close(layer.bias, linear.bias)


def test_live_fan_in_sets_the_scale_of_each_filter() -> None:
    mask = np.zeros((4, 400, 3, 3), bool)
    fan_in = [3600, 900, 100]
    for f, live in enumerate(fan_in):
        mask.reshape(4, -1)[f, np.random.default_rng(f).permutation(3600)[:live]] = True
    layers = [SupportConv2d(400, 4, 3, support=hk.Support.from_mask(mask)) for _ in range(8)]
    for f, live in enumerate(fan_in):
        bound = live**-0.5
        weights = torch.cat([layer.weight[f].flatten()[mask[f].flatten()] for layer in layers])
        assert weights.abs().max() <= bound * (1 + 1e-6)
        # Uniform within the bound: its standard deviation is bound / sqrt(3).
        spread = weights.std().item() * (3 * live) ** 0.5
        assert spread == pytest.approx(1, abs=4 / (2 * len(weights)) ** 0.5)
        biases = torch.stack([layer.bias[f] for layer in layers if layer.bias is not None])
        assert bound / 4 < biases.abs().max() <= bound * (1 + 1e-6)
    assert all(
        (layer.weight[3] == 0).all() and torch.isfinite(layer.bias).all() for layer in layers
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fan_in_beyond_float16(dtype: torch.dtype) -> None:
    layer = SupportLinear(70000, 2, support=hk.Support.dense(70000, 2, 1), dtype=dtype)
    for parameter in layer.parameters():
        assert 0 < parameter.abs().max() <= 70000**-0.5 * 1.01


@pytest.mark.parametrize("kind", BUILDERS)
def test_initial_weights_are_projected_and_counted(kind: str) -> None:
    layer = build(kind)
    assert_projected(layer)
    assert (layer.weight != 0).sum() == layer.support.live
    assert layer.live_parameters() == layer.support.live + F
    assert build(kind, bias=False).live_parameters() == layer.support.live
    assert layer.freeze().live_parameters() == sum(p.numel() for p in layer.parameters())


# Dead entries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1.0])
@pytest.mark.parametrize("backend", [None, *hk.available_backends("cpu")])
@pytest.mark.parametrize("kind", SPARSE)
def test_dead_entries_are_ignored_and_get_no_gradient(
    kind: str, backend: str | None, value: float
) -> None:
    layer = build(kind, backend=backend)
    fill_dead(layer, value)
    assert_equals_conv2d(layer, image())
    with torch.no_grad():
        torch.testing.assert_close(layer(image()), twin(layer)(image()))
    # A second call, when engines remember the weight, and a change of it in place.
    assert_equals_conv2d(layer, image())
    layer.project_()
    assert_projected(layer)
    assert_equals_conv2d(layer, image())
    fill_dead(layer, value)
    assert_equals_conv2d(layer, image())


@pytest.mark.parametrize("kind", BUILDERS)
def test_project_cleans_weight_gradient_and_slots_and_nothing_else(kind: str) -> None:
    layer = build(kind)
    optimizer = torch.optim.Adam(layer.parameters(), amsgrad=True)
    layer(image()).sum().backward()
    optimizer.step()
    slots = [s for s in optimizer.state[layer.weight].values() if s.shape == layer.weight.shape]
    assert len(slots) == 3
    assert layer.weight.grad is not None
    everything = [layer.weight, layer.weight.grad, *slots]
    before = [t.detach().clone() for t in everything]
    with torch.no_grad():
        for t in everything:
            t.masked_fill_(dead(layer), float("nan"))
    step = optimizer.state[layer.weight]["step"].clone()
    assert layer.project_(optimizer) is layer
    for t, expected in zip(everything, before, strict=True):
        assert torch.equal(t, expected)
    assert torch.equal(optimizer.state[layer.weight]["step"], step)


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("kind", BUILDERS)
def test_training_is_that_of_the_masked_conv2d(kind: str, optimiser: str) -> None:
    layer = build(kind, dtype=torch.float64)
    plain = twin(layer)
    plain.weight.register_hook(lambda grad: grad.masked_fill(dead(layer), 0))
    optimisers = [OPTIMISERS[optimiser](m.parameters()) for m in (layer, plain)]
    for step in range(4):
        for module, optimizer in zip((layer, plain), optimisers, strict=True):
            optimizer.zero_grad()
            module(image(seed=step).double()).square().mean().backward()
            optimizer.step()
        assert_projected(layer)
    torch.testing.assert_close(layer.weight, plain.weight)
    torch.testing.assert_close(layer.bias, plain.bias)


def test_a_new_support_projects_everything_and_trains_on() -> None:
    layer = build("support")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(image()).sum().backward()
    optimizer.step()
    layer.set_support(NARROWER, optimizer)
    assert layer.support == NARROWER
    momentum = optimizer.state[layer.weight]["momentum_buffer"]
    assert layer.weight.grad is not None
    for t in (layer.weight, layer.weight.grad, momentum):
        assert torch.equal(t != 0, torch.tensor(NARROWER.mask))
    optimizer.step()
    assert_projected(layer)
    assert_equals_conv2d(layer, image())


def test_a_wider_support_revives_entries_at_zero_and_they_learn() -> None:
    layer = build("support")
    layer.support = hk.Support.dense(C, F, 3)
    assert (layer.weight != 0).sum() == IRREGULAR.live
    layer(image()).sum().backward()
    assert layer.weight.grad is not None
    assert (layer.weight.grad != 0).all()
    assert_equals_conv2d(layer, image())


@pytest.mark.parametrize(
    ("kind", "support", "error", "message"),
    [
        ("support", hk.Support.dense(C, F, 5), SupportError, r"received \(8, 12, 5, 5\), expected"),
        ("support", IRREGULAR.mask, InputTypeError, "received ndarray, expected a Support"),
        ("het", hk.Support.dense(C, F, 3), SupportError, "expected weights within Support.het.p=4"),
        ("het", hk.Support.het(C, F, 3, p=4, order="interleaved"), SupportError, "blocked"),
        ("grouped", hk.Support.grouped(C, F, 3, 4), SupportError, "Use SupportConv2d.from_conv2d"),
    ],
    ids=["shape", "mask", "wider-het", "other-order", "grouped"],
)
def test_supports_that_a_layer_refuses(
    kind: str, support: Any, error: type[Exception], message: str
) -> None:
    layer = build(kind)
    before = layer.support
    with pytest.raises(error, match=message):
        layer.support = support
    assert layer.support is before
    assert_equals_conv2d(layer, image())


def test_a_het_layer_may_be_pruned_further() -> None:
    layer = build("het")
    layer.set_support(layer.support & IRREGULAR)
    assert_equals_conv2d(layer, image())
    layer.set_support(layer.support)
    with pytest.raises(SupportError, match="frozen"):
        layer.freeze().set_support(layer.support)


# Averaging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDERS)
def test_averaged_model(kind: str) -> None:
    layer = build(kind)
    averaged = torch.optim.swa_utils.AveragedModel(
        layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    first = layer.weight.detach().clone()
    averaged.update_parameters(layer)
    averaged(image())  # engines have seen the average before it changes
    with torch.no_grad():
        layer.weight.mul_(2)
    averaged.update_parameters(layer)
    torch.testing.assert_close(averaged.module.weight, 1.1 * first)
    assert_projected(averaged.module)
    torch.testing.assert_close(averaged(image()), twin(averaged.module)(image()))
    restored = torch.optim.swa_utils.AveragedModel(build(kind))
    restored.load_state_dict(through_file(averaged.state_dict()))
    torch.testing.assert_close(restored(image()), averaged(image()))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_averages_written_through_data(kind: str, grad: bool) -> None:
    """The old way to average writes to ``.data``: autograd does not see it, the layer has to."""
    average, layer = build(kind), build(kind)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            average.weight.data.mul_(0.9).add_(layer.weight.data, alpha=0.1)
            torch.testing.assert_close(average(image()), twin(average)(image()))
        average.weight.data = layer.weight.data.clone()
        torch.testing.assert_close(average(image()), twin(average)(image()))
        # Dirt in dead entries that nobody could see arrive: project_ is the way out.
        average.weight.data[dead(average)] = 7.0
        average.project_()
        torch.testing.assert_close(average(image()), twin(average)(image()))
