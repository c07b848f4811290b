# SPDX-License-Identifier: Apache-2.0
"""What every engine for GPUs promises: determinism, epilogues, capture, streams, compiling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_layers import LAST, operands, poisoned

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import CODES
from hetconv_kernels.errors import BackendError
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.testing import oracle

pytestmark = pytest.mark.gpu

# Wider groups for Triton than the engine for narrow ones takes.
SUPPORTS = {"triton": hk.Support.het(256, 256, 3, p=4), "cuda": hk.Support.het(64, 64, 3, p=4)}


@pytest.fixture(params=SUPPORTS)
def engine(request: pytest.FixtureRequest) -> Any:
    if request.param not in hk.available_backends("cuda"):
        pytest.skip(f"the backend {request.param!r} is not built here")
    with poisoned():
        yield request.param


@pytest.mark.parametrize("verb", ["fprop", "dgrad", "wgrad"])
def test_two_runs_agree_bit_for_bit(engine: str, verb: str) -> None:
    geometry = make_geometry(SUPPORTS[engine], 1, 1)
    x, w, dy = operands(geometry, torch.bfloat16, n=32)
    run = {
        "fprop": lambda: ops.run_fprop(x, w, geometry, None, CODES[engine]),
        "dgrad": lambda: ops.run_dgrad(dy, w, geometry, (14, 18), CODES[engine]),
        "wgrad": lambda: ops.run_wgrad(dy, x, geometry, tuple(w.shape), w.dtype, CODES[engine]),
    }[verb]
    first = run()
    assert all(torch.equal(first, run()) for _ in range(5))


def test_epilogue(engine: str) -> None:
    geometry = make_geometry(SUPPORTS[engine], 1, 1)
    x, w, dy = operands(geometry, torch.bfloat16)
    filters = geometry.support.filters
    scale, shift = torch.randn(2, filters, device="cuda").bfloat16()
    y = ops.run_fprop(x, w, geometry, shift, CODES[engine], True, scale, dy, "relu")
    exact = oracle(x.double(), w.double(), geometry)
    fused = torch.relu(exact * scale[:, None, None] + shift[:, None, None] + dy.double())
    torch.testing.assert_close(y.double(), fused, rtol=2e-2, atol=0.5)


def test_a_training_step_is_captured_and_replayed(engine: str) -> None:
    layer = hk.nn.HetConv2d(64, 64, 3, padding=1, p=2, device="cuda", dtype=torch.bfloat16)
    layer.backend = engine
    x = torch.randn(4, 64, 14, 14, device="cuda").bfloat16().contiguous(memory_format=LAST)

    def step() -> torch.Tensor:
        layer.zero_grad(set_to_none=False)
        y = layer(x)
        y.square().sum().backward()
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    with torch.no_grad():
        layer.weight.mul_(0.5)
    graph.replay()
    captured = layer.weight.grad.clone()
    assert torch.equal(y, step())
    assert torch.equal(captured, layer.weight.grad)


def test_what_is_met_first_during_a_capture_is_refused(engine: str) -> None:
    geometry = make_geometry(hk.Support.het(64, 72, 3, p=3), 1, 1)
    x, w, _ = operands(geometry, torch.bfloat16)
    torch.cuda.synchronize()
    with (
        pytest.raises(BackendError, match=r"warmup\(model"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.run_fprop(x, w, geometry, None, CODES[engine])
    torch.cuda.synchronize()
    ops.run_fprop(x, w, geometry, None, CODES[engine])


def test_two_streams_share_a_layer(engine: str) -> None:
    geometry = make_geometry(SUPPORTS[engine], 1, 1)
    pairs = [operands(geometry, torch.bfloat16, n=8)[:2] for _ in range(8)]
    expected = [ops.run_fprop(x, w, geometry, None, CODES[engine]) for x, w in pairs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for i, (x, w) in enumerate(pairs):
        with torch.cuda.stream(streams[i % 2]):
            found.append(ops.run_fprop(x, w, geometry, None, CODES[engine]))
    torch.cuda.synchronize()
    assert all(torch.equal(mine, truth) for mine, truth in zip(found, expected, strict=True))


def test_an_unaligned_operand_is_read_rightly(engine: str) -> None:
    geometry = make_geometry(SUPPORTS[engine], 1, 1)
    x, w, _ = operands(geometry, torch.bfloat16)
    aligned = ops.run_fprop(x, w, geometry, None, CODES[engine])
    storage = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)
    other = torch.as_strided(storage, x.shape, x.stride(), 1).copy_(x)
    unaligned = ops.run_fprop(other, w, geometry, None, CODES[engine])
    torch.testing.assert_close(unaligned, aligned, rtol=2e-2, atol=2e-2)


def test_compiled_with_gradients(engine: str) -> None:
    torch._dynamo.reset()
    layer = hk.nn.HetConv2d(64, 64, 3, padding=1, p=2, device="cuda", dtype=torch.bfloat16)
    layer.backend = engine
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 64, 14, 14, device="cuda").bfloat16().contiguous(memory_format=LAST)
    for run in (layer, compiled):
        y = run(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), layer.weight)
        if run is layer:
            expected = y, gradient
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(gradient, expected[1])
