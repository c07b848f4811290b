# SPDX-License-Identifier: Apache-2.0
"""Low precision: 8-bit activations and weights, 32-bit accumulation; see docs/low-precision.md.

report = hk.quantize(model.eval(), batches)          # post-training
network = hk.quantization.prepare(model, batches)    # or: train under fake quantisation,
integers = hk.quantization.convert(network)          # then convert
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .scheme import Scale

if TYPE_CHECKING:
    from .quantize import prepare
    from .report import QuantizeReport
    from .rewrite import convert

__all__ = ["QuantizeReport", "Scale", "convert", "prepare"]

# Loaded when first asked for: the layers import this package, and these import the layers.
_LAZY = {"QuantizeReport": ".report", "convert": ".rewrite", "prepare": ".quantize"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value
