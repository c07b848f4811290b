# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: the oracle on CUDA, graph capture, streams, formats, huge tensors."""

from __future__ import annotations

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.problem import Geometry, make_geometry
from hetconv_kernels.testing import error_bound, oracle

pytestmark = pytest.mark.gpu

KEEP = torch.rand(5, 32, generator=torch.Generator().manual_seed(0)) < 0.4
SUPPORTS = {
    "dense": hk.Support.dense(32, 48, 3),
    "het": hk.Support.het(32, 48, 3, p=4),
    "interleaved": hk.Support.het(32, 48, 3, p=4, order="interleaved"),
    "grouped": hk.Support.grouped(32, 48, 3, 4),
    "ragged": hk.Support.self_grouped(torch.arange(48) % 5, KEEP.numpy(), 3),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def engines(geometry: Geometry, x: torch.Tensor, w: torch.Tensor) -> list[str]:
    problem = ops.describe("fprop", geometry, x, x, w, x.shape[2:])
    return [
        name
        for name in hk.available_backends("cuda")
        if not hk.backends.get_backend(name).unsupported_reasons(problem)
    ]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_on_cuda(
    dtype: torch.dtype, support: str, stride: int, layout: torch.memory_format
) -> None:
    s = SUPPORTS[support]
    geometry = make_geometry(s, stride, 1)
    x, w, b = (
        torch.randn(*shape, device="cuda", dtype=torch.float64).to(dtype)
        for shape in ((3, 32, 17, 20), s.shape, (48,))
    )
    x = x.contiguous(memory_format=layout)
    dy = torch.randn(3, 48, *geometry.output_size(17, 20), device="cuda").to(dtype)
    mask = torch.tensor(s.mask, device="cuda")

    def truth(*tensors: torch.Tensor) -> list[torch.Tensor]:
        tx, tw, tb, tdy = (t.double().cpu().requires_grad_() for t in tensors)
        y = oracle(tx, tw, geometry, tb)
        gx, gw, gb = torch.autograd.grad(y, (tx, tw, tb), tdy)
        return [y.detach(), gx, torch.where(mask.cpu(), gw, 0.0), gb]

    exact, magnitude = truth(x, w, b, dy), truth(*(t.abs() for t in (x, w, b, dy)))
    depths = [32 * 9 + 1, 48 * 9, dy[:, 0].numel(), dy[:, 0].numel()]
    for backend in engines(geometry, x, w):
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        y = hk.functional.support_conv2d(
            leaves[0], leaves[1], s, leaves[2], stride, 1, backend=backend
        )
        found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        for name, mine, value, size, depth in zip(
            ("y", "dx", "dw", "db"), found, exact, magnitude, depths, strict=True
        ):
            error = (mine.double().cpu() - value).abs()
            assert (error <= error_bound(size, depth, dtype)).all(), f"{backend}: {name}"


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_results_are_laid_out_like_those_of_conv2d(layout: torch.memory_format) -> None:
    layer = hk.nn.HetConv2d(32, 48, 3, padding=1, device="cuda")
    x = torch.randn(2, 32, 9, 10, device="cuda").contiguous(memory_format=layout)
    assert layer(x).stride() == layer.to_conv2d()(x).stride()


def test_a_captured_graph_reads_the_weight_anew() -> None:
    layer = hk.nn.HetConv2d(32, 48, 3, padding=1, device="cuda").eval()
    x = torch.randn(2, 32, 9, 10, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                hk.warmup(layer, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        layer.weight.mul_(2)
        graph.replay()
        torch.testing.assert_close(y, layer(x))


def test_reduce_overhead() -> None:
    torch._dynamo.reset()
    layer = hk.nn.HetConv2d(32, 48, 3, padding=1, device="cuda").eval()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 32, 9, 10, device="cuda")
            torch.testing.assert_close(compiled(x).clone(), layer(x))


def test_two_streams_may_share_a_layer() -> None:
    layer = hk.nn.HetConv2d(32, 48, 3, padding=1, device="cuda").eval()
    inputs = [torch.randn(4, 32, 40, 40, device="cuda") for _ in range(8)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        results = []
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                results.append(layer(x))
        torch.cuda.synchronize()
    for mine, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, truth)


def test_autocast_on_cuda() -> None:
    layer = hk.nn.HetConv2d(32, 48, 3, padding=1, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(torch.randn(2, 32, 9, 10, device="cuda"))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_moving_a_layer_moves_its_mask() -> None:
    layer = hk.nn.HetConv2d(32, 48, 3, padding=1)
    x = torch.randn(2, 32, 9, 10)
    expected = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(hk.errors.ArgumentError, match="devices of input, weight and bias"):
        layer(x)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    layer = hk.nn.HetConv2d(32, 32, 3, padding=1, device="cuda", dtype=torch.bfloat16)
    x = torch.empty(66, 32, 1024, 1024, device="cuda", dtype=torch.bfloat16).normal_()
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(y[-1:], layer(x[-1:].clone()), atol=2e-2, rtol=2e-2)
