# SPDX-License-Identifier: Apache-2.0
"""The layers inside PyTorch: compile, export, checkpointing, autocast, memory formats, threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import hetconv_kernels as hk
from hetconv_kernels.geometries import _of_operators


class Network(nn.Module):
    """One layer of each kind, with what stands between them in real networks."""

    def __init__(self) -> None:
        super().__init__()
        keep = torch.rand(3, 12) < 0.5
        grouping = hk.Support.self_grouped(torch.arange(12) % 3, keep.numpy(), 3)
        self.stem = hk.nn.SupportConv2d(3, 8, 3, padding=1, support=hk.Support.dense(3, 8, 3))
        self.het = hk.nn.HetConv2d(8, 12, 3, padding=1, p=4)
        self.norm = nn.BatchNorm2d(12)
        self.own = hk.nn.SelfGroupConv2d(12, 12, 3, stride=2, padding=1, support=grouping)
        self.grouped = hk.nn.GroupedConv2d(12, 8, 3, padding="same", groups=4)
        self.head = hk.nn.SupportLinear(
            8, 5, support=hk.Support.from_mask((torch.rand(5, 8, 1, 1) < 0.5).numpy())
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.het(torch.relu(self.stem(x)))))
        x = self.grouped(torch.relu(self.own(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Network()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


SHAPES = [(7, 11, 13), (2, 12, 12), (3, 14, 10), (5, 16, 16), (4, 20, 9)]


def few(network: Network) -> nn.Module:
    """One of our layers between steps that are fused: inductor compiles each loop for a second."""
    return nn.Sequential(
        nn.BatchNorm2d(8), network.het, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


# With inductor the sizes are unknown from the start.
@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", None), ("inductor", True)])
def test_compiled_gradients_equal_eager_with_two_compilations_for_five_shapes(
    network: Network, backend: str, dynamic: bool | None
) -> None:
    model, channels = (few(network), 8) if backend == "inductor" else (network, 3)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for n, h, w in SHAPES:
        x = torch.randn(n, channels, h, w)
        for mine, eager in zip(gradients(compiled, x), gradients(model, x), strict=True):
            torch.testing.assert_close(mine, eager, atol=1e-4, rtol=1e-4)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"


def test_reduce_overhead_from_a_cold_cache(network: Network) -> None:
    model, x = few(network).eval(), torch.randn(2, 8, 12, 12)
    with torch.no_grad(), torch._inductor.utils.fresh_inductor_cache():
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_first_call_that_is_compiled_traces_whole() -> None:
    torch._dynamo.reset()
    support = hk.Support.het(6, 7, 3, p=3)
    x, w = torch.randn(2, 6, 5, 5), torch.randn(7, 6, 3, 3)

    def run(x: Tensor) -> Tensor:
        return hk.functional.support_conv2d(x, w, support, padding=1)

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), run(x))


def test_use_backend_reaches_a_compiled_layer(network: Network) -> None:
    layer, x = network.het, torch.randn(1, 8, 6, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    with hk.use_backend("reference"):
        choices = layer._geometry.choices
        before = {choice.backend.name for choice in choices.values()}
        torch.testing.assert_close(compiled(x), expected)
        after = {choice.backend.name for choice in choices.values()}
    # The op's body keeps its own Geometry, so look there too.

    own = {c.backend.name for g in _of_operators.geometries() for c in g.choices.values()}
    assert "reference" in own | (after - before)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_exported_program_computes_and_trains(network: Network, dynamic: bool) -> None:
    x = torch.randn(3, 3, 12, 12)
    shapes = {0: torch.export.Dim("n", min=2, max=64)} if dynamic else None
    exported = torch.export.export(network, (x,), dynamic_shapes=(shapes,) if dynamic else None)
    module = exported.module()
    batch = torch.randn(5, 3, 12, 12) if dynamic else x
    torch.testing.assert_close(module(batch), copy.deepcopy(network)(batch))
    mine = gradients(module, batch)
    named = dict(network.named_parameters())
    gradients(network, batch)
    for (name, _), gradient in zip(module.named_parameters(), mine, strict=True):
        torch.testing.assert_close(gradient, named[name].grad, atol=1e-5, rtol=1e-4)


def test_exported_program_is_self_contained_in_a_file(network: Network, tmp_path) -> None:
    network.eval()
    x = torch.randn(2, 3, 12, 12)
    torch.export.save(torch.export.export(network, (x,)), tmp_path / "network.pt2")
    expected = network(x)
    from hetconv_kernels import support

    # As in a fresh process: no Support is known.
    _of_operators.clear()
    known = dict(support._known)
    support._known.clear()
    try:
        loaded = torch.export.load(tmp_path / "network.pt2").module()
        torch.testing.assert_close(loaded(x), expected)
    finally:
        support._known.update(known)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(network: Network, reentrant: bool) -> None:
    network.eval()
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    direct = torch.autograd.grad(network(x).square().sum(), x)[0]
    saved = torch.autograd.grad(
        checkpoint(network, x, use_reentrant=reentrant).square().sum(), x
    )[0] if not reentrant else None  # fmt: skip
    if reentrant:  # reentrant checkpointing supports backward() only
        checkpoint(network, x, use_reentrant=True).square().sum().backward()
        saved = x.grad
    torch.testing.assert_close(saved, direct)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_activations_and_keeps_float32_gradients(dtype: torch.dtype) -> None:
    layer = hk.nn.HetConv2d(8, 12, 3, padding=1)
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    gradient = layer.weight.grad
    assert gradient.dtype == x.grad.dtype == torch.float32
    exact = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    assert (gradient - exact).norm() < 0.03 * exact.norm()
    # Double precision is never lowered, as in PyTorch itself.
    with torch.autocast("cpu", dtype=dtype):
        assert layer.double()(x.double()).dtype == torch.float64


def test_autocast_inside_compile(network: Network) -> None:
    layer, x = network.het, torch.randn(2, 8, 6, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, eager = compiled(x), layer(x)
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
def test_results_are_laid_out_like_those_of_conv2d(
    layout: torch.memory_format, weights: torch.memory_format, backend: str
) -> None:
    layer = hk.nn.HetConv2d(8, 12, 3, padding=1, backend=backend).to(memory_format=weights)
    conv = layer.to_conv2d()
    x = torch.randn(2, 8, 6, 7).to(memory_format=layout)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, reference = layer(mine), conv(theirs)
    assert y.stride() == reference.stride()
    y.sum().backward()
    reference.sum().backward()
    assert mine.grad.stride() == theirs.grad.stride()
    assert layer.weight.grad.stride() == conv.weight.grad.stride()


def test_a_change_of_support_reaches_a_compiled_layer() -> None:
    torch._dynamo.reset()
    layer = hk.nn.SupportConv2d(8, 8, 3, support=hk.Support.dense(8, 8, 3))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 8, 5, 5)
    compiled(x)
    layer.support = hk.Support.het(8, 8, 3, p=4)
    torch.testing.assert_close(compiled(x), layer.to_conv2d()(x))


def test_threads_may_share_a_layer() -> None:
    layer = hk.nn.HetConv2d(8, 12, 3, padding=1).eval()
    inputs = [torch.randn(1, 8, 5 + i % 4, 7) for i in range(32)]
    with torch.no_grad():
        expected = [layer.to_conv2d()(x) for x in inputs]

        def run(x: Tensor) -> Tensor:
            with torch.no_grad():
                return layer(x)

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(run, inputs))
    for mine, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, truth)


def test_a_profile_names_the_op() -> None:
    layer, x = hk.nn.HetConv2d(4, 4, 3), torch.randn(1, 4, 5, 5)
    with torch.profiler.profile() as profile:
        layer(x)
    assert "hetconv::fprop" in {event.key for event in profile.key_averages()}


def test_inference_mode_and_its_tensors(network: Network) -> None:
    network.eval()
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = network(x)
    with torch.inference_mode():
        made_inside = copy.deepcopy(network)
        torch.testing.assert_close(network(x), expected)
        torch.testing.assert_close(made_inside(x), expected)
        made_inside.het.weight.mul_(2)
        torch.testing.assert_close(
            made_inside.het(x.expand(2, 3, 12, 12)[:, :1].expand(2, 8, 12, 12)),
            made_inside.het.to_conv2d()(x[:, :1].expand(2, 8, 12, 12)),
        )
    # What inference mode cached can be used in training afterwards.
    network(x).sum().backward()


def test_a_tensor_subclass_is_dispatched_not_unwrapped() -> None:
    class Tagged(Tensor):
        pass

    layer, x = hk.nn.HetConv2d(4, 4, 3), torch.randn(1, 4, 5, 5)
    y = layer(x.as_subclass(Tagged))
    assert type(y) is Tagged
    torch.testing.assert_close(y.as_subclass(Tensor), layer(x))
