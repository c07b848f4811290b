# SPDX-License-Identifier: Apache-2.0
"""Memory is bounded: geometries of functional calls go by bytes, and what was made for them too."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from strategies import random_mask

import hetconv_kernels as hk
from hetconv_kernels import functional, geometries
from hetconv_kernels.backends import available_backends
from hetconv_kernels.geometries import GeometryCache, footprint
from hetconv_kernels.problem import make_geometry

MIB = 2**20
needs_engine = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native engine is not built here"
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[GeometryCache]:
    cache = GeometryCache(max_bytes=MIB // 2)
    monkeypatch.setattr(functional, "_geometries", cache)
    yield cache
    cache.clear()


def call(support: hk.Support, padding: int = 1, dilation: int = 1, engine: str = "auto") -> None:
    x = torch.randn(1, support.channels, 9, 9, requires_grad=True)
    w = torch.randn(support.shape, requires_grad=True)
    y = hk.functional.support_conv2d(
        x, w, support, padding=padding, dilation=dilation, backend=engine
    )
    torch.autograd.grad(y.sum(), (x, w))


def test_supports_that_are_used_once_are_let_go(small: GeometryCache) -> None:
    seen = []
    for seed in range(60):
        support = hk.Support(random_mask(seed, (32, 32, 3, 3)))
        call(support)
        seen.append(weakref.ref(support))
        del support
    alive = sum(reference() is not None for reference in seen)
    assert 0 < alive < 30
    assert alive == len(small)
    assert seen[-1]() is not None, "the last one is of use still"


@needs_engine
def test_plans_of_geometries_that_are_used_once_are_let_go(small: GeometryCache) -> None:
    support = hk.Support(random_mask(1, (32, 32, 3, 3)))
    plans: list[weakref.ref[Any]] = []
    for padding in range(1, 61):
        call(support, padding, engine="cpu")
        (geometry,) = small.geometries()[-1:]
        plans += [weakref.ref(v) for v in geometry.derived.values() if "Dgrad" in repr(type(v))]
        del geometry
    assert len(plans) == 60
    alive = sum(reference() is not None for reference in plans)
    assert 0 < alive < 30
    assert alive == len(small)
    assert len(support.derived) < 12, "nothing of a geometry stays with the Support"


@needs_engine
def test_equal_geometries_share_what_engines_made_for_them() -> None:
    support = hk.Support(random_mask(2, (32, 32, 3, 3)))
    one, two = (make_geometry(support, 1, 1) for _ in range(2))
    frozen, other = make_geometry(support, 1, 1, frozen=True), make_geometry(support, 1, 2)
    assert one.derived is two.derived is frozen.derived
    assert other.derived is not one.derived
    store = weakref.ref(one.derived)
    del one, two, frozen
    assert store() is None


def test_the_cache_measures_what_it_holds(small: GeometryCache) -> None:
    assert small.bytes() == 0
    support = hk.Support(random_mask(3, (32, 32, 3, 3)))
    call(support)
    first = small.bytes()
    assert first >= footprint(support) > support.bits.nbytes
    call(support)
    assert len(small) == 1
    call(support, dilation=2, padding=2)
    assert len(small) == 2
    assert first < small.bytes() < 2 * first, "what is shared counts once"
    small.clear()
    assert small.bytes() == len(small) == 0


def test_what_is_used_again_stays() -> None:
    support = hk.Support(random_mask(4, (4, 4, 3, 3)))
    often = make_geometry(support, 1, 1)
    cache = GeometryCache(max_bytes=MIB // 16)
    cache.add("often", often)
    for number in range(200):
        assert cache.get("often") is often
        cache.add(number, make_geometry(hk.Support(random_mask(number, (4, 4, 3, 3))), 1, 1))
    assert cache.get(0) is None
    assert len(cache) < 100


def test_one_that_is_too_large_is_kept_alone() -> None:
    cache = GeometryCache(max_bytes=1)
    for number in range(5):
        cache.add(number, make_geometry(hk.Support(random_mask(number, (8, 8, 3, 3))), 1, 1))
        assert len(cache) == 1
        assert cache.get(number) is not None


def test_geometries_of_operators_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = GeometryCache(max_bytes=MIB // 4)
    monkeypatch.setattr(geometries, "_of_operators", cache)
    seen = []
    for seed in range(40):
        support = hk.Support(random_mask(seed, (32, 32, 3, 3)))
        ints = make_geometry(support, 1, 1).ints(9, 9)
        bits = torch.from_numpy(support.bits.copy())
        w = torch.randn(support.shape)
        x = torch.randn(1, 32, 9, 9)
        torch.ops.hetconv.fprop(x, w, bits, None, None, None, "none", ints, 0)
        seen.append(weakref.ref(support))
        del support
    assert 0 < sum(reference() is not None for reference in seen) < 30
    cache.clear()


def test_a_dropped_geometry_is_made_again() -> None:
    x, support = torch.randn(1, 8, 9, 9), hk.Support(random_mask(5, (8, 8, 3, 3)))
    w = torch.randn(support.shape)
    before = hk.functional.support_conv2d(x, w, support, padding=1)
    functional._geometries.clear()
    assert torch.equal(hk.functional.support_conv2d(x, w, support, padding=1), before)
