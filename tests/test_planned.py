# SPDX-License-Identifier: Apache-2.0
"""Planned memory: the same numbers, nothing allocated in a steady call, nothing stale."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F_
from networks import NETWORKS, network
from planning import (  # noqa: F401
    arenas,
    engine,
    large,
    needs_engine,
    optimized,
    poisoned,
    small,
    unplanned,
)
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import arena
from hetconv_kernels.graph import planned as module

pytestmark = needs_engine
PAGE = resource.getpagesize()


def test_a_loaded_network_plans_its_memory_if_the_saved_one_did(tmp_path: Path) -> None:
    fast, x = large()
    hk.save(fast, tmp_path / "fast.safetensors")
    loaded = hk.load(tmp_path / "fast.safetensors")
    with torch.no_grad():
        expected = fast(x)
        for _ in range(3):
            torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
    assert hk.release_memory(loaded) > 0
    plain = hk.convert(network("resnet20")[0], hk.rules.het(p=2)).model.eval()
    hk.save(plain, tmp_path / "plain.safetensors")
    assert hk.plan_memory(hk.load(tmp_path / "plain.safetensors")) == 0


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.usefixtures("poisoned")
def test_every_call_equals_the_network_without_a_plan(name: str) -> None:
    model, x = network(name, share=0.0)
    fast = optimized(model, x)
    plain = unplanned(fast)
    with torch.no_grad():
        for batch in (x, x[:1], 2 * x, x[:1], x):
            assert torch.equal(fast(batch), plain(batch))
            assert torch.equal(fast(batch), plain(batch))
    assert len(arenas(fast)) == 2
    assert all(one.whole for one in arenas(fast))


def test_results_are_the_callers_own() -> None:
    fast = optimized(*small())
    inputs = [torch.randn(2, 4, 6, 6) for _ in range(4)]
    with torch.no_grad():
        first = [fast(x) for x in inputs]
        kept = [y.clone() for y in first]
        again = [fast(x) for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({y.data_ptr() for y in first + again}) == 8


class Returns(nn.Module):
    """A network that returns what its steps gave, in several ways."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.one, self.two = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.three = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Any:
        first = self.one(x)
        second = self.two(first)
        third = self.three(second)
        if self.form == "view":
            return first.flatten(1)[:, 3:], third
        if self.form == "nested":
            return {"features": [first, (second,)], "out": third}
        if self.form == "chunk":
            left, right = first.chunk(2, 1)
            return self.three(torch.cat([right, left], 1)), left
        if self.form == "in place":
            seen = first[:, :4]
            seen.mul_(2)
            return third + self.three(first)
        return self.three(first + second.permute(0, 1, 3, 2))


@pytest.mark.parametrize("form", ["view", "nested", "chunk", "in place", "late"])
@pytest.mark.usefixtures("poisoned")
def test_views_returned_and_late_readers_keep_their_memory(form: str) -> None:
    fast = optimized(Returns(form), torch.randn(2, 4, 6, 6))
    plain = unplanned(fast)
    inputs = [torch.randn(2, 4, 6, 6) for _ in range(4)]
    with torch.no_grad():
        found = [fast(x) for x in inputs]
        for result, x in zip(found, inputs, strict=True):
            torch.testing.assert_close(result, plain(x), rtol=0, atol=0)


def faults_of(call: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_steady_call_allocates_its_result_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast, x = large()
    with torch.no_grad():
        fast(x), fast(x)
        asked = []
        fresh = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, **k: asked.append(a[0]) or fresh(*a, **k))
        fast(x)
    assert asked == [(1, 32, 160, 160)]


def test_a_steady_call_faults_on_no_page_but_those_of_its_result() -> None:
    fast, x = large()
    with torch.no_grad():
        fast(x), fast(x)
        faults = min(faults_of(lambda: fast(x)) for _ in range(5))
    assert faults <= x.numel() * 4 // PAGE + 64  # of six results of that size


def test_two_places_serve_a_chain() -> None:
    fast, x = large()
    with torch.no_grad():
        fast(x), fast(x)
    (one,) = arenas(fast)
    assert one.bytes == 2 * x.numel() * 4


@pytest.mark.usefixtures("poisoned")
def test_each_running_call_has_an_arena_of_its_own() -> None:
    fast, x = large()
    plain = unplanned(fast)
    inputs = [torch.randn_like(x) for _ in range(4)]
    wrong: list[int] = []
    with torch.no_grad():
        truth = [plain(one) for one in inputs]
        fast(x)

    def serve(number: int) -> None:
        with torch.no_grad():
            for _ in range(6):
                if not torch.equal(fast(inputs[number]), truth[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= len(arenas(fast)) <= 4


def test_an_exception_half_way_leaves_nothing_behind() -> None:
    class Fragile(nn.Module):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            if Fragile.broken:
                raise RuntimeError("half way")
            return x

    checked = Fragile().forward
    model, x = small()
    fast = optimized(model, x)
    graph = fast.graph
    first = next(n for n in graph.nodes if n.op == "call_module")
    with graph.inserting_after(first):
        step = graph.call_function(checked, (first,))
    first.replace_all_uses_with(step, delete_user_cb=lambda user: user is not step)
    fast.recompile()
    plain = unplanned(fast)
    with torch.no_grad():
        fast(x), fast(x)
        Fragile.broken = True
        with pytest.raises(RuntimeError, match="half way"):
            fast(x)
        Fragile.broken = False
        assert arena._thread.placement is None
        assert torch.equal(fast(x), plain(x))
    assert len(arenas(fast)) == 1


def test_what_a_step_raises_comes_through_as_it_is_in_the_first_call_and_in_later_ones() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.isnan().any():
                raise KeyError("a NaN")
            return x

    check = Picky().forward
    model, x = small()
    fast = optimized(model, x)
    (output,) = (n for n in fast.graph.nodes if n.op == "output")
    with fast.graph.inserting_before(output):
        output.args = (fast.graph.call_function(check, (output.args[0],)),)
    fast.recompile()
    with torch.no_grad():
        for given in (torch.nan * x, x, torch.nan * x, x):  # recorded, recorded, run, run
            if given is x:
                assert torch.equal(fast(x), unplanned(fast)(x))
                continue
            with pytest.raises(KeyError) as raised:
                fast(given)
            assert raised.value.args == ("a NaN",)
    assert arena._thread.placement is None


def test_what_a_hook_keeps_stays_as_it_was() -> None:
    fast = optimized(*small())
    kept: list[Tensor] = []
    layer = next(m for m in fast.modules() if isinstance(m, hk.nn.FusedConv2d))
    inputs = [torch.randn(2, 4, 6, 6) for _ in range(3)]
    with torch.no_grad():
        fast(inputs[0]), fast(inputs[0])
        handle = layer.register_forward_hook(lambda m, args, out: kept.append(out))
        for x in inputs:
            fast(x)
        handle.remove()
        truth = [layer(x.contiguous(memory_format=torch.channels_last)) for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(kept, truth, strict=True))


def test_gradients_of_the_input_are_right_after_planned_calls() -> None:
    model, x = small()
    fast = optimized(model, x)
    with torch.no_grad():
        fast(x), fast(x)
    own, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast(own).square().sum().backward()
    model(theirs).square().sum().backward()
    torch.testing.assert_close(own.grad, theirs.grad)


def test_without_parameters_that_train_no_grad_is_not_needed() -> None:
    fast, x = large()
    fast(x), fast(x)
    assert len(arenas(fast)) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
@pytest.mark.usefixtures("poisoned")
def test_an_arena_made_in_one_mode_serves_the_other(first: Any, mode: Any) -> None:
    model, x = small(nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    fast = optimized(model, x)
    plain = unplanned(fast)
    with first():
        fast(x), fast(x)
    with mode():
        assert torch.equal(fast(x), plain(x))
    assert all(one.whole for one in arenas(fast))


@pytest.mark.usefixtures("poisoned")
def test_shapes_strides_and_threads_have_plans_of_their_own_and_few_are_kept() -> None:
    fast = optimized(*small())
    plain = unplanned(fast)
    threads = torch.get_num_threads()
    with torch.no_grad():
        for size in (*range(4, 4 + 2 * module.MOST_PLANS), 5):
            x = torch.randn(1, 4, size, 7)
            for image in (x, x.to(memory_format=torch.channels_last)):
                assert torch.equal(fast(image), plain(image))
                assert torch.equal(fast(image), plain(image))
        try:
            torch.set_num_threads(1)
            assert torch.equal(fast(x), plain(x))
        finally:
            torch.set_num_threads(threads)
    assert len(fast.__dict__["_memory"]._plans) == module.MOST_PLANS


@pytest.mark.usefixtures("poisoned")
def test_dtypes_of_inputs_have_plans_of_their_own() -> None:
    """The network's first step makes float32 of whatever comes in."""
    fast = optimized(*small())
    first, *_ = (n for n in fast.graph.nodes if n.op == "placeholder")
    with fast.graph.inserting_after(first):
        cast = fast.graph.call_method("to", (first, torch.float32))
    first.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    fast.recompile()
    plain = unplanned(fast)
    x = torch.randint(0, 9, (2, 4, 6, 6))
    dtypes = (torch.float32, torch.uint8, torch.float64, torch.bfloat16)
    with torch.no_grad():
        for dtype in dtypes * 3:
            given = x.to(dtype)
            assert torch.equal(fast(given), plain(given))
            assert torch.equal(fast(2 * given), plain(2 * given))
    assert len(fast.__dict__["_memory"]._plans) == len(dtypes)


@pytest.mark.usefixtures("poisoned")
def test_another_backend_is_planned_anew_and_gives_its_own_numbers() -> None:
    fast = optimized(*small())
    plain = unplanned(fast)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        fast(x), fast(x)
        for name in ("vendor", "reference", "auto", "cpu"):
            with hk.use_backend(name):
                assert torch.equal(fast(x), plain(x))
                assert torch.equal(fast(x), plain(x))


@pytest.mark.usefixtures("poisoned")
def test_a_layer_that_is_given_another_engine_is_a_surprise_that_costs_nothing() -> None:
    fast = optimized(*small())
    plain = unplanned(fast)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        fast(x), fast(x)
        for network_ in (fast, plain):
            next(
                m for m in network_.modules() if isinstance(m, hk.nn.FusedConv2d)
            ).backend = "reference"
        for _ in range(3):
            assert torch.equal(fast(x), plain(x))
    assert all(one.whole for one in arenas(fast))


def test_a_step_that_may_hide_a_tensor_is_not_planned() -> None:
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    model, x = small()
    fast = optimized(model, x)
    graph = fast.graph
    (output,) = (n for n in graph.nodes if n.op == "output")
    first = next(n for n in graph.nodes if n.op == "call_module")
    with graph.inserting_after(first):
        hidden = graph.call_function(Box, (first,))
    with graph.inserting_before(output):
        seen = graph.call_function(getattr, (hidden, "value"))
    output.args = ((output.args[0], seen),)
    fast.recompile()
    with torch.no_grad():
        results = [fast(k * x) for k in range(1, 5)]
        layer = fast.get_submodule(str(first.target))
        for k, (_, kept) in enumerate(results, 1):
            image = (k * x).contiguous(memory_format=torch.channels_last)
            assert torch.equal(kept, layer(image))
    assert not arenas(fast)


@pytest.mark.usefixtures("poisoned")
def test_an_activation_that_is_read_again_later_is_not_overwritten() -> None:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
            self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            kept = []
            for layer in self.down:
                x = F_.relu(layer(x))
                kept.append(x)
            for layer in self.up:
                x = F_.relu(layer(torch.cat([x, kept.pop()], 1)))
            return x

    x = torch.randn(2, 4, 8, 8)
    fast = optimized(UNet(), x)
    plain = unplanned(fast)
    with torch.no_grad():
        for k in range(4):
            assert torch.equal(fast(k * x), plain(k * x))
