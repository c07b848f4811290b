# SPDX-License-Identifier: Apache-2.0
"""What others do to networks that this package made: torch.fx's tracer, and differentiation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

import hetconv_kernels as hk
from hetconv_kernels.errors import InputTypeError, TraceError
from hetconv_kernels.graph.narrow import Narrow
from hetconv_kernels.nn.base import ForcedBackend


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.bn = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.pool = nn.Conv2d(16, 16, 3, padding=1), nn.MaxPool2d(2)
        self.average, self.last = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.a(x)))
        return self.last(self.average(self.pool(self.b(y) + y)).flatten(1))


def image() -> Tensor:
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def converted() -> nn.Module:
    return hk.convert(Plain().eval(), hk.rules.het(p=4)).model


def frequencies() -> nn.Module:
    chosen = torch.rand(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)).numpy() < 0.4
    return nn.Sequential(hk.nn.FrequencyConv2d(8, 8, 3, coefficients=chosen), nn.ReLU()).eval()


MADE: dict[str, Callable[[], nn.Module]] = {
    "converted": converted,
    "frequencies": frequencies,
    "compact": lambda: hk.compact(converted(), image()).model,
    "optimized": lambda: hk.optimize(converted(), image()).model,
    "bfloat16": lambda: hk.optimize(converted(), image(), dtype=torch.bfloat16).model,
    "8 bits": lambda: hk.quantize(converted(), [image()]).model,
    "8 bits, trained on": lambda: hk.quantization.prepare(converted(), [image()]).eval(),
}


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "in another network"])
@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_torch_fx_traces_it_with_our_layers_as_single_steps(name: str, inside: bool) -> None:
    model, x = MADE[name](), image()
    model(x)  # recorded, where it plans
    whole = nn.Sequential(nn.Identity(), model).eval() if inside else model
    if name == "bfloat16" and not inside:
        with pytest.raises(TraceError, match=r"network\.body"):
            fx.symbolic_trace(whole)
        whole, x = model.body, x.bfloat16()
    traced = fx.symbolic_trace(whole)
    expected = whole(x)
    for network in (traced, copy.deepcopy(traced)):
        for _ in range(2):
            assert torch.equal(network(x), expected)
    called = [traced.get_submodule(n.target) for n in traced.graph.nodes if n.op == "call_module"]
    assert any(isinstance(m, ForcedBackend | Narrow) for m in called)


def test_a_layer_alone_is_refused_with_the_way_out() -> None:
    with pytest.raises(TraceError, match=r"Sequential\(layer\)"):
        fx.symbolic_trace(hk.nn.HetConv2d(8, 8, 3, p=4))
    fx.symbolic_trace(nn.Sequential(hk.nn.HetConv2d(8, 8, 3, p=4)))


# Differentiation --------------------------------------------------------------------------------


def dual(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        model(forward_ad.make_dual(x, torch.ones_like(x)))


WAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "dual numbers": dual,
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),)),
    "vjp": lambda m, x: torch.func.vjp(m, x),
    "grad": lambda m, x: torch.func.grad(lambda v: m(v).sum())(x),
    "per-sample grad": lambda m, x: torch.func.vmap(torch.func.grad(lambda v: m(v[None]).sum()))(x),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
    "jacfwd": lambda m, x: torch.func.jacfwd(m)(x),
}


@pytest.mark.parametrize("way", WAYS)
def test_differentiating_through_8_bits_is_refused_not_lost(way: str) -> None:
    model, x = MADE["8 bits"](), image()
    with torch.no_grad():
        model(x)
        model(x)
    with pytest.raises(InputTypeError, match=r"quantization\.prepare"):
        WAYS[way](model, x)


@pytest.mark.parametrize("way", ["dual numbers", "jvp", "grad"])
def test_a_quantize_step_of_its_own_refuses_too(way: str) -> None:
    step = next(m for m in MADE["8 bits"]().modules() if isinstance(m, hk.nn.Quantize))
    with pytest.raises(InputTypeError, match="rounding"):
        WAYS[way](step if way != "grad" else lambda v: step(v).float(), image())


def test_what_is_not_differentiated_passes() -> None:
    """A transform over something else, and a map without derivatives."""
    model, x = MADE["8 bits"](), image()
    with torch.no_grad():
        expected = model(x)
        mapped = torch.func.vmap(lambda v: model(v[None])[0])(x)
    torch.testing.assert_close(mapped, expected)
    weight = torch.ones(4)
    found = torch.func.grad(lambda w: (model(x) * w).sum())(weight)
    torch.testing.assert_close(found, expected.sum(0))
    with forward_ad.dual_level():
        product = model(x) * forward_ad.make_dual(weight, weight)
        torch.testing.assert_close(forward_ad.unpack_dual(product).tangent, expected)


def test_the_prepared_network_is_the_way_out() -> None:
    model, x = MADE["8 bits, trained on"](), image()
    assert torch.func.grad(lambda v: model(v).sum())(x).abs().max() > 0
