# SPDX-License-Identifier: Apache-2.0
"""AveragePool: the mean of each window, beside PyTorch's in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F_
from planning import needs_engine
from torch import Tensor, fx, nn

from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.graph.average import AveragePool, average_of
from hetconv_kernels.pooling import Pool

pytestmark = needs_engine
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
OTHERS: dict[str, Any] = {
    "uneven windows": lambda x: F_.adaptive_avg_pool2d(x, 4),
    "ceil mode": nn.AvgPool2d(4, ceil_mode=True),
    "divisor": lambda x: F_.avg_pool2d(x, 2, divisor_override=3),
    "rows": lambda x: x.mean(2),
    "all": lambda x: x.mean(),
    "in float64": lambda x: x.mean((2, 3), dtype=torch.float64),
    "max": lambda x: F_.max_pool2d(x, 2),
}


class Step(nn.Module):
    def __init__(self, step: Any) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Any:
        return self.step(x)


def found(step: Callable[..., Any], x: Tensor) -> AveragePool | None:
    traced = fx.symbolic_trace(Step(step))
    node = next(n for n in traced.graph.nodes if n.op.startswith("call"))
    return average_of(node, tuple(x.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 5, 64, 130])
@pytest.mark.parametrize("name", STEPS)
def test_it_is_the_mean_that_pytorch_computes(name: str, channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, channels, 9, 6).to(dtype=dtype, memory_format=LAST)
    pooling = found(STEPS[name], x)
    assert pooling is not None
    truth = STEPS[name](x.double())
    result = pooling(x)
    assert result.shape == truth.shape
    assert result.dtype == dtype
    # One rounding an addition, of sums below 54 times the largest number, and that of the result.
    eps = torch.finfo(torch.float32).eps
    bound = 54 * eps * x.double().abs().amax() + torch.finfo(dtype).eps * truth.abs()
    assert ((result.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("name", OTHERS)
def test_other_steps_are_left_alone(name: str) -> None:
    assert found(OTHERS[name], torch.randn(2, 4, 9, 6)) is None


def test_an_image_in_another_format_is_refused() -> None:
    with pytest.raises(ArgumentError, match="channels_last"):
        AveragePool(Pool((2, 2), (2, 2), (0, 0)))(torch.randn(2, 4, 6, 6))
    with pytest.raises(ArgumentError, match="float64"):
        AveragePool(Pool((2, 2), (2, 2), (0, 0)))(torch.randn(2, 1, 6, 6).double())
