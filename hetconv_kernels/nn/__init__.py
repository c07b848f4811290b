# SPDX-License-Identifier: Apache-2.0
"""Layers: drop-in modules for ``nn.Conv2d`` and ``nn.Linear``."""

from .average import AveragePool
from .conv import SupportConv2d
from .frequency import FrequencyConv2d
from .fused import FusedConv2d, fuse
from .grouped import GroupedConv2d
from .het import HetConv2d, fold_het
from .linear import SupportLinear
from .quantized import QuantizedConv2d, QuantizedLinear
from .quantized_steps import (
    Dequantize,
    Quantize,
    QuantizedAdd,
    QuantizedAvgPool2d,
    QuantizedMaxPool2d,
    QuantizedPad,
    Requantize,
)
from .self_grouping import SelfGroupConv2d

__all__ = [
    "AveragePool",
    "Dequantize",
    "FrequencyConv2d",
    "FusedConv2d",
    "GroupedConv2d",
    "HetConv2d",
    "Quantize",
    "QuantizedAdd",
    "QuantizedAvgPool2d",
    "QuantizedConv2d",
    "QuantizedLinear",
    "QuantizedMaxPool2d",
    "QuantizedPad",
    "Requantize",
    "SelfGroupConv2d",
    "SupportConv2d",
    "SupportLinear",
    "fold_het",
    "fuse",
]
