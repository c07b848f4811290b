# SPDX-License-Identifier: Apache-2.0
"""Pruning by torch.nn.utils.prune, told which weights exist.

The weight of a layer with a Support is dense, with zeros where there is no weight. PyTorch's
pruning methods do not know that and take the zeros first, for nothing is smaller: of a HetConv
layer whose density is 0.4, "half of the weights by magnitude" removes none that is live.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune

from .errors import InputTypeError, SupportError, mismatch
from .nn.base import SupportLayer

__all__ = ["live_only"]


def live_only(model: nn.Module) -> tuple[str, ...]:
    """Makes PyTorch's pruning methods count and remove live weights only.

    Puts the mask of the Support on each layer of this package, as a first pruning
    (``prune.custom_from_mask``); whatever ``torch.nn.utils.prune`` does afterwards, one layer at a
    time or globally, chooses among what is left, so that an amount of 0.5 is half of the live
    weights. Layers that were pruned before are left as they are. ``prune.remove(layer, "weight")``
    makes it permanent, and ``layer.set_support`` of what is left makes it fast.

    Args:
        model: a network, or one layer; changed in place.

    Returns:
        The names of the layers that it was put on: those with dead entries.

    Raises:
        InputTypeError: ``model`` is no nn.Module.
        SupportError: a layer is frozen.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(mismatch("model", type(model).__name__, "an nn.Module"))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SupportLayer)}
    for name, layer in layers.items():
        if layer.frozen:
            raise SupportError(
                f"{name or 'the layer'} is frozen; expected a trainable one. thaw() it."
            )
    chosen = {n: m for n, m in layers.items() if m._owns_weight and not m._all_live}
    for layer in chosen.values():
        mask = layer._mask(layer.weight.device).to(layer.weight.dtype)
        prune.custom_from_mask(layer, "weight", mask)
    return tuple(chosen)
