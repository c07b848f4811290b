# SPDX-License-Identifier: Apache-2.0
"""Layers in 8 bits with their quantisation, as several tests build them."""

from __future__ import annotations

import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.nn import QuantizedConv2d, fuse
from hetconv_kernels.pooling import Pool
from hetconv_kernels.quantization.scheme import Scale

POOL = Pool((2, 2), (2, 2), (0, 0))


X, Y, R = Scale(0.02, 128), Scale(0.03, 10), Scale(0.025, 100)


def conv_layer() -> nn.Module:
    return hk.nn.HetConv2d(8, 12, 3, stride=2, padding=1, p=4).eval()


def quantized(act: str = "relu", pool: Pool | None = None, y=Y, residual=None) -> QuantizedConv2d:
    return QuantizedConv2d.from_float(fuse(conv_layer(), None, act, pool), X, y, residual)


def image(scale: Scale = X, shape=(2, 8, 11, 9)) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)
