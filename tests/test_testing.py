# SPDX-License-Identifier: Apache-2.0
"""What the tests of engines stand on: the oracle, the bounds, and executors that can fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import plans, random_mask
from torch import Tensor

from hetconv_kernels import Support
from hetconv_kernels.backends.triton.plan import Block, Plan
from hetconv_kernels.problem import Geometry, make_geometry
from hetconv_kernels.testing import (
    error_bound,
    execute_dgrad,
    execute_fprop,
    execute_wgrad,
    oracle,
    pack_slabs,
)

SUPPORT = Support.from_mask(random_mask(11, (3, 4, 3, 2)))
GEOMETRY = make_geometry(SUPPORT, (2, 1), (1, 2, 0, 1), (1, 2))


def by_definition(x: Tensor, w: Tensor, geometry: Geometry, bias: Tensor) -> Tensor:
    """The convolution as a sum over live weights, pixel by pixel."""
    top, _, left, _ = geometry.pads
    n, _, height, width = x.shape
    y = np.zeros((n, geometry.support.filters, *geometry.output_size(height, width)))
    for f, c, dy, dx in zip(*np.nonzero(geometry.support.mask), strict=True):
        for i, j in np.ndindex(y.shape[2:]):
            row = i * geometry.stride[0] + dy * geometry.dilation[0] - top
            col = j * geometry.stride[1] + dx * geometry.dilation[1] - left
            if 0 <= row < height and 0 <= col < width:
                y[:, f, i, j] += w[f, c, dy, dx].item() * x[:, c, row, col].numpy()
    return torch.tensor(y) + bias[:, None, None]


def test_the_oracle_is_the_definition() -> None:
    x = torch.randn(2, 4, 5, 6).double()
    w = torch.where(torch.tensor(SUPPORT.mask), torch.randn(SUPPORT.shape), float("nan")).double()
    bias = torch.randn(3).double()
    torch.testing.assert_close(oracle(x, w, GEOMETRY, bias), by_definition(x, w, GEOMETRY, bias))


def test_the_oracles_gradient_ignores_dead_entries() -> None:
    w = torch.randn(SUPPORT.shape).double().requires_grad_()
    (dw,) = torch.autograd.grad(oracle(torch.randn(2, 4, 5, 6).double(), w, GEOMETRY).sum(), w)
    mask = torch.tensor(SUPPORT.mask)
    assert (dw[~mask] == 0).all()
    assert (dw[mask] != 0).any()


# Bounds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 64, 4096])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_the_bound_holds_for_pytorchs_own_sums(dtype: torch.dtype, depth: int) -> None:
    a, b = torch.randn(64, depth).to(dtype), torch.randn(depth, 64).to(dtype)
    magnitude = a.double().abs() @ b.double().abs()
    error = (a @ b).double() - a.double() @ b.double()
    assert (error.abs() <= error_bound(magnitude, depth, dtype)).all()


@pytest.mark.parametrize("depth", [16, 576, 4608])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_bound_notices_one_product_too_few(dtype: torch.dtype, depth: int) -> None:
    magnitude = torch.tensor(float(depth), dtype=torch.float64)  # products of magnitude one
    assert error_bound(magnitude, depth, dtype) < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bound_of_16_bits_is_a_few_roundings(dtype: torch.dtype) -> None:
    bound = error_bound(torch.tensor(1.0), 576, dtype)
    eps = torch.finfo(dtype).eps
    assert eps < bound < 3 * eps


def test_the_bound_grows_with_depth_and_scales_with_the_operands() -> None:
    magnitude = torch.tensor([1.0, 1000.0])
    shallow, deep = (error_bound(magnitude, depth, torch.float32) for depth in (10, 10_000))
    assert (deep > shallow).all()
    torch.testing.assert_close(deep[1] / deep[0], torch.tensor(1000.0))


# Executors --------------------------------------------------------------------------------------


@given(plans(), st.booleans())
def test_slabs_hold_every_live_weight_and_zeros(plan: Plan, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    w = torch.randn(plan.support.shape)
    w[~torch.tensor(plan.support.mask)] = float("nan")
    w = w.to(memory_format=layout)
    slabs = pack_slabs(plan, w)
    assert slabs.shape == (plan.slab_size,)
    assert slabs.isfinite().all()
    expected = [0.0 if at < 0 else w.flatten()[at].item() for at in plan.slab_source]
    assert slabs.tolist() == expected


@pytest.fixture
def plan() -> Plan:
    return Plan(SUPPORT, Block(filters=1, channels=2))


def test_what_no_segment_writes_reads_nan(plan: Plan) -> None:
    x, slabs = torch.randn(1, 4, 5, 6), pack_slabs(plan, torch.randn(SUPPORT.shape))
    assert execute_fprop(plan, GEOMETRY, x, slabs).isfinite().all()
    plan.segments, plan.starts = plan.segments[:-1], plan.starts[:-1]
    y = execute_fprop(plan, GEOMETRY, x, slabs)
    assert y[:, plan.rows[-1]].isnan().all()
    assert y[:, plan.rows[:-1]].isfinite().all()


@pytest.mark.parametrize("field", ["dy", "channel", "count", "slab"])
def test_a_wrong_step_shows(plan: Plan, field: str) -> None:
    x, w = torch.randn(1, 4, 5, 6), torch.randn(SUPPORT.shape)
    slabs = pack_slabs(plan, w)
    step = plan.steps[np.argmax(plan.steps["count"] == 2)]
    step[field] += {"dy": 1 if step["dy"] < 2 else -1, "channel": 1, "count": -1, "slab": 1}[field]
    assert not torch.allclose(execute_fprop(plan, GEOMETRY, x, slabs), oracle(x, w, GEOMETRY))


def test_gradients_of_an_unread_channel_are_zero() -> None:
    mask = SUPPORT.mask.copy()
    mask[:, 2] = False
    support = Support.from_mask(mask)
    geometry, plan = make_geometry(support, 1, 1), Plan(support, Block(2, 2))
    dy = torch.randn(1, 3, *geometry.output_size(4, 4))
    slabs = pack_slabs(plan, torch.randn(support.shape))
    dx = execute_dgrad(plan, geometry, (4, 4), dy, slabs)
    assert (dx[:, 2] == 0).all()
    assert dx.shape == (1, 4, 4, 4)
    x = torch.randn(1, 4, 4, 4)
    x[:, 2] = float("nan")
    assert execute_wgrad(plan, geometry, dy, x).isfinite().all()
