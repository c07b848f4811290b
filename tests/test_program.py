# SPDX-License-Identifier: Apache-2.0
"""Programs: planned networks in one native call, bit for bit what their layers compute."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F_
from networks import live_norms, network
from planning import engine, needs_engine, optimized, poisoned, small, unplanned  # noqa: F401
from programs import assert_equal_calls, kinds, program_of
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import models, ranges
from hetconv_kernels.graph.planned import PlannedNetwork

pytestmark = [needs_engine, pytest.mark.usefixtures("poisoned")]
LAST, ROWS = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize("layout", [ROWS, LAST])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet20", "densenet", "mobilenet", "lenet5", "dncnn"])
def test_a_network_computes_what_its_layers_do(
    name: str, dtype: torch.dtype | None, layout: torch.memory_format
) -> None:
    model, x = network(name, share=0.0)
    x = x.to(memory_format=layout)
    fast = hk.optimize(model, x, dtype).model
    (part,) = (m for m in fast.modules() if isinstance(m, PlannedNetwork))
    assert_equal_calls(fast, unplanned(fast), x)
    assert "conv" in kinds(part)


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "dncnn"])
def test_a_network_in_8_bits_computes_what_its_layers_do(name: str) -> None:
    model, x = network(name, share=0.0)
    fast = hk.quantize(model, [x, x * 0.5]).model
    parts = [m for m in fast.modules() if isinstance(m, PlannedNetwork)]
    assert parts
    assert_equal_calls(fast, unplanned(fast), x)
    assert kinds(parts[0]).count("int8 conv") >= 4


@pytest.mark.parametrize("layout", [ROWS, LAST])
def test_a_network_of_layers_only_is_one_native_call(layout: torch.memory_format) -> None:
    model, x = network("dncnn", share=0.0)
    x = x.to(memory_format=layout)
    fast = optimized(model, x)
    assert_equal_calls(fast, unplanned(fast), x)
    copies = ["copy"] * (layout == ROWS)  # into channels_last, and back
    assert kinds(fast) == copies + ["conv"] * 5 + ["sub"] + copies
    assert len(program_of(fast)._pieces) == 1


class Random(nn.Module):
    """A graph of random steps, some of which read values of long ago."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.plan = [(draw.choice(self.KINDS), draw.random(), draw.random()) for _ in range(12)]
        self.layers = nn.ModuleList(
            nn.Conv2d(8, 8, draw.choice((1, 3)), padding="same", groups=draw.choice((1, 2)))
            for _ in self.plan
        )
        self.several = draw.random() < 0.5

    KINDS = ("conv", "conv", "conv", "add", "sub", "relu", "leaky", "cat", "chunk", "pool", "tanh",
             "relu_", "view")  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for (kind, first, second), layer in zip(self.plan, self.layers, strict=True):
            a = values[int(first * len(values))]
            b = values[int(second * len(values))]
            values.append(self.step(kind, layer, a, b))
        return (values[-1], values[len(values) // 2][:, 2:5]) if self.several else values[-1]

    def step(self, kind: str, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        if kind == "conv":
            return layer(a)
        if kind in ("add", "sub"):
            return a + b if kind == "add" else a - b
        if kind == "cat":
            return torch.cat([a, b], 1)[:, 3:11]
        if kind == "chunk":
            left, right = b.chunk(2, 1)
            return torch.cat([right, a[:, :4]], 1) + torch.cat([left, left], 1)
        if kind == "pool":
            return F_.max_pool2d(a, 3, 1, 1)
        if kind == "relu_":
            return F_.relu(a + b, inplace=True)
        if kind == "view":
            return a.flatten(2).view(a.shape)
        return {"relu": F_.relu, "leaky": F_.leaky_relu, "tanh": torch.tanh}[kind](a)


@pytest.mark.parametrize("seed", range(24))
def test_random_graphs_compute_what_their_layers_do(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 8, 5, 6)
    if seed % 3:
        x = x.to(memory_format=LAST)
    fast = optimized(Random(seed), x)
    assert_equal_calls(fast, unplanned(fast), x)


def test_a_value_whose_shape_follows_from_the_numbers_is_computed_by_hand() -> None:
    def chosen(y: Tensor) -> Tensor:
        return y[:, :, : 3 if float(y[0, 0, 0, 0]) > 0 else 5].clone()

    model, x = small()
    fast = optimized(model, x)
    first, second = (n for n in fast.graph.nodes if n.op == "call_module")
    with fast.graph.inserting_after(first):
        cut = fast.graph.call_function(chosen, (first,))
    second.replace_input_with(first, cut)
    fast.recompile()
    plain = unplanned(fast)
    shapes = set()
    with torch.no_grad():
        for seed in range(12):
            torch.manual_seed(seed)
            image = torch.randn(2, 4, 6, 6)
            found = fast(image)
            shapes.add(found.shape[2])
            assert torch.equal(found, plain(image))
    assert shapes == {3, 5}


def test_results_of_a_quantised_resnet_stay_the_callers() -> None:
    torch.manual_seed(0)
    model = models.resnet20().eval()
    live_norms(model)
    inputs = [torch.randn(2, 3, 16, 16) for _ in range(3)]
    fast = hk.quantize(model, inputs).model
    with torch.no_grad():
        fast(inputs[0])
        found = [fast(x) for x in inputs]
        kept = [y.clone() for y in found]
        again = [fast(x) for x in reversed(inputs)]
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, reversed(again), strict=True))


def test_ranges_of_a_profiler_show_every_layer() -> None:
    fast = optimized(*small())
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        fast(x), fast(x)
        assert program_of(fast) is not None
        with ranges.enabled():
            fast(x), fast(x)
            assert program_of(fast) is None
