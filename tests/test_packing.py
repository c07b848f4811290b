# SPDX-License-Identifier: Apache-2.0
"""Masks on devices, dense and live forms of a weight, slabs, and what is remembered of a weight."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks, random_mask
from torch import Tensor

from hetconv_kernels import Support
from hetconv_kernels.packing import (
    FrozenCache,
    bits_on,
    dense_weight,
    live_weight,
    mask_on,
)

CPU = torch.device("cpu")
NAN = float("nan")
SUPPORT = Support.from_mask(random_mask(4, (6, 4, 3, 3)))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def poisoned(support: Support, dtype: torch.dtype = torch.float32) -> Tensor:
    """A dense weight with NaN and Inf at its dead entries."""
    w = torch.randn(support.shape).to(dtype)
    dead = ~torch.tensor(support.mask)
    w[dead] = torch.tensor([NAN, float("inf")], dtype=dtype).repeat(len(w[dead]))[: len(w[dead])]
    return w


# On devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [bits_on, mask_on])
def test_a_mask_is_brought_to_a_device_once(on: Any) -> None:
    support = Support.from_mask(random_mask(5))
    first = on(support, CPU)
    assert on(support, CPU) is first
    assert on(Support.from_mask(support.mask), CPU) is first  # equal Supports share it
    assert on(support, torch.device("meta")) is not first
    assert on(support, torch.device("meta")).device.type == "meta"
    assert on(support, CPU) is first


def test_what_is_brought_is_the_mask_and_its_bits() -> None:
    assert mask_on(SUPPORT, CPU).dtype == torch.bool
    np.testing.assert_array_equal(mask_on(SUPPORT, CPU).numpy(), SUPPORT.mask)
    assert bits_on(SUPPORT, CPU).dtype == torch.uint8
    np.testing.assert_array_equal(bits_on(SUPPORT, CPU).numpy(), SUPPORT.bits)


@pytest.mark.parametrize("on", [bits_on, mask_on])
def test_a_tensor_written_to_does_not_change_the_support(on: Any) -> None:
    support = Support.from_mask(random_mask(6))
    before = support.mask.copy()
    on(support, CPU).zero_()
    np.testing.assert_array_equal(support.mask, before)


@pytest.mark.parametrize("on", [bits_on, mask_on])
def test_what_is_first_met_in_inference_mode_can_be_used_anywhere(on: Any) -> None:
    support = Support.from_mask(random_mask(7))
    with torch.inference_mode():
        assert not on(support, CPU).is_inference()


@pytest.mark.parametrize("on", [bits_on, mask_on])
def test_what_is_first_met_by_a_tracer_is_not_kept(on: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    support = Support.from_mask(random_mask(8))
    with FakeTensorMode():
        on(support, CPU)
    assert not isinstance(on(support, CPU), FakeTensor)


def test_a_mask_dies_with_its_support() -> None:
    support = Support.from_mask(random_mask(9))
    alive = weakref.ref(mask_on(support, CPU))
    del support
    gc.collect()
    assert alive() is None


# Dense and live ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_weight_zeroes_dead_entries_whatever_they_hold(dtype: torch.dtype) -> None:
    w = poisoned(SUPPORT)
    before = w.clone()
    dense = dense_weight(SUPPORT, w, dtype)
    expected = torch.where(torch.tensor(SUPPORT.mask), w, 0.0).to(dtype)
    assert dense.dtype == dtype
    assert torch.equal(dense, expected)
    assert torch.equal(w.nan_to_num(7), before.nan_to_num(7)), "the weight itself was changed"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dense_weight_keeps_the_layout(layout: torch.memory_format) -> None:
    w = poisoned(SUPPORT).to(memory_format=layout)
    dense = dense_weight(SUPPORT, w, torch.bfloat16)
    assert dense.is_contiguous(memory_format=layout)
    assert torch.equal(dense, dense_weight(SUPPORT, w.contiguous(), torch.bfloat16))


@given(masks(), st.booleans())
def test_live_and_dense_give_each_other_back(mask: Any, channels_last: bool) -> None:
    support = Support.from_mask(mask)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    w = torch.randn(support.shape).to(memory_format=layout)
    live = live_weight(support, w)
    assert live.shape == (support.live,)
    np.testing.assert_array_equal(live.numpy(), w.numpy()[mask])
    dense = dense_weight(support, live, torch.float32)
    assert torch.equal(dense, torch.where(torch.tensor(mask), w, 0.0))
    assert torch.equal(dense_weight(support, w, torch.float32), dense)
    assert torch.equal(live_weight(support, dense), live)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_equal_groupings_live_weight_is_pytorchs_grouped_weight(
    layout: torch.memory_format,
) -> None:
    support = Support.grouped(6, 4, 3, 2)
    grouped = torch.randn(4, 3, 3, 3).to(memory_format=layout)
    dense = dense_weight(support, grouped, torch.float64)
    assert torch.equal(dense[:2, :3], grouped[:2].double())
    assert torch.equal(dense[2:, 3:], grouped[2:].double())
    assert torch.equal(live_weight(support, dense).float(), grouped.flatten())


def test_a_one_tap_weight_may_be_a_matrix() -> None:
    support = Support.from_mask(random_mask(1, (5, 7, 1, 1)))
    matrix = torch.randn(7, 5).T  # not contiguous
    assert dense_weight(support, matrix, torch.float32).shape == (5, 7, 1, 1)
    live = live_weight(support, matrix)
    assert torch.equal(live, matrix[torch.tensor(support.mask[:, :, 0, 0])])


def test_dense_weight_is_new_even_where_nothing_is_dead() -> None:
    w = torch.randn(2, 3, 1, 1)
    dense_weight(Support.dense(3, 2, 1), w, torch.float32).zero_()
    assert w.all()


# What is remembered -----------------------------------------------------------------------------


class Counted:
    """Makes a derived value and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, w: Tensor) -> Tensor:
        self.calls += 1
        return w * 2


@pytest.fixture
def built() -> Counted:
    return Counted()


def test_frozen_cache_builds_once(built: Counted) -> None:
    cache, w = FrozenCache(built, "test"), torch.randn(5)
    first = cache(w)
    assert torch.equal(first, w * 2)
    assert cache(w) is first
    assert built.calls == 1


def test_frozen_cache_tells_weights_apart(built: Counted) -> None:
    cache, v, w = FrozenCache(built, "test"), torch.randn(5), torch.randn(5)
    assert torch.equal(cache(v), v * 2)
    assert torch.equal(cache(w), w * 2)
    assert torch.equal(cache(v), v * 2)
    assert built.calls == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.add_(1),
        lambda w: w.copy_(torch.ones(5)),
        lambda w: w.__setitem__(0, 9.0),
        lambda w: w.view(5, 1).mul_(3),
        lambda w: w.set_(torch.ones(5).untyped_storage()),
        lambda w: setattr(w, "data", torch.ones(5)),
    ],
    ids=["add_", "copy_", "setitem", "through-a-view", "set_", "data"],
)
def test_frozen_cache_notices_a_change(built: Counted, change: Any) -> None:
    cache, w = FrozenCache(built, "test"), torch.randn(5)
    cache(w)
    change(w)
    assert torch.equal(cache(w), w * 2)
    assert built.calls == 2
    cache(w)
    assert built.calls == 2


def test_frozen_cache_dies_with_the_weight(built: Counted) -> None:
    cache, w = FrozenCache(built, "test"), torch.randn(5)
    value = weakref.ref(cache(w))
    gc.disable()  # not even a collection is needed
    try:
        del w
        assert value() is None
    finally:
        gc.enable()
    assert not cache._entries


def test_frozen_cache_does_not_mistake_a_new_weight_at_an_old_place(built: Counted) -> None:
    cache = FrozenCache(built, "test")
    for _ in range(50):  # most of them get the memory, and the id, of the one before
        w = torch.randn(5)
        assert torch.equal(cache(w), w * 2)
    del w
    assert built.calls == 50
    assert not cache._entries


def test_frozen_cache_derives_a_trainable_weight_anew(built: Counted) -> None:
    w = torch.randn(5).requires_grad_()
    cache = FrozenCache(built, "test")
    cache(w)
    cache(w)
    assert built.calls == 2
    assert not cache._entries


def test_frozen_cache_does_not_keep_an_inference_tensor(built: Counted) -> None:
    cache = FrozenCache(built, "test")
    with torch.inference_mode():
        w = torch.randn(5)
        cache(w)
        w.add_(1)
        assert torch.equal(cache(w), w * 2)
    assert built.calls == 2


def test_frozen_cache_serves_a_weight_inside_inference_mode_too(built: Counted) -> None:
    cache, w = FrozenCache(built, "test"), torch.randn(5)
    with torch.inference_mode():
        first = cache(w)
        assert cache(w) is first
    assert cache(w) is first
