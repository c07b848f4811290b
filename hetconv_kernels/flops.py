# SPDX-License-Identifier: Apache-2.0
"""FLOPs of our operators for ``torch.utils.flop_counter.FlopCounterMode``.

A FLOP is half a multiply-accumulate there, as for PyTorch's own operators, and only the weights
that exist are counted: forward, input gradient and weight gradient cost the same.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from .geometries import geometry_of

_FLOP_COUNTER = "torch.utils.flop_counter"


def register_flop_formulas() -> None:
    """Teaches FlopCounterMode our operators, now or as soon as it is imported.

    ``torch.utils.flop_counter`` imports Triton where that is installed, which importing this
    package must not do. So when nobody has imported it yet the registration waits for that import.
    Calling this again changes nothing.
    """
    module = sys.modules.get(_FLOP_COUNTER)
    if module is not None:
        _register(module)
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


class _OnImport(importlib.abc.MetaPathFinder):
    """Registers the formulas right after the flop counter is imported, then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _FLOP_COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(module: ModuleType) -> None:
    for name in ("fprop", "dgrad", "wgrad", "qfprop"):
        operator = getattr(torch.ops.hetconv, name, None)  # qfprop comes with the 8-bit operators
        if operator is not None and operator not in module.flop_registry:
            formula = _quantized_flops if name == "qfprop" else _flops
            module.register_flop_formula(operator, get_raw=True)(formula)


def _flops(*args: Any, out_val: Any = None) -> int:
    # Every schema starts (batched tensor, the other operand, support) and ends (geometry, backend);
    # the dispatcher has made all arguments positional.
    batched, support, ints = args[0], args[2], args[-2]
    layer = geometry_of(support, ints)
    height, width = layer.output_size(ints[0], ints[1])
    return int(2 * batched.shape[0] * layer.support.macs(height, width))


def _quantized_flops(*args: Any, out_val: Any = None) -> int:
    # x, w, support, multiplier, bias, residual, geometry, …
    return _flops(args[0], None, args[2], args[6], None)
