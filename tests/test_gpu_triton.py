# SPDX-License-Identifier: Apache-2.0
"""The Triton engine on a GPU: both kernels, every dtype, tuning; see also `test_gpu_engines`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_layers import compare, compare_huge, operands, poisoned

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import CODES
from hetconv_kernels.backends.triton import choice, wgrad_choice
from hetconv_kernels.problem import make_geometry
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


@pytest.fixture(autouse=True)
def _poisoned() -> Any:
    with poisoned():
        yield


@pytest.mark.parametrize("path", ["gather", "tma"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_kernels_equal_the_oracle(
    dtype: torch.dtype, support: str, stride: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "tma" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("boxes are for Hopper")
    monkeypatch.setattr(choice, "ONLY_LAUNCH", path)
    compare(make_geometry(SUPPORTS[support], stride, SUPPORTS[support].kernel[0] // 2), dtype, CODE)


@pytest.mark.parametrize("size", [(7, 7), (14, 14)], ids=str)
@pytest.mark.parametrize("support", ["het", "dense"])
def test_boxes_of_many_images(
    support: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of these tiles are one pixel of many images and skip taps at the border."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("boxes are for Hopper")
    monkeypatch.setattr(choice, "ONLY_LAUNCH", "tma")
    compare(make_geometry(SUPPORTS[support], 1, 1), torch.bfloat16, CODE, size, n=130)


@pytest.mark.parametrize("dilation", [2, 12])
@pytest.mark.parametrize("pads", [0, (3, 1, 0, 2)], ids=str)
def test_dilations_and_uneven_pads(dilation: int, pads: Any) -> None:
    compare(make_geometry(SUPPORTS["het"], 1, pads, dilation), torch.bfloat16, CODE, (27, 29))


def test_every_choice_gives_the_same_result() -> None:
    from hetconv_kernels.backends.triton.calls import GatherCall

    geometry = make_geometry(SUPPORTS["het"], 1, 1)
    x, w, _ = operands(geometry, torch.bfloat16)
    p = ops.describe("fprop", geometry, x, x, w, x.shape[2:])
    exact = oracle(x.double(), w.double(), geometry)
    bound = error_bound(oracle(x.double().abs(), w.double().abs(), geometry), 2304, x.dtype)
    for picked in choice.gather_choices(p):
        y = GatherCall(p, picked).run(x, w)
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


@pytest.mark.parametrize("path", ["gather", "tma"])
def test_more_than_2_to_the_31_elements(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "tma" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("boxes are for Hopper")
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GB of free memory")
    monkeypatch.setattr(choice, "ONLY_LAUNCH", path)
    compare_huge(CODE)
