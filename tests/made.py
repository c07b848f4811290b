# SPDX-License-Identifier: Apache-2.0
"""What the tests of networks that the package makes share: a small one, and the ways to make it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import hetconv_kernels as hk


def plain_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        hk.nn.HetConv2d(32, 32, 3, padding=1, p=4),
        nn.ReLU(),
        nn.Conv2d(32, 8, 1),
        nn.AdaptiveMaxPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).eval()


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


MAKERS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "optimised": lambda model, x: hk.optimize(model, x, leave_plain=False).model,
    "left plain": lambda model, x: hk.optimize(model, x).model,
    "bfloat16": lambda model, x: hk.optimize(model, x, dtype=torch.bfloat16).model,
    "int8": lambda model, x: hk.quantize(model, [x]).model,
}
