# SPDX-License-Identifier: Apache-2.0
"""Layers with pixels in vectors: each operand in planes or in channels_last, and nothing beside."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F_
from torch import Tensor
from winograd_calls import ACTS, LAYOUTS, call

import hetconv_kernels as hk

if "cpu" in hk.available_backends():
    from hetconv_kernels import _cpu

    ISAS = _cpu.isas()
else:
    ISAS = []

pytestmark = pytest.mark.skipif(not ISAS, reason="the native engine is not built here")
GENERATOR = np.random.default_rng(7)
SUPPORTS = {
    "1×1": hk.Support.self_grouped(np.arange(37) % 5, GENERATOR.random((5, 40)) < 0.4, 1),
    "3×3": hk.Support.self_grouped(np.arange(21) % 6, GENERATOR.random((6, 18)) < 0.4, 3),
}
STRIDES = ((1, 1), (2, 2), (1, 2), (3, 3))
# Less than a vector of pixels; not a multiple of one; several strips; more than one image; one
# pixel and two beyond whole vectors, of an image and of each half of one; rows of many vectors.
SIZES = ((1, 3, 2), (1, 7, 9), (1, 40, 33), (2, 12, 11), (3, 16, 16), (1, 7, 7), (1, 7, 14),
         (1, 14, 14), (2, 7, 7), (1, 4, 90))  # fmt: skip


def small_integers(*shape: int) -> Tensor:
    return torch.from_numpy(GENERATOR.integers(-4, 5, shape)).float()


def surrounded(shape: tuple[int, ...], layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Returns memory full of NaN, and an output in the middle of it."""
    like = torch.empty(shape, device="meta").contiguous(memory_format=layout)
    memory = torch.full((64 + like.numel() + 64,), float("nan"))
    return memory, memory[64:].as_strided(shape, like.stride())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("name", SUPPORTS)
def test_operands_may_lie_in_planes_or_not(name: str, stride: tuple[int, int], isa: str) -> None:
    support = SUPPORTS[name]
    pad = support.kernel[0] // 2
    w, shift = small_integers(*support.shape), small_integers(support.filters)
    live = torch.where(torch.tensor(support.mask), w, 0.0)
    for size, act, added in product(SIZES, ("none", "relu", "relu6"), (False, True)):
        x = small_integers(size[0], support.channels, *size[1:])
        bare = F_.conv2d(x, live, shift, stride=stride, padding=pad)
        residual = small_integers(*bare.shape) if added else None
        want = ACTS[act](bare if residual is None else bare + residual)
        for of_x, of_y, threads in product(LAYOUTS.values(), LAYOUTS.values(), (1, 2)):
            memory, out = surrounded(tuple(want.shape), of_y)
            given: dict[str, Any] = {} if residual is None else {
                "residual": residual.contiguous(memory_format=of_y)
            }  # fmt: skip
            call(
                support, x.contiguous(memory_format=of_x), w, padding=(pad, pad), stride=stride,
                shift=shift, act=act, threads=threads, isa=isa, form="pixels", out=out, **given,
            )  # fmt: skip
            assert torch.equal(out, want)
            out.fill_(float("nan"))
            assert memory.isnan().all()  # nothing was written beside it


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ["none", "relu"])
def test_nan_and_infinity_stay_what_they_are(act: str, isa: str) -> None:
    support = SUPPORTS["1×1"]
    x = torch.zeros(1, support.channels, 5, 8)
    x[0, :, 1, 1], x[0, :, 2, 5], x[0, :, 4, 7] = torch.nan, torch.inf, -torch.inf
    w = torch.ones(support.shape)
    y = call(support, x, w, padding=(0, 0), act=act, isa=isa, form="pixels")
    assert y is not None
    want = ACTS[act](F_.conv2d(x[:, :1], torch.ones(support.filters, 1, 1, 1)))
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2])
def test_filters_in_vectors_read_every_second_pixel_of_planes(stride: int, isa: str) -> None:
    support = hk.Support.dense(19, 33, 1)
    w, x = small_integers(*support.shape), small_integers(2, 19, 9, 35)
    want = F_.conv2d(x, w, stride=stride)
    y = call(support, x, w, padding=(0, 0), stride=(stride, stride), isa=isa, form="filters")
    assert y is not None
    assert torch.equal(y, want)
