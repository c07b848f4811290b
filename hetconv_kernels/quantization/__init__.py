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
    from .onnx_import import from_onnx
    from .onnx_qdq import to_onnx
    from .pt2e import from_pt2e
    from .qdq import to_qdq
    from .quantize import prepare
    from .report import QuantizeReport
    from .rewrite import convert

__all__ = [
    "QuantizeReport",
    "Scale",
    "convert",
    "from_onnx",
    "from_pt2e",
    "prepare",
    "to_onnx",
    "to_qdq",
]

# Loaded when first asked for: the layers import this package, and these import the layers.
_LAZY = {
    "QuantizeReport": ".report",
    "convert": ".rewrite",
    "from_onnx": ".onnx_import",
    "from_pt2e": ".pt2e",
    "prepare": ".quantize",
    "to_onnx": ".onnx_qdq",
    "to_qdq": ".qdq",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value
