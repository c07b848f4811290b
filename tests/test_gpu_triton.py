# SPDX-License-Identifier: Apache-2.0
"""The Triton engine on a GPU: both kernels, every dtype, capture, streams, determinism, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import CODES, get_backend
from hetconv_kernels.backends.triton import choice, wgrad_choice
from hetconv_kernels.errors import BackendError
from hetconv_kernels.problem import Geometry, make_geometry
from hetconv_kernels.testing import error_bound, oracle

pytestmark = pytest.mark.gpu

CODE = CODES["triton"]
KEEP = torch.rand(5, 128, generator=torch.Generator().manual_seed(0)) < 0.3
SUPPORTS = {
    "dense": hk.Support.dense(64, 128, 3),
    "het": hk.Support.het(256, 256, 3, p=4),
    "narrow": hk.Support.het(64, 64, 3, p=8),
    "interleaved": hk.Support.het(64, 64, 3, p=4, order="interleaved"),
    "ragged": hk.Support.self_grouped(torch.arange(96) % 5, KEEP.numpy(), 3),
    "tails": hk.Support.dense(36, 20, 5),
    "pointwise": hk.Support.dense(128, 64, 1),
}
# bfloat16 first: it is the one that the interpreter cannot show.
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _exact_and_poisoned() -> Any:
    """No TF32, and fresh memory that reads NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(
    geometry: Geometry, dtype: torch.dtype, n: int = 5, size: tuple[int, int] = (14, 18)
) -> Any:
    s = geometry.support

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype).contiguous(memory_format=LAST)

    dy = random(n, s.filters, *geometry.output_size(*size))
    return random(n, s.channels, *size), random(*s.shape), dy


def compare(geometry: Geometry, dtype: torch.dtype, size: tuple[int, int] = (14, 18)) -> None:
    s = geometry.support
    x, w, dy = operands(geometry, dtype, size=size)
    mask = torch.tensor(s.mask, device="cuda")

    def truth(*values: torch.Tensor) -> Any:
        tx, tw, tdy = (v.double().requires_grad_() for v in values)
        y = oracle(tx, tw, geometry)
        dx, dw = torch.autograd.grad(y, (tx, tw), tdy)
        return y.detach(), dx, torch.where(mask, dw, 0.0)

    exact, sizes = truth(x, w, dy), truth(x.abs(), w.abs(), dy.abs())
    dead = torch.where(mask, w, float("nan")).contiguous(memory_format=LAST)
    found = (
        ops.run_fprop(x, dead, geometry, None, CODE),
        ops.run_dgrad(dy, dead, geometry, size, CODE),
        ops.run_wgrad(dy, x, geometry, s.shape, dtype, CODE),
    )
    taps = s.kernel[0] * s.kernel[1]
    depths = s.channels * taps, s.filters * taps, dy[:, 0].numel()
    for name, mine, value, whole, depth in zip(
        ("fprop", "dgrad", "wgrad"), found, exact, sizes, depths, strict=True
    ):
        error = (mine.double() - value).abs()
        assert (error <= error_bound(whole, depth, dtype)).all(), f"{name}: {error.max()}"


@pytest.mark.parametrize("path", ["gather", "boxes"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_kernels_equal_the_oracle(
    dtype: torch.dtype, support: str, stride: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "boxes" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("boxes are for Hopper")
    monkeypatch.setattr(choice, "ONLY", path)
    compare(make_geometry(SUPPORTS[support], stride, SUPPORTS[support].kernel[0] // 2), dtype)


@pytest.mark.parametrize("dilation", [2, 12])
@pytest.mark.parametrize("pads", [0, (3, 1, 0, 2)], ids=str)
def test_dilations_and_uneven_pads(dilation: int, pads: Any) -> None:
    compare(make_geometry(SUPPORTS["het"], 1, pads, dilation), torch.bfloat16, (27, 29))


def test_every_choice_gives_the_same_result() -> None:
    from hetconv_kernels.backends.triton.calls import GatherCall

    geometry = make_geometry(SUPPORTS["het"], 1, 1)
    x, w, _ = operands(geometry, torch.bfloat16)
    p = ops.describe("fprop", geometry, x, x, w, x.shape[2:])
    exact = oracle(x.double(), w.double(), geometry)
    bound = error_bound(oracle(x.double().abs(), w.double().abs(), geometry), 2304, x.dtype)
    for picked in choice.gather_choices(p):
        y, _ = GatherCall(p, picked).run(x, w)
        assert ((y.double() - exact).abs() <= bound).all(), picked.name


def test_every_choice_of_wgrad_gives_the_same_result() -> None:
    from hetconv_kernels.backends.triton.wgrad_calls import WgradCall

    s = hk.Support.het(128, 128, 3, p=4, order="interleaved")
    geometry = make_geometry(s, 1, 1)
    x, w, dy = operands(geometry, torch.bfloat16, size=(14, 14))
    leaf = w.double().requires_grad_()
    (exact,) = torch.autograd.grad(oracle(x.double(), leaf, geometry), leaf, dy.double())
    (whole,) = torch.autograd.grad(
        oracle(x.double().abs(), leaf, geometry), leaf, dy.double().abs()
    )
    exact = torch.where(torch.tensor(s.mask, device="cuda"), exact, 0.0)
    bound = error_bound(whole, dy[:, 0].numel(), w.dtype)
    p = ops.describe("wgrad", geometry, dy, x, w, x.shape[2:])
    for picked in wgrad_choice.wgrad_choices(p):
        dw = WgradCall(p, picked).run(dy, x)
        assert ((dw.double() - exact).abs() <= bound).all(), picked.name


def test_tf32_follows_the_switch_of_cudnn() -> None:
    geometry = make_geometry(SUPPORTS["dense"], 1, 1)
    x, w, _ = operands(geometry, torch.float32)
    exact = oracle(x.double(), w.double(), geometry)
    errors = {}
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        try:
            y = ops.run_fprop(x, w, geometry, None, CODE)
        finally:
            torch.backends.cudnn.allow_tf32 = False
        errors[allowed] = (y.double() - exact).abs().max()
    assert errors[False] < 0.1 * errors[True]


@pytest.mark.parametrize("verb", ["fprop", "dgrad", "wgrad"])
def test_two_runs_agree_bit_for_bit(verb: str) -> None:
    geometry = make_geometry(SUPPORTS["het"], 1, 1)
    x, w, dy = operands(geometry, torch.bfloat16, n=32)
    run = {
        "fprop": lambda: ops.run_fprop(x, w, geometry, None, CODE),
        "dgrad": lambda: ops.run_dgrad(dy, w, geometry, (14, 18), CODE),
        "wgrad": lambda: ops.run_wgrad(dy, x, geometry, tuple(w.shape), w.dtype, CODE),
    }[verb]
    first = run()
    assert all(torch.equal(first, run()) for _ in range(5))


def test_epilogue_and_statistics() -> None:
    geometry = make_geometry(SUPPORTS["het"], 1, 1)
    x, w, dy = operands(geometry, torch.bfloat16)
    scale, shift = (torch.randn(256, device="cuda") for _ in range(2))
    y = ops.run_fprop(x, w, geometry, shift, CODE, True, scale, dy, "relu")
    exact = oracle(x.double(), w.double(), geometry)
    fused = torch.relu(exact * scale[:, None, None] + shift[:, None, None] + dy.double())
    torch.testing.assert_close(y.double(), fused, rtol=2e-2, atol=0.5)
    y, total, squares = ops.run_fprop_stats(x, w, geometry, shift, CODE)
    exact = exact + shift[:, None, None]
    torch.testing.assert_close(total.double(), exact.sum((0, 2, 3)), rtol=1e-3, atol=5.0)
    torch.testing.assert_close(squares.double(), exact.square().sum((0, 2, 3)), rtol=1e-3, atol=5.0)


def test_a_training_step_is_captured_and_replayed() -> None:
    layer = hk.nn.HetConv2d(64, 64, 3, padding=1, p=2, device="cuda", dtype=torch.bfloat16)
    layer.backend = "triton"
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


def test_what_is_met_first_during_a_capture_is_refused() -> None:
    geometry = make_geometry(hk.Support.het(64, 72, 3, p=3), 1, 1)
    x, w, _ = operands(geometry, torch.bfloat16)
    torch.cuda.synchronize()
    with (
        pytest.raises(BackendError, match=r"warmup\(model"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.run_fprop(x, w, geometry, None, CODE)
    torch.cuda.synchronize()
    ops.run_fprop(x, w, geometry, None, CODE)


def test_two_streams_share_a_layer() -> None:
    geometry = make_geometry(SUPPORTS["het"], 1, 1)
    pairs = [operands(geometry, torch.bfloat16, n=8)[:2] for _ in range(8)]
    expected = [ops.run_fprop(x, w, geometry, None, CODE) for x, w in pairs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for i, (x, w) in enumerate(pairs):
        with torch.cuda.stream(streams[i % 2]):
            found.append(ops.run_fprop(x, w, geometry, None, CODE))
    torch.cuda.synchronize()
    assert all(torch.equal(mine, truth) for mine, truth in zip(found, expected, strict=True))


def test_an_unaligned_operand_is_read_rightly() -> None:
    geometry = make_geometry(SUPPORTS["dense"], 1, 1)
    x, w, _ = operands(geometry, torch.bfloat16)
    aligned = ops.run_fprop(x, w, geometry, None, CODE)
    storage = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)
    other = torch.as_strided(storage, x.shape, x.stride(), 1).copy_(x)
    unaligned = ops.run_fprop(other, w, geometry, None, CODE)
    torch.testing.assert_close(unaligned, aligned, rtol=2e-2, atol=2e-2)


def test_compiled_with_gradients() -> None:
    torch._dynamo.reset()
    layer = hk.nn.HetConv2d(64, 64, 3, padding=1, p=2, device="cuda", dtype=torch.bfloat16)
    layer.backend = "triton"
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 64, 14, 14, device="cuda").bfloat16().contiguous(memory_format=LAST)
    for run in (layer, compiled):
        y = run(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), layer.weight)
        if run is layer:
            expected = y, gradient
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(gradient, expected[1])


def test_tuning_measures_and_keeps(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hetconv_kernels import tuning

    monkeypatch.setenv("HETCONV_CACHE", str(tmp_path))
    tuning.store.cache_clear()
    geometry = make_geometry(hk.Support.het(64, 80, 3, p=2), 1, 1)
    x, w, _ = operands(geometry, torch.bfloat16)
    with tuning.tune():
        y = ops.run_fprop(x, w, geometry, None, CODE)
    tuning.store.cache_clear()
    assert [p.suffix for p in tmp_path.glob("tuning-*.json")] == [".json"]
    torch.testing.assert_close(
        y.double(), oracle(x.double(), w.double(), geometry), rtol=2e-2, atol=0.5
    )


@pytest.mark.parametrize("path", ["gather", "boxes"])
def test_more_than_2_to_the_31_elements(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "boxes" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("boxes are for Hopper")
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GB of free memory")
    monkeypatch.setattr(choice, "ONLY", path)
    torch.use_deterministic_algorithms(False)
    geometry = make_geometry(hk.Support.het(32, 32, 3, p=2), 1, 1)
    w = torch.randn(32, 32, 3, 3, device="cuda", dtype=torch.bfloat16)
    x = torch.empty(66, 1024, 1024, 32, device="cuda", dtype=torch.bfloat16).normal_()
    x = x.permute(0, 3, 1, 2)
    p = ops.describe("fprop", geometry, x, x, w, x.shape[2:])
    assert get_backend("triton").unsupported_reasons(p) == []
    y = ops.run_fprop(x, w, geometry, None, CODE)
    last = ops.run_fprop(x[-1:].clone(), w, geometry, None, CODE)
    torch.testing.assert_close(y[-1:], last, atol=2e-2, rtol=2e-2)
    dw = ops.run_wgrad(y, x, geometry, tuple(w.shape), torch.float32, CODE)
    halves = [
        ops.run_wgrad(y[a:b], x[a:b], geometry, tuple(w.shape), torch.float32, CODE)
        for a, b in ((0, 33), (33, 66))
    ]
    torch.testing.assert_close(
        dw, halves[0] + halves[1], rtol=1e-2, atol=float(1e-2 * dw.abs().max())
    )
