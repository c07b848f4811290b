# SPDX-License-Identifier: Apache-2.0
"""What the tests of average pooling share: PyTorch's ways to say it, and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F_
from torch import Tensor, nn

from hetconv_kernels.nn import AveragePool
from hetconv_kernels.pooling import Pool

LAST = torch.channels_last

STEPS: dict[str, Any] = {
    "global": lambda x: F_.adaptive_avg_pool2d(x, 1),
    "global module": nn.AdaptiveAvgPool2d((1, 1)),
    "adaptive": lambda x: F_.adaptive_avg_pool2d(x, (3, 2)),
    "one axis": nn.AdaptiveAvgPool2d((None, 1)),
    "mean": lambda x: x.mean((2, 3)),
    "mean of an image": lambda x: torch.mean(x, [-1, -2], keepdim=True),
    "mean by name": lambda x: x.mean(dim=(3, 2)),
    "windows": lambda x: F_.avg_pool2d(x, 2),
    "padded": lambda x: F_.avg_pool2d(x, 3, 2, 1),
    "inside": lambda x: F_.avg_pool2d(x, (3, 2), stride=1, padding=1, count_include_pad=False),
    "module": nn.AvgPool2d(3, 1, 1),
}
POOLINGS: dict[str, Callable[..., AveragePool]] = {
    "global": AveragePool,
    "flat": lambda **more: AveragePool(keepdim=False, **more),
    "adaptive": lambda **more: AveragePool(output_size=(3, None), **more),
    "windows": lambda **more: AveragePool(Pool((3, 2), (2, 1), (1, 0)), **more),
    "inside": lambda **more: AveragePool(Pool((3, 3), (1, 1), (1, 1)), inside=True, **more),
}


class Step(nn.Module):
    def __init__(self, step: Any) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Any:
        return self.step(x)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape or (2, 5, 9, 6)).to(dtype=dtype, memory_format=LAST)
