# SPDX-License-Identifier: Apache-2.0
"""Max-pooling as part of a fused layer: the very numbers that pooling afterwards gives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F_
from layers import DTYPES
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.backends import available_backends, choose, get_backend, predict
from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.nn import FusedConv2d, HetConv2d, SupportConv2d, fuse
from hetconv_kernels.pooling import Pool

POOLS = {
    "vgg": Pool((2, 2), (2, 2), (0, 0)),
    "resnet": Pool((3, 3), (2, 2), (1, 1)),
    "uneven": Pool((3, 2), (1, 3), (1, 0)),
    "gaps": Pool((2, 1), (3, 2), (0, 0)),
    "wide": Pool((5, 5), (1, 1), (2, 2)),
}
# Channels, filters, height, width, kernel, stride: vectors that are not full, several bands, both
# kinds of band (few channels, and whole vectors of them), one that does not fit in the cache.
SHAPES = [
    (16, 32, 17, 20, 3, 1),
    (3, 40, 33, 36, 7, 2),
    (32, 24, 61, 5, 1, 1),
    (32, 24, 61, 9, 1, 2),
    (64, 64, 9, 2000, 3, 1),
]
# The same where no two filters share a mask, so that pixels lie in vectors.
RAGGED = [(11, 21, 40, 37, 3, 1), (12, 8, 70, 33, 3, 2)]
CPU = pytest.mark.skipif("cpu" not in available_backends(), reason="the engine is not built here")


def pair(shape: tuple[int, ...], pool: Pool, dtype: torch.dtype) -> tuple[FusedConv2d, FusedConv2d]:
    """Builds a fused layer without and with pooling."""
    torch.manual_seed(0)
    c, f, _, _, kernel, stride = shape
    if shape in RAGGED:
        support = hk.Support.from_mask(torch.rand(f, c, kernel, kernel) < 0.3)
        conv: Any = SupportConv2d(c, f, kernel, stride, kernel // 2, support=support).to(dtype)
    else:
        conv = HetConv2d(c, f, kernel, stride, kernel // 2, p=2 if c % 2 == 0 else 1).to(dtype)
    return fuse(conv, None, "relu"), fuse(conv, None, "relu", pool)


def image(shape: tuple[int, ...], dtype: torch.dtype, n: int = 3) -> Tensor:
    x = torch.randn(n, shape[0], *shape[2:4]).to(dtype)
    return x.to(memory_format=torch.channels_last)


def pooled(y: Tensor, pool: Pool) -> Tensor:
    return F_.max_pool2d(y, pool.kernel, pool.stride, pool.padding)


def assert_same(got: Tensor, want: Tensor) -> None:
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@CPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", [*SHAPES, *RAGGED], ids=str)
def test_the_engine_pools_as_it_computes(shape, pool: str, dtype: torch.dtype) -> None:
    apart, together = pair(shape, POOLS[pool], dtype)
    x = image(shape, dtype)
    x[0, 0, 0, 0], x[1, 1, 2, 1], x[2, :, 4] = float("nan"), float("inf"), float("-inf")
    # Apart it might be transformed; then infinities and roundings would be others.
    with torch.no_grad(), hk.use_backend("cpu"), hk.strict_accuracy():
        assert_same(together(x), pooled(apart(x), POOLS[pool]))
    from hetconv_kernels.backends.cpu_plans import direct_plan

    choices = together._geometry.choices.values()
    plans = [direct_plan(choice.problem) for choice in choices]
    forms = {plan.form for plan in plans}
    if dtype == torch.bfloat16 and plans[0].isa == "avx512bf16":
        assert forms <= {"filters", "pixel pairs"}
    elif dtype != torch.float64:  # its vectors are shorter
        assert forms == {"pixels" if shape in RAGGED else "filters"}


@CPU
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_and_a_residual(threads: int) -> None:
    apart, together = pair(SHAPES[0], POOLS["resnet"], torch.float32)
    x, before = image(SHAPES[0], torch.float32, 1), torch.get_num_threads()
    residual = torch.randn(1, 32, 17, 20).to(memory_format=torch.channels_last)
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), hk.use_backend("cpu"):
            want = pooled(apart(x, residual), POOLS["resnet"])
            assert_same(together(x, residual), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("backend", ["reference", "vendor", "cpu", "auto"])
def test_every_backend(backend: str, contiguous: bool) -> None:
    if backend not in ("auto", *available_backends("cpu")):
        pytest.skip(f"{backend} is not built here")
    for pool in POOLS.values():
        apart, together = pair(SHAPES[0], pool, torch.float32)
        x = image(SHAPES[0], torch.float32)
        x = x.contiguous() if contiguous else x
        with torch.no_grad(), hk.use_backend(backend):
            torch.testing.assert_close(together(x), pooled(apart(x), pool), rtol=1e-5, atol=1e-5)


@CPU
def test_what_is_pooled_by_the_engine_and_what_that_saves() -> None:
    """Another memory format is pooled in a pass of its own."""
    apart, together = pair(SHAPES[0], POOLS["vgg"], torch.float32)
    x = image(SHAPES[0], torch.float32)
    engine = get_backend("cpu")
    for layer, like in itertools.product((apart, together), (x, x.contiguous())):
        with torch.no_grad():
            layer(like)
    chosen = [c for layer in (apart, together) for c in layer._geometry.choices.values()]
    problems = [choice.problem for choice in chosen]
    by = {(p.channels_last, p.pool is not None): p for p in problems}
    assert set(by) == set(itertools.product((False, True), repeat=2))
    assert engine.pools(by[True, True])
    assert not engine.pools(by[False, True])
    costs = {key: predict(engine, p) - engine.estimate(p) for key, p in by.items()}
    assert costs[True, False] == costs[False, False] == 0
    assert 0 < costs[True, True] < costs[False, True]
    assert predict(get_backend("vendor"), by[True, True]) > predict(engine, by[True, False])
    assert choose(by[True, True], 3).backend.name == "cpu"


def test_gradients_and_compilers_pool_afterwards() -> None:
    pool = POOLS["resnet"]
    apart, together = pair(SHAPES[0], pool, torch.float32)
    x = image(SHAPES[0], torch.float32).requires_grad_()
    dx = [
        torch.autograd.grad(y.square().sum(), x)[0] for y in (together(x), pooled(apart(x), pool))
    ]
    torch.testing.assert_close(*dx)
    program = torch.export.export(nn.Sequential(together).eval(), (x.detach(),)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(x.detach()), together(x.detach()))
    assert "pool=((3, 3), (2, 2), (1, 1))" in repr(together)
    assert "pool" not in repr(apart)


def test_an_image_that_the_window_has_no_place_in_is_refused() -> None:
    _, together = pair(SHAPES[0], Pool((30, 2), (1, 1), (0, 0)), torch.float32)
    with torch.no_grad(), pytest.raises(ArgumentError, match=r"received \(17, 20\), expected"):
        together(image(SHAPES[0], torch.float32))
    _, together = pair(SHAPES[0], POOLS["vgg"], torch.float32)
    with torch.no_grad():
        assert together(image(SHAPES[0], torch.float32, 0)).shape == (0, 32, 8, 10)
