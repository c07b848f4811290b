# SPDX-License-Identifier: Apache-2.0
"""Batch normalisations whose statistics and parameters are buffers: ``FrozenBatchNorm2d``.

torchvision's and detectron2's detection networks have them. They are known by their name and their
buffers, so that neither package is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layout import set_module

_BUFFERS = frozenset(("weight", "bias", "running_mean", "running_var"))


def is_frozen_norm(module: nn.Module | None) -> bool:
    """Tells a batch normalisation that computes the same in both modes and is never trained."""
    return (
        module is not None
        and type(module).__name__ == "FrozenBatchNorm2d"
        and isinstance(getattr(module, "eps", None), float)
        and not module._parameters
        and module._buffers.keys() >= _BUFFERS
    )


@torch.no_grad()
def make_ordinary(model: nn.Module) -> tuple[str, ...]:
    """Puts ``nn.BatchNorm2d`` in the place of frozen normalisations, in place.

    Only for a network in evaluation mode that will not be trained.

    Returns:
        Names of the normalisations.
    """
    found = {name: m for name, m in model.named_modules() if name and is_frozen_norm(m)}
    for name, frozen in found.items():
        buffers: dict[str, Any] = frozen._buffers
        weight = buffers["weight"]
        norm = nn.BatchNorm2d(len(weight), frozen.eps, device=weight.device, dtype=weight.dtype)
        for key in _BUFFERS:
            getattr(norm, key).copy_(buffers[key])
        set_module(model, name, norm.requires_grad_(False).eval())
    return tuple(found)
