# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights no engine takes as they are, and what the weights of the moment give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hetconv_kernels as hk
from hetconv_kernels.backends import available_backends
from hetconv_kernels.nn.fused import FusedConv2d

ENGINES = [name for name in available_backends("cpu") if name != "reference"]
CHANNELS, SIZE = 32, 40  # enough work for oneDNN's own layout, see `prepacked`


def image(batch: int = 2) -> Tensor:
    x = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last)


def support(kernel: int = 3) -> hk.Support:
    """Irregular: no engine can take its weights as they are."""
    generator = torch.Generator().manual_seed(2)
    return hk.Support((torch.rand(32, CHANNELS, kernel, kernel, generator=generator) < 0.4).numpy())


def conv(engine: str | None = None) -> hk.nn.SupportConv2d:
    layer = hk.nn.SupportConv2d(CHANNELS, 32, 3, padding=1, support=support(), backend=engine)
    return layer.eval()


def truth(layer: Any, x: Tensor) -> Tensor:
    """What the weights that the layer has now give, with nothing kept."""
    weight = hk.packing.dense_weight(layer.support, layer.weight.detach().clone(), x.dtype)
    bias = layer.shift if isinstance(layer, FusedConv2d) else layer.bias
    return torch.conv2d(x, weight, None if bias is None else bias.detach().to(x.dtype), padding=1)
