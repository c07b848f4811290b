# SPDX-License-Identifier: Apache-2.0
"""The CUDA engine's kernel for wide groups on Hopper: every form of its tables, both dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_layers import compare, compare_huge, operands, poisoned

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import CODES
from hetconv_kernels.backends.cuda import choice, wide_tiles
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.testing import error_bound, oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "cuda" not in hk.available_backends(), reason="hetconv_kernels._cuda is not built here"
    ),
]

CODE = CODES["cuda"]
KEEP = torch.rand(5, 96, generator=torch.Generator().manual_seed(0)) < 0.3
OWNERS = torch.arange(5).repeat_interleave(torch.tensor([24, 64, 8, 40, 56]))
SUPPORTS = {
    "dense": hk.Support.dense(128, 192, 3),
    "het2": hk.Support.het(128, 128, 3, p=2),
    "het4": hk.Support.het(256, 256, 3, p=4),
    "interleaved": hk.Support.het(64, 64, 3, p=4, order="interleaved"),
    "ragged": hk.Support.self_grouped(OWNERS.numpy(), KEEP.numpy(), 3),
    "five": hk.Support.dense(16, 24, 5),
    "pointwise": hk.Support.dense(256, 72, 1),
}
DTYPES = [torch.bfloat16, torch.float16]
VERBS = ("fprop", "dgrad")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> Any:
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        pytest.skip(f"the kernel is for compute capability 9.0, and this is {capability}")
    monkeypatch.setattr(choice, "ONLY_KERNEL", "wide")
    with poisoned():
        yield


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_primitives_equal_the_oracle(dtype: torch.dtype, support: str, stride: int) -> None:
    s = SUPPORTS[support]
    compare(make_geometry(s, stride, s.kernel[0] // 2), dtype, CODE, verbs=VERBS)


@pytest.mark.parametrize("cluster", wide_tiles.CLUSTER_SIZES)
@pytest.mark.parametrize("pixels", wide_tiles.TILE_PIXELS)
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (3, 65), (37, 20)], ids=str)
def test_tiles_of_every_size(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], pixels: int, cluster: int
) -> None:
    """A Support of its own each time: what is chosen is kept with it."""
    monkeypatch.setattr(wide_tiles, "TILE_PIXELS", (pixels,))
    monkeypatch.setattr(wide_tiles, "CLUSTER_SIZES", (cluster,))
    support = hk.Support.het(128, 128, 3, p=2)
    support.derived.clear()
    try:
        compare(make_geometry(support, 1, 1), DTYPES[0], CODE, size, VERBS)
    finally:
        support.derived.clear()


@pytest.mark.parametrize("dilation", [2, 5])
@pytest.mark.parametrize("pads", [0, (3, 1, 0, 2)], ids=str)
def test_dilations_and_uneven_pads(dilation: int, pads: Any) -> None:
    geometry = make_geometry(SUPPORTS["het2"], 1, pads, dilation)
    compare(geometry, DTYPES[0], CODE, (27, 29), VERBS)


def test_many_tiles_for_each_block() -> None:
    """Blocks that go on from tile to tile, with copies ahead."""
    geometry = make_geometry(SUPPORTS["het4"], 1, 1)
    x, w, _ = operands(geometry, DTYPES[0], n=96, size=(28, 28))
    y = ops.run_fprop(x, w, geometry, None, CODE)
    exact = oracle(x.double(), w.double(), geometry)
    bound = error_bound(oracle(x.double().abs(), w.double().abs(), geometry), 2304, x.dtype)
    assert ((y.double() - exact).abs() <= bound).all()
    assert torch.equal(y, ops.run_fprop(x, w, geometry, None, CODE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SUPPORTS)
def test_wgrad(name: str, dtype: torch.dtype) -> None:
    geometry = make_geometry(SUPPORTS[name], 1, 1)
    compare(geometry, dtype, CODE, (14, 18), ("wgrad",))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    compare_huge(CODE)
