# SPDX-License-Identifier: Apache-2.0
"""Arguments that are numbers: Python's and numpy's integers work alike, all else is a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, HetconvError
from hetconv_kernels.nn.fused import fuse
from hetconv_kernels.pooling import Pool, max_pooled

SUPPORT = hk.Support.het(8, 8, 3, p=2)
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "het": (hk.nn.HetConv2d, {"p": 2}),
    "grouped": (hk.nn.GroupedConv2d, {"groups": 2}),
    "support": (hk.nn.SupportConv2d, {"support": SUPPORT}),
    "selfgroup": (hk.nn.SelfGroupConv2d, {"support": SUPPORT}),
    "frequency": (hk.nn.FrequencyConv2d, {}),
}
GEOMETRY = ("stride", "padding", "dilation")
INTEGERS = (np.int64(2), np.int32(2), np.uint8(2), (np.int64(2), 2), [2, np.int16(2)])
WRONG: tuple[Any, ...] = (
    None, float("nan"), 2.0, np.float64(2), True, -1, 2**40, "x", "2", b"2", [], {}, set(), object,
    (1, 2, 3), (1, 2, 3, 4, 5), (None, 1), (1.0, 2), np.array([1, 2]), np.array(2),
    torch.tensor(2), range(2), [[1, 2]],
)  # fmt: skip


def build(kind: str, **changed: Any) -> nn.Module:
    make, more = LAYERS[kind]
    shape = {"in_channels": 8, "out_channels": 8, "kernel_size": 3}
    layer: nn.Module = make(**(shape | more | changed))
    return layer


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_numpy_s_integers_are_integers(kind: str, name: str, value: Any) -> None:
    x = torch.randn(1, 8, 9, 9)
    found, wanted = build(kind, **{name: value}), build(kind, **{name: 2})
    wanted.load_state_dict(found.state_dict())
    assert torch.equal(found(x), wanted(x))
    assert getattr(found, name) in ((2, 2), getattr(wanted, name))


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_numpy_s_integers_work_in_the_functional_form(value: Any) -> None:
    x, w = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3)
    for name in GEOMETRY:
        found = hk.functional.support_conv2d(x, w, SUPPORT, **{name: value})
        assert torch.equal(found, hk.functional.support_conv2d(x, w, SUPPORT, **{name: 2}))


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_what_is_no_size_is_one_sentence(value: Any) -> None:
    x, w = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3)
    for name in GEOMETRY:
        for kind in LAYERS:
            with pytest.raises(HetconvError, match="expected"):
                build(kind, **{name: value})
        with pytest.raises(HetconvError, match="expected"):
            hk.functional.support_conv2d(x, w, SUPPORT, **{name: value})
    for name in ("in_channels", "out_channels"):
        for kind in LAYERS:
            with pytest.raises(HetconvError, match="expected"):
                build(kind, **{name: value})


@pytest.mark.parametrize("name", ["stride", "dilation"])
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_has_a_stride_or_dilation_of_zero(name: str, kind: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name}: received 0"):
        build(kind, **{name: 0})


POOLS = {
    "stride 0": Pool((2, 2), (0, 2), (0, 0)),
    "kernel 0": Pool((0, 2), (1, 1), (0, 0)),
    "no padding": Pool((2, 2), (2, 2), None),  # type: ignore[arg-type]
    "NaN": Pool((2, 2), (2, 2), (0, float("nan"))),  # type: ignore[arg-type]
    "negative": Pool((2, 2), (2, 2), (-1, 0)),
    "more than half": Pool((2, 2), (2, 2), (2, 0)),
    "one number": Pool(2, 2, 0),  # type: ignore[arg-type]
    "three": Pool((2, 2, 2), (2, 2), (0, 0)),  # type: ignore[arg-type]
    "huge": Pool((2, 2), (2**40, 1), (0, 0)),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_that_is_none_is_refused_wherever_it_is_given(name: str) -> None:
    pool = POOLS[name]
    layer = hk.nn.SupportConv2d(8, 8, 3, support=SUPPORT).eval()
    with pytest.raises(ArgumentError, match="of a pool: received"):
        fuse(layer, pool=pool)
    with pytest.raises(ArgumentError, match="of a pool: received"):
        max_pooled(torch.randn(1, 8, 4, 4), pool)
    with pytest.raises(ArgumentError, match="of a pool: received"):
        pool.check(4, 4)


@pytest.mark.parametrize(
    "size",
    [(), (0, 8, 8), (3, -8, 8), (3, 8.0, 8), (3, None), (True, 8, 8), 224, None, "3x8x8", (3, 8),
     (1, 8, 8), (3, 8, 8, 8, 8)],
    ids=repr,
)  # fmt: skip
def test_sizes_that_a_network_cannot_take_are_refused_by_macs(size: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    with pytest.raises(ArgumentError, match=r"input.*received .*expected"):
        hk.stats.macs(model, size)


def test_sizes_of_numpy_s_integers_are_counted() -> None:
    model = nn.Conv2d(3, 4, 3)
    assert hk.stats.macs(model, np.array([3, 8, 8])) == hk.stats.macs(model, (3, 8, 8))  # type: ignore[arg-type]
    assert hk.stats.macs(model, [np.int64(3), 8, 8]) == 108 * 36
    assert SUPPORT.macs(np.int64(2), 3) == SUPPORT.live * 6


@pytest.mark.parametrize("size", [(-1, 2), (2, -1), (1.5, 2), (None, 2), (True, 2)], ids=repr)
def test_a_support_has_no_negative_work(size: Any) -> None:
    with pytest.raises(ArgumentError, match="size of the output"):
        SUPPORT.macs(*size)
