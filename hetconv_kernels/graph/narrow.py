# SPDX-License-Identifier: Apache-2.0
"""Narrow: a network whose weights and activations are of a 16-bit type, used like before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ArgumentError, TraceError, mismatch
from ..nn.base import STAND_IN, as_step
from ..nn.fused import FusedConv2d

NARROW = (torch.bfloat16, torch.float16)


class Narrow(nn.Module):
    """Runs a network in a 16-bit type: inputs are narrowed, outputs get the inputs' dtype back.

    Sums are float32 inside of a convolution, and so are the shifts that it adds (bias, folded
    batch normalisation) and a batch normalisation that stands alone. Between layers activations
    are of the narrow type.

    Attributes:
        body: the network.
        dtype: of its weights and activations.

    Shape:
        As the network's; floating-point inputs of any dtype, outputs of the first one's.
    """

    def __init__(self, body: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = body, dtype

    def forward(self, *inputs: Any) -> Any:
        """Runs the network on narrowed inputs.

        Raises:
            TraceError: torch.fx traces this module itself, whose arguments it does not know.
        """
        if type(inputs) is STAND_IN:
            raise TraceError(
                mismatch(
                    "network of 16 bits for torch.fx",
                    "itself",
                    "a network that it is in",
                    "Trace torch.nn.Sequential(network), or its body, network.body.",
                )
            )
        if any(type(x) is STAND_IN for x in inputs):
            return as_step(self, *inputs)
        given = _floats(inputs)
        outputs = self.body(*_cast(inputs, self.dtype))
        return _cast(outputs, given[0].dtype) if given else outputs

    def extra_repr(self) -> str:
        """Says the type."""
        return f"dtype={self.dtype}"


def check_narrow(dtype: object) -> None:
    """Refuses what is no 16-bit type.

    Raises:
        ArgumentError: another dtype, or something else.
    """
    if dtype not in NARROW:
        way_out = "Leave dtype out to keep that of the network."
        raise ArgumentError(mismatch("dtype", dtype, "torch.bfloat16 or torch.float16", way_out))


def narrow(model: nn.Module, dtype: torch.dtype) -> Narrow:
    """Converts an optimised network in place and wraps it.

    Args:
        model: the network; its weights are rounded to the nearest.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        The network as a `Narrow`, in evaluation mode.
    """
    wide: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        own = module.state_dict(prefix=f"{name}." if name else "", keep_vars=True)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            wide |= own
        elif isinstance(module, FusedConv2d):
            wide |= {key: value for key, value in own.items() if key.endswith("shift")}
    kept = {name: tensor.detach().float() for name, tensor in wide.items() if _is_float(tensor)}
    model.to(dtype)
    for name, tensor in kept.items():
        path, _, attribute = name.rpartition(".")
        getattr(model.get_submodule(path), attribute).data = tensor
    return Narrow(model, dtype).eval()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _floats(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if _is_float(leaf)]


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(dtype) if _is_float(leaf) else leaf, values)
