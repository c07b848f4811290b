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

from ..backends import NAMES, forced_code
from ..errors import BackendError
from . import reference


@cache
def _cpu() -> Any:
    """Returns the C++ engine's module; None where this installation has none."""
    if importlib.util.find_spec("hetconv_kernels.backends.cpu_int8") is None:
        return None
    module = importlib.import_module("hetconv_kernels.backends.cpu_int8")
    return module if module.available() else None


def available() -> tuple[str, ...]:
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
    name = NAMES[code or forced_code()]
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


def name_of(device: torch.device, code: int = 0) -> str:
    """Names what `engine` returns: ``"cpu"`` or ``"reference"``."""
    return "reference" if engine(device, code) is reference else "cpu"
