# SPDX-License-Identifier: Apache-2.0
"""The CUDA engine's kernels for narrow groups on a GPU: every form of their tables, both dtypes.

`test_gpu_cuda_wide` has the kernel for wide groups; see also `test_gpu_engines`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_layers import compare, compare_huge, operands, poisoned
from switches import convolutions_in

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import CODES
from hetconv_kernels.backends.cuda import Cuda, choice
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.testing import error_bound, oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "cuda" not in hk.available_backends(), reason="hetconv_kernels._cuda is not built here"
    ),
]

CODE = CODES["cuda"]
KEEP = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) < 0.3
SUPPORTS = {
    "het4": hk.Support.het(64, 64, 3, p=4),
    "het8": hk.Support.het(64, 64, 3, p=8),
    "wide": hk.Support.het(128, 128, 3, p=8),
    "interleaved": hk.Support.het(64, 64, 3, p=4, order="interleaved"),
    "ragged": hk.Support.self_grouped(torch.arange(64) % 8, KEEP.numpy(), 3),
    "grouped": hk.Support.grouped(64, 128, 3, 8),
    "five": hk.Support.dense(8, 24, 5),
    "pointwise": hk.Support.dense(128, 64, 1),
}
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(choice, "ONLY_KERNEL", "narrow")
    with poisoned():
        yield


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_primitives_equal_the_oracle(dtype: torch.dtype, support: str, stride: int) -> None:
    compare(make_geometry(SUPPORTS[support], stride, SUPPORTS[support].kernel[0] // 2), dtype, CODE)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("allowed", ["tf32", "ieee"])
def test_float32_equals_the_oracle(allowed: str, support: str) -> None:
    geometry = make_geometry(SUPPORTS[support], 1, SUPPORTS[support].kernel[0] // 2)
    x, w, dy = operands(geometry, torch.float32, size=(27, 29))
    leaf = x.double().requires_grad_()
    y = oracle(leaf, w.double(), geometry)
    (dx,) = torch.autograd.grad(y, leaf, dy.double())
    with convolutions_in(allowed):
        found = [ops.run_fprop(x, w, geometry, None, CODE)]
        found.append(ops.run_dgrad(dy, w, geometry, (27, 29), CODE))
    most = 1e-6 if allowed == "ieee" else 1e-3
    for own, exact in zip(found, (y.detach(), dx), strict=True):
        assert float((own.double() - exact).norm() / exact.norm()) < most


@pytest.mark.parametrize("dilation", [2, 5])
@pytest.mark.parametrize("pads", [0, (3, 1, 0, 2)], ids=str)
def test_dilations_and_uneven_pads(dilation: int, pads: Any) -> None:
    compare(make_geometry(SUPPORTS["het8"], 1, pads, dilation), DTYPES[0], CODE, (27, 29))


@pytest.mark.parametrize("size", [(1, 1), (3, 65), (7, 7), (130, 2)], ids=str)
def test_uneven_images(size: tuple[int, int]) -> None:
    compare(make_geometry(SUPPORTS["het4"], 1, 1), DTYPES[0], CODE, size)


def test_filters_that_fill_no_vector() -> None:
    geometry = make_geometry(hk.Support.het(64, 45, 3, p=4), 1, 1)
    compare(geometry, DTYPES[0], CODE, verbs=("fprop",))


def test_many_tiles_for_each_block() -> None:
    """Blocks that go on from tile to tile, with copies ahead."""
    geometry = make_geometry(SUPPORTS["het8"], 1, 1)
    x, w, _ = operands(geometry, DTYPES[0], n=96, size=(56, 56))
    y = ops.run_fprop(x, w, geometry, None, CODE)
    exact = oracle(x.double(), w.double(), geometry)
    bound = error_bound(oracle(x.double().abs(), w.double().abs(), geometry), 576, x.dtype)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("support", ["het8", "wide", "interleaved"])
@pytest.mark.parametrize("verb", ["fprop", "dgrad", "wgrad"])
def test_tma_brings_what_cp_async_does(
    monkeypatch: pytest.MonkeyPatch, verb: str, support: str
) -> None:
    """Bit for bit; on a GPU without TMA both are cp.async."""
    geometry, size = make_geometry(SUPPORTS[support], 1, 1), (27, 29)
    x, w, dy = operands(geometry, DTYPES[0], n=8, size=size)
    first, second = (x, w) if verb == "fprop" else (dy, x if verb == "wgrad" else w)
    problem = ops.describe(verb, geometry, first, x, w, size)
    found = []
    for tma in (True, False):
        monkeypatch.setattr(choice, "TMA", tma)
        engine = Cuda()
        prepare = {"fprop": engine.fprop, "dgrad": engine.dgrad, "wgrad": engine.wgrad}[verb]
        found.append(prepare(problem)(first, second))
    assert torch.equal(*found)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    compare_huge(CODE)
