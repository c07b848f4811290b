# SPDX-License-Identifier: Apache-2.0
"""What the tests of programs share: the program that ran, and the comparison with the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hetconv_kernels.graph.planned import PlannedNetwork


def program_of(fast: nn.Module) -> Any:
    """Returns the program that was used last."""
    return next(reversed(fast.__dict__["_memory"]._plans.values())).program


def kinds(fast: nn.Module) -> list[str]:
    program = program_of(fast)
    assert program is not None
    return program.kinds


def assert_equal_calls(fast: PlannedNetwork, plain: nn.Module, *inputs: Tensor) -> None:
    """Calls both with other numbers each time: recorded once, then twice by the program."""
    with torch.no_grad():
        for factor in (1.0, -0.5, 2.0):
            given = [x if x.dtype == torch.uint8 else x * factor for x in inputs]
            torch.testing.assert_close(fast(*given), plain(*given), rtol=0, atol=0, equal_nan=True)
