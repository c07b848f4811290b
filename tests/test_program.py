# SPDX-License-Identifier: Apache-2.0
"""Programs: planned networks in one native call, bit for bit what their layers compute."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F_
from networks import live_norms, network
from planning import engine, needs_engine, optimized, poisoned, small, unplanned  # noqa: F401
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import models, ranges
from hetconv_kernels.graph.planned import PlannedNetwork

pytestmark = [needs_engine, pytest.mark.usefixtures("poisoned")]
LAST, ROWS = torch.channels_last, torch.contiguous_format


def program_of(fast: nn.Module) -> Any:
    """Returns the program that was used last."""
    return next(reversed(fast.__dict__["_memory"]._plans.values())).program


def kinds(fast: nn.Module) -> list[str]:
    program = program_of(fast)
    assert program is not None
    return program.kinds


def assert_equal_calls(fast: PlannedNetwork, plain: nn.Module, *inputs: Tensor) -> None:
    """Calls both with other numbers each time: recorded once, then twice by the program."""
    with torch.no_grad():
        for factor in (1.0, -0.5, 2.0):
            given = [x if x.dtype == torch.uint8 else x * factor for x in inputs]
            torch.testing.assert_close(fast(*given), plain(*given), rtol=0, atol=0, equal_nan=True)


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
    fast = optimized(model, x)
    assert_equal_calls(fast, unplanned(fast), x.to(memory_format=layout))
    assert kinds(fast) == ["conv"] * 5 + ["sub"]
    assert len(program_of(fast)._pieces) == 1


class Steps(nn.Module):
    """Two convolutions and a step between."""

    def __init__(self, step: Callable[..., Any]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.last(self.step(y, self.two(y)))


def concatenated(a: Tensor, b: Tensor) -> Tensor:
    both = torch.cat([a, b, a], 1)
    return both[:, 4:12] + both[:, 16:]


def in_place(a: Tensor, b: Tensor) -> Tensor:
    seen = torch.cat([a, b], 1)
    F_.relu(seen, inplace=True)
    return seen[:, 8:] - seen[:, :8]


STEPS: dict[str, tuple[Callable[..., Any], str]] = {
    "add": (lambda a, b: a * b + a, "mul"),
    "sub": (lambda a, b: a - b, "sub"),
    "leaky": (lambda a, b: F_.leaky_relu(a - b, 0.1), "leaky relu"),
    "relu6": (lambda a, b: F_.relu6(3 * (a - b)), "sub"),
    "relu": (lambda a, b: F_.relu(a - b) * b, "relu"),
    "clamp": (lambda a, b: F_.hardtanh(a - b, 0.0, 6.0) * b, "clamp"),
    "pool": (lambda a, b: F_.max_pool2d(a - b, 3, 2, 1), "max pool"),
    "concat": (concatenated, "concat"),
    "in place": (in_place, "relu"),
    "upsample": (lambda a, b: F_.interpolate(a - b, scale_factor=2), "upsample"),
    "sizes": (lambda a, b: F_.interpolate(a - b, size=(7, 11)), "upsample"),
    "exact": (lambda a, b: F_.interpolate(a - b, (5, 4), mode="nearest-exact"), "upsample"),
    "bilinear": (lambda a, b: F_.interpolate(a - b, scale_factor=2, mode="bilinear"), "call"),
    "mean": (lambda a, b: a * b.mean((2, 3), keepdim=True), "call"),
    "silu": (lambda a, b: F_.silu(a - b), "call"),
}


@pytest.mark.parametrize("special", [None, torch.nan, torch.inf])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_between_layers_computes_what_torch_does(name: str, special: float | None) -> None:
    torch.manual_seed(1)
    step, kind = STEPS[name]
    x = torch.randn(2, 4, 9, 6).to(memory_format=LAST)
    fast = optimized(Steps(step), x)
    plain = unplanned(fast)
    if special is not None:
        x[0, 1, 2, 3] = special
    assert_equal_calls(fast, plain, x)
    assert kind in kinds(fast)


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


# What must be noticed -----------------------------------------------------------------------------


def _layers(fast: nn.Module) -> list[Any]:
    return [m for m in fast.modules() if isinstance(m, hk.nn.FusedConv2d)]


def _swapped(fast: nn.Module) -> None:
    layer = _layers(fast)[0]
    layer.weight = layer.weight.flip(0)


def _data(fast: nn.Module) -> None:
    layer = _layers(fast)[0]
    layer.weight.data = layer.weight.data * 3


def _loaded(fast: nn.Module) -> None:
    state = {k: v * 2 if v.is_floating_point() else v for k, v in fast.state_dict().items()}
    fast.load_state_dict(state)


def _patched(fast: nn.Module) -> None:
    layer = _layers(fast)[1]
    layer.forward = lambda x: torch.zeros_like(x)


def _replaced(fast: Any) -> None:
    node = next(n for n in fast.graph.nodes if n.op == "call_module")
    parent, _, name = str(node.target).rpartition(".")
    owner = fast.get_submodule(parent)
    torch.manual_seed(9)
    owner._modules[name] = hk.nn.fuse(nn.Conv2d(4, 8, 3, padding=1)).eval()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "written": lambda fast: _layers(fast)[0].weight.mul_(2),
    "shift written": lambda fast: _layers(fast)[1].shift.add_(1),
    "another tensor": _swapped,
    "data": _data,
    "loaded": _loaded,
    "activation": lambda fast: setattr(_layers(fast)[1], "act", "relu6"),
    "engine": lambda fast: setattr(_layers(fast)[1], "backend", "reference"),
    "forward": _patched,
    "module": _replaced,
    "dtype": lambda fast: fast.double(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_the_recording_shows_in_the_next_call(name: str) -> None:
    torch.manual_seed(0)
    fast = optimized(*small())
    plain = unplanned(fast)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        before = fast(x), fast(x)
        for one in (fast, plain):
            CHANGES[name](one)
        if name == "dtype":
            x = x.double()
        truth = plain(x)
        assert not torch.equal(before[1], truth.to(before[1].dtype)) or name == "engine"
        for _ in range(3):
            assert torch.equal(fast(x), truth)


def test_a_graph_that_was_changed_is_recorded_anew() -> None:
    fast = optimized(*small())
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        first = fast(x), fast(x)
        (output,) = (n for n in fast.graph.nodes if n.op == "output")
        with fast.graph.inserting_before(output):
            negated = fast.graph.call_function(torch.neg, (output.args[0],))
        output.args = (negated,)
        fast.recompile()
        for _ in range(3):
            assert torch.equal(fast(x), -first[1])


def test_weights_written_before_every_call_end_the_recording_not_the_numbers() -> None:
    fast = optimized(*small())
    plain = unplanned(fast)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        for step in range(40):
            for one in (fast, plain):
                _layers(one)[0].weight.add_(0.01 * step)
            assert torch.equal(fast(x), plain(x))
    assert program_of(fast) is None


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
