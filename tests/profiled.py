# SPDX-License-Identifier: Apache-2.0
"""A small network of every kind of layer, and its profile against ceilings that are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.measure import profiling
from hetconv_kernels.measure.roofline import Roofs

ROOFS = {"float32": Roofs(1e9, 1e9, "cpu", "float32")}


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        hk.nn.HetConv2d(8, 8, 3, padding=1, p=4, backend="reference"),
        nn.ReLU(inplace=True),
        hk.nn.GroupedConv2d(8, 16, 3, 2, 1, groups=4),
        nn.Flatten(),
        nn.Linear(16 * 9, 5),
    ).eval()


def measured(model: nn.Module, x: torch.Tensor, **more: Any) -> profiling.Profile:
    more = {"rounds": 5, "max_seconds": 0.2, "roofs": ROOFS, **more}
    return hk.profile(model, x, **more)
