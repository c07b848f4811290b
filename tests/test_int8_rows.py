# SPDX-License-Identifier: Apache-2.0
"""8 bits, filters that pick channels of their own: a row of taps shares what it picks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.quantization import Scale

_cpu = pytest.importorskip("hetconv_kernels._cpu", reason="the native engine is not built here")

WIDE = pytest.mark.skipif("avx512vnni" not in _cpu.int8_isas(), reason="needs AVX-512 VNNI")
READ = np.random.default_rng(3).random((9, 24)) < 0.5
SUPPORTS = {
    "het 64, p=8": hk.Support.het(64, 64, 3, p=8),  # groups of one unit, two in a block
    "het 64, p=16": hk.Support.het(64, 64, 3, p=16),
    "het 32, p=4": hk.Support.het(32, 32, 3, p=4),
    "depthwise": hk.Support.grouped(48, 48, 3, 48),
    "5×5": hk.Support.grouped(32, 32, 5, 8),  # a triple and two that are left
    "3×4": hk.Support.grouped(32, 32, (3, 4), 8),
    "1×6": hk.Support.grouped(16, 16, (1, 6), 4),
    "ragged": hk.Support.self_grouped(np.arange(40) % 9, READ, 3),
}
STEPS: dict[str, dict[str, Any]] = {
    "stride 1": {},
    "stride 2": {"stride": 2},
    "stride 1×2": {"stride": (1, 2)},
    "dilation 2": {"dilation": 2},
    "dilation 1×2": {"dilation": (1, 2)},
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", SUPPORTS)
def test_bits_are_those_of_the_reference(name: str, steps: str, signed: bool) -> None:
    support = SUPPORTS[name]
    f, c, *kernel = support.shape
    pads = tuple(kernel)  # so that dilated taps meet small images
    conv = nn.Conv2d(c, f, tuple(kernel), padding=pads, **STEPS[steps])
    layer = hk.nn.SupportConv2d.from_conv2d(conv, support)
    dtype = torch.int8 if signed else torch.uint8
    scales = (Scale.of_range(-2.0, 3.0, dtype), Scale.of_range(-1.0, 1.5, dtype))
    quantized = hk.nn.QuantizedConv2d.from_float(layer, *scales)
    for size in ((1, 3, 2), (2, 7, 33), (1, 9, 18)):
        x = hk.nn.Quantize(scales[0])(torch.randn(size[0], c, *size[1:]))
        x = x.contiguous(memory_format=torch.channels_last)
        y = quantized(x)
        with hk.use_backend("reference"):
            assert torch.equal(y, quantized(x))
        assert len(y.unique()) > 20


@WIDE
@pytest.mark.parametrize("name", list(SUPPORTS)[:3])
def test_taps_of_a_row_are_side_by_side(name: str) -> None:
    mask = SUPPORTS[name].mask.astype(np.uint8)
    blocks = _cpu.Int8Plan(mask, "avx512vnni", "filters").blocks
    assert all(b.shuffles == 3 * b.triples + 2 * b.twins > 0 for b in blocks)
    assert all(b.lanes >= 16 for b in blocks)  # no half of a vector
