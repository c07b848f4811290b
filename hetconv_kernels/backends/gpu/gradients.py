# SPDX-License-Identifier: Apache-2.0
"""The gradient of a weight, as both engines for GPUs leave it: its form, and room for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import Problem


def gradient_form(problem: Problem) -> str:
    """Returns ``"live"``, or for a dense weight ``"contiguous"`` or ``"channels_last"``."""
    if problem.live_weight:
        return "live"
    last = problem.channels_last and len(problem.weight_shape) == 4
    return "channels_last" if last else "contiguous"


def empty_gradient(problem: Problem, device: torch.device) -> Tensor:
    """Allocates dw in that form."""
    last = gradient_form(problem) == "channels_last"
    return torch.empty(
        problem.weight_shape,
        dtype=problem.weight_dtype,
        device=device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
