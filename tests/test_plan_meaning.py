# SPDX-License-Identifier: Apache-2.0
"""A Plan run literally is the masked convolution; a strict one contains non-finite values."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import plans

from hetconv_kernels import Support
from hetconv_kernels.packing import pack_slabs
from hetconv_kernels.plan import Block, Plan
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.testing import execute_dgrad, execute_fprop, execute_wgrad, oracle


@settings(max_examples=60)
@given(
    plans(),
    st.integers(1, 2),
    st.tuples(*[st.integers(0, 2)] * 4),
    st.integers(1, 2),
    st.integers(0, 2**32 - 1),
)
def test_the_literal_executor_is_the_masked_convolution_and_its_gradients(
    p: Plan, stride: int, pads: tuple[int, ...], dilation: int, seed: int
) -> None:
    torch.manual_seed(seed)
    geometry = make_geometry(p.support, stride, pads, dilation)
    size = (6, 5)
    x = torch.randn(2, p.support.channels, *size, dtype=torch.float64, requires_grad=True)
    w = torch.randn(p.support.shape, dtype=torch.float64, requires_grad=True)
    y = oracle(x, w, geometry)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)

    poisoned = torch.where(torch.tensor(p.support.mask), w.detach(), float("nan"))
    slabs = pack_slabs(p, poisoned)
    torch.testing.assert_close(execute_fprop(p, geometry, x.detach(), slabs), y.detach())
    torch.testing.assert_close(execute_dgrad(p, geometry, size, dy, slabs), dx)
    live = torch.tensor(p.slab_source >= 0)
    expected = pack_slabs(p, dw)
    found = execute_wgrad(p, geometry, dy, x.detach())
    torch.testing.assert_close(found[live], expected[live])


@given(plans(strict=True), st.integers(0, 7))
def test_strict_keeps_a_non_finite_channel_from_filters_that_do_not_read_it(
    p: Plan, channel: int
) -> None:
    channel %= p.support.channels
    geometry = make_geometry(p.support, 1, 1)
    w = torch.randn(p.support.shape)
    x = torch.randn(1, p.support.channels, 4, 4)
    clean = execute_fprop(p, geometry, x, pack_slabs(p, w))
    x[:, channel] = float("nan")
    y = execute_fprop(p, geometry, x, pack_slabs(p, w))
    reads = torch.tensor(p.support.mask[:, channel].any((1, 2)))
    assert torch.equal(y[:, ~reads], clean[:, ~reads])
    assert y[:, reads].isnan().flatten(2).any(2).all()


@given(plans(strict=True), st.integers(0, 7))
def test_strict_keeps_a_non_finite_gradient_from_channels_that_its_filter_does_not_read(
    p: Plan, filter_: int
) -> None:
    filter_ %= p.support.filters
    geometry = make_geometry(p.support, 1, 2)
    slabs = pack_slabs(p, torch.randn(p.support.shape))
    dy = torch.randn(1, p.support.filters, *geometry.output_size(4, 4))
    clean = execute_dgrad(p, geometry, (4, 4), dy, slabs)
    dy[:, filter_] = float("inf")
    dx = execute_dgrad(p, geometry, (4, 4), dy, slabs)
    reads = torch.tensor(p.support.mask[filter_].any((1, 2)))
    assert torch.equal(dx[:, ~reads], clean[:, ~reads])
    assert not dx[:, reads].isfinite().flatten(2).all(2).any()


def test_merged_groups_may_pass_a_non_finite_value_on() -> None:
    p = Plan(Support.grouped(4, 4, 3, 4), Block(4, 4))
    x = torch.zeros(1, 4, 4, 4)
    x[:, 0] = float("nan")
    y = execute_fprop(p, make_geometry(p.support), x, pack_slabs(p, torch.randn(p.support.shape)))
    assert y[:, 1:].isnan().any()
