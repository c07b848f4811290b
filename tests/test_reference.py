# SPDX-License-Identifier: Apache-2.0
"""The plain meaning of the primitives equals the oracle and its gradients."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import masks, random_mask
from torch import Tensor

from hetconv_kernels import Support
from hetconv_kernels.packing import dense_weight
from hetconv_kernels.problem import Geometry, make_geometry
from hetconv_kernels.reference import group_dgrad, group_fprop, group_wgrad
from hetconv_kernels.testing import error_bound, oracle

NAN = float("nan")
SUPPORTS = {
    "dense": Support.dense(5, 6, 3),
    "grouped": Support.grouped(6, 4, 3, 2),
    "het": Support.het(10, 9, 3, p=4),
    "interleaved": Support.het(10, 9, 3, p=4, order="interleaved"),
    "self-grouped": Support.self_grouped(
        [0, 1, 0, 2, 1], np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool), (1, 3)
    ),
    "irregular": Support.from_mask(random_mask(2, (7, 5, 3, 3))),
    "empty": Support.from_mask(np.zeros((3, 2, 3, 3), bool)),
}


def operands(geometry: Geometry, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, ...]:
    """x, a dense weight whose dead entries are zero, and dy."""
    support = geometry.support
    x = torch.randn(batch, support.channels, 7, 8).to(dtype)
    w = dense_weight(support, torch.randn(support.shape), dtype)
    dy = torch.randn(batch, support.filters, *geometry.output_size(7, 8)).to(dtype)
    return x, w, dy


def truth(geometry: Geometry, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx and dw in float64, by PyTorch's own differentiation."""
    x, w = (t.detach().double().requires_grad_() for t in (x, w))
    y = oracle(x, w, geometry)
    return y.detach(), *torch.autograd.grad(y, (x, w), dy.double())


def run(geometry: Geometry, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx and dw, with dead entries of dw cleared: there the reference may hold anything."""
    mask = torch.tensor(geometry.support.mask)
    return (
        group_fprop(geometry, x, w),
        group_dgrad(geometry, *x.shape[2:], dy, w),
        torch.where(mask, group_wgrad(geometry, dy, x), 0),
    )


@settings(max_examples=60)
@given(
    masks(),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_values_and_gradients_of_any_geometry(
    mask: Any, stride: tuple[int, int], pads: tuple[int, ...], dilation: tuple[int, int]
) -> None:
    geometry = make_geometry(Support.from_mask(mask), stride, pads, dilation)
    x, w, dy = operands(geometry, torch.float64)
    for mine, expected in zip(run(geometry, x, w, dy), truth(geometry, x, w, dy), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
def test_every_dtype_is_within_its_bound(support: Support, dtype: torch.dtype) -> None:
    geometry = make_geometry(support, 1, 1)
    x, w, dy = operands(geometry, dtype)
    f, c, kh, kw = support.shape
    depths = (c * kh * kw, f * kh * kw, dy[:, 0].numel())
    found = run(geometry, x, w, dy)
    exact = truth(geometry, x, w, dy)
    magnitudes = truth(geometry, x.abs(), w.abs(), dy.abs())
    for mine, expected, magnitude, depth in zip(found, exact, magnitudes, depths, strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - expected).abs()
        assert (error <= error_bound(magnitude, depth, dtype)).all()


def test_sums_over_many_groups_do_not_lose_16_bit_digits() -> None:
    # 512 groups of one filter share one channel; added up in bfloat16 the sum would stay at 256.
    mask = np.zeros((512, 10, 1, 1), bool)
    mask[:, 0] = True
    mask[:, 1:, 0, 0] = np.arange(512)[:, None] >> np.arange(9) & 1
    geometry = make_geometry(Support.from_mask(mask))
    assert len(geometry.support.groups) == 512
    w = dense_weight(geometry.support, torch.ones(mask.shape), torch.bfloat16)
    dx = group_dgrad(geometry, 1, 1, torch.ones(1, 512, 1, 1, dtype=torch.bfloat16), w)
    assert dx.flatten().tolist() == [512.0, *[256.0] * 9]


@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
def test_an_empty_batch_gives_empty_images_and_a_zero_gradient(support: Support) -> None:
    geometry = make_geometry(support, 2, 1)
    x, w, dy = operands(geometry, torch.float32, batch=0)
    y, dx, dw = run(geometry, x, w, dy)
    assert (y.shape, dx.shape) == (dy.shape, x.shape)
    assert dw.shape == support.shape
    assert (dw == 0).all()


@pytest.mark.parametrize("layout", ["channels_last", "turned", "sliced"])
def test_layouts_do_not_change_the_result(layout: str) -> None:
    geometry = make_geometry(SUPPORTS["het"], 1, 1)
    x, w, dy = operands(geometry, torch.float64)

    def laid_out(t: Tensor) -> Tensor:
        if layout == "channels_last":
            return t.contiguous(memory_format=torch.channels_last)
        if layout == "turned":
            return t.transpose(2, 3).contiguous().transpose(2, 3)
        return torch.cat([t, t], dim=1)[:, : t.shape[1]]

    for mine, expected in zip(
        run(geometry, *map(laid_out, (x, w, dy))), run(geometry, x, w, dy), strict=True
    ):
        torch.testing.assert_close(mine, expected)


@settings(max_examples=40)
@given(masks(), st.integers(0, 7))
def test_a_non_finite_channel_stays_with_the_filters_that_read_it(mask: Any, channel: int) -> None:
    support = Support.from_mask(mask)
    channel %= support.channels
    geometry = make_geometry(support, 1, 1)
    x, w, dy = operands(geometry, torch.float32)
    clean_y, _, clean_dw = run(geometry, x, w, dy)
    x[:, channel] = NAN
    y, _, dw = run(geometry, x, w, dy)
    reads = torch.tensor(mask[:, channel].any((1, 2)))
    assert torch.equal(y[:, ~reads], clean_y[:, ~reads])
    others = [c for c in range(support.channels) if c != channel]
    torch.testing.assert_close(dw[:, others], clean_dw[:, others])


def test_nothing_warns_about_read_only_indices() -> None:
    geometry = make_geometry(SUPPORTS["irregular"], 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(geometry, *operands(geometry, torch.float32))
