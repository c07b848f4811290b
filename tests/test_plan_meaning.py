# SPDX-License-Identifier: Apache-2.0
"""A Plan run literally is the masked convolution of finite values."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import plans

from hetconv_kernels import Support
from hetconv_kernels.backends.triton.plan import Block, Plan
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.testing import execute_dgrad, execute_fprop, execute_wgrad, oracle, pack_slabs


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


def test_merged_groups_may_pass_a_non_finite_value_on() -> None:
    p = Plan(Support.grouped(4, 4, 3, 4), Block(4, 4))
    x = torch.zeros(1, 4, 4, 4)
    x[:, 0] = float("nan")
    y = execute_fprop(p, make_geometry(p.support), x, pack_slabs(p, torch.randn(p.support.shape)))
    assert y[:, 1:].isnan().any()
