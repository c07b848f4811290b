# SPDX-License-Identifier: Apache-2.0
"""Which engine runs the operations in 8 bits: the C++ one where it is built, else the reference.

Both give the same integers, so the choice shows in the time alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch

from .. import ranges
from ..backends import ENGINE_OF_CODE, forced_code
from ..errors import BackendError
from . import reference


@cache
def _cpu() -> Any:
    """Returns the C++ engine's module; None where this installation has none."""
    if importlib.util.find_spec("hetconv_kernels.backends.cpu_int8") is None:
        return None
    module = importlib.import_module("hetconv_kernels.backends.cpu_int8")
    return module if module.is_built() else None


def engine_names() -> tuple[str, ...]:
    """Names the engines of this installation that compute in 8 bits, the faster first."""
    return ("reference",) if _cpu() is None else ("cpu", "reference")


def engine(device: torch.device, code: int = 0) -> Any:
    """Returns the module with the operations: `reference`, or the C++ engine's face.

    Args:
        device: of the activations.
        code: a forced backend's, 0 to follow `use_backend`.

    Raises:
        BackendError: the backend that is forced does not compute in 8 bits, or not there.
    """
    name = ENGINE_OF_CODE[code or forced_code()]
    if name == "reference":
        return reference
    fast = _cpu() if device.type == "cpu" else None
    if fast is not None and name in ("auto", "cpu"):
        return fast
    if name == "auto":
        return reference
    raise BackendError(
        f"backend {name!r} does not compute in 8 bits on {device}; expected 'auto', 'reference'"
        f"{' or cpu' if _cpu() is not None else ''}. Quantised layers follow use_backend like "
        "every layer of this package."
    )


# The operations and the verbs of their ranges, as the operators are called.
_VERBS = {
    "fprop": "qfprop",
    "add": "qadd",
    "requantize": "requantize",
    "mean": "qmean",
    "max_pool": "qmax_pool",
    "quantize_tensor": "quantize",
    "dequantize": "dequantize",
}


class Ranged:
    """An engine whose operations run inside their ranges; all else is the engine's own.

    Args:
        module: the engine.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        verb = _VERBS.get(name)
        if verb is None:
            return function
        who = "reference" if self._module is reference else "cpu"

        def call(x: Any, *arguments: Any, **named: Any) -> Any:
            shape = "x".join(map(str, x.shape))
            said = f"hetconv.{verb} {who} {shape}"
            if name == "fprop":
                support = arguments[1]
                f, _, kh, kw = support.shape
                said += f" -> {f} k{kh}x{kw} {support.kind}"
            return ranges.around(said, function, x, *arguments, **named)

        return call


def operations(device: torch.device, code: int = 0) -> Any:
    """Returns what `engine` returns, with ranges around its operations where `ranges` are on."""
    found = engine(device, code)
    return Ranged(found) if ranges.active else found


def engine_name(device: torch.device, code: int = 0) -> str:
    """Names what `engine` returns: ``"cpu"`` or ``"reference"``."""
    return "reference" if engine(device, code) is reference else "cpu"
