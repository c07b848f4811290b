# SPDX-License-Identifier: Apache-2.0
"""Filters in vectors whose lanes read channels of their own: a row of taps shares what it reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F_
from winograd_calls import ACTS, call

import hetconv_kernels as hk

if "cpu" in hk.available_backends():
    from hetconv_kernels import _cpu

    ISAS = _cpu.isas()
else:
    ISAS = []

pytestmark = pytest.mark.skipif(not ISAS, reason="the native engine is not built here")
GENERATOR = np.random.default_rng(5)


def without(support: hk.Support, *taps: tuple[int, int]) -> hk.Support:
    """Takes whole taps away, of the filters with odd numbers."""
    mask = support.mask.copy()
    for ky, kx in taps:
        mask[1::2, :, ky, kx] = False
    return hk.Support(mask)


def shuffled(support: hk.Support) -> hk.Support:
    """Orders filters and channels anew, so that no lane reads what its neighbour reads."""
    f, c = (GENERATOR.permutation(n) for n in support.mask.shape[:2])
    return hk.Support(support.mask[f][:, c])


def grouped(channels: int, groups: int, kernel: tuple[int, int]) -> hk.Support:
    group = np.arange(channels) * groups // channels
    mask = (group[:, None] == group[None, :])[:, :, None, None]
    return hk.Support(np.broadcast_to(mask, (channels, channels, *kernel)).copy())


SUPPORTS = {
    "het 16": hk.Support.het(16, 16, 3, p=4),  # triples, and twins around the middle tap
    "het 32": hk.Support.het(32, 32, 3, p=4),  # two vectors that read different windows
    "het 64, p=16": hk.Support.het(64, 64, 3, p=16),
    "het 40 of 24, shuffled": shuffled(hk.Support.het(24, 40, 3, p=4)),
    "het 16 twice": hk.Support(np.tile(hk.Support.het(16, 16, 3, p=4).mask, (2, 1, 1, 1))),  # alike
    "depthwise": grouped(48, 48, (3, 3)),
    "grouped 5×5": grouped(32, 8, (5, 5)),  # a triple and two that are left
    "grouped 3×4": grouped(16, 4, (3, 4)),
    "grouped 1×6": grouped(16, 4, (1, 6)),
    "without taps": without(grouped(16, 4, (3, 3)), (0, 0), (1, 2), (2, 1)),
}
STEPS = {
    "stride 1": {},
    "stride 2": {"stride": (2, 2)},
    "stride 1×2": {"stride": (1, 2)},
    "dilation 2": {"dilation": (2, 2)},
    "dilation 1×2": {"dilation": (1, 2)},
}


def masks(support: hk.Support) -> torch.Tensor:
    return torch.tensor(support.mask)


def small_integers(*shape: int) -> torch.Tensor:
    return torch.from_numpy(GENERATOR.integers(-4, 5, shape)).double()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", SUPPORTS)
def test_sums_of_small_integers_are_exact(name: str, steps: str, isa: str) -> None:
    support, given = SUPPORTS[name], dict[str, Any](STEPS[steps])
    pads = tuple(k // 2 for k in support.kernel)
    w = small_integers(*support.shape)
    shift = small_integers(support.filters)
    for dtype, layout, size in (
        (torch.float32, torch.channels_last, (7, 33)),
        (torch.float32, torch.channels_last, (5, 18)),
        (torch.float64, torch.contiguous_format, (6, 14)),
        (torch.bfloat16, torch.channels_last, (7, 33)),
        (torch.bfloat16, torch.contiguous_format, (5, 15)),
    ):
        x = small_integers(2, support.channels, *size)
        want = F_.conv2d(x, w * masks(support), shift, padding=pads, **given)
        y = call(
            support, x.to(dtype).contiguous(memory_format=layout), w.to(dtype),
            padding=pads, shift=shift.to(torch.promote_types(dtype, torch.float32)), isa=isa,
            form="filters", **given,
        )  # fmt: skip
        assert y is not None
        assert torch.equal(y, want.to(dtype))


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["het 32", "het 40 of 24, shuffled"])
def test_what_happens_to_a_tile_is_the_same_wherever_it_does(
    name: str, isa: str, added: bool, scaled: bool, act: str
) -> None:
    support = SUPPORTS[name]
    w, x = small_integers(*support.shape), small_integers(1, support.channels, 6, 19)
    shift, scale = small_integers(support.filters), small_integers(support.filters)
    residual = small_integers(1, support.filters, 6, 19) if added else None
    want = F_.conv2d(x, w * masks(support), padding=1)
    if scaled:
        want = want * scale[:, None, None]
    want = want + shift[:, None, None]
    want = ACTS[act](want + residual if added else want)
    last = torch.channels_last
    y = call(
        support, x.float().contiguous(memory_format=last), w.float(), shift=shift.float(),
        scale=scale.float() if scaled else None, act=act, isa=isa, form="filters",
        residual=residual.float().contiguous(memory_format=last) if residual is not None else None,
    )  # fmt: skip
    assert y is not None
    if act == "gelu":
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(y.double(), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ["none", "relu"])
def test_nan_and_infinity_stay_what_they_are(act: str, isa: str) -> None:
    support = grouped(16, 4, (3, 3))
    w = torch.ones(support.shape)
    x = torch.zeros(1, 16, 1, 12).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 1], x[0, 1, 0, 5], x[0, 2, 0, 9] = torch.nan, torch.inf, -torch.inf
    y = call(support, x, w, act=act, isa=isa, form="filters")
    assert y is not None
    own = ACTS[act](F_.conv2d(x[:, :4], w[:4, :4], padding=1))  # of the group that reads them
    torch.testing.assert_close(y[:, :4], own, rtol=0, atol=0, equal_nan=True)
