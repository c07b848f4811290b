# SPDX-License-Identifier: Apache-2.0
"""What every rule for `convert` is made of: its answers, and which modules are plain layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..errors import ArgumentError, mismatch
from ..integers import is_integer
from ..nn import FusedConv2d, SupportConv2d

# Images have one (grey) to four (colour and transparency) channels.
_IMAGE_CHANNELS = 4


class Keep:
    """The answer of a rule that leaves a module, and everything inside it, as it is.

    Args:
        reason: a clause that completes "kept because …", for the report.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return f"Keep({self.reason!r})"


Answer = nn.Module | Keep | None
Rule = Callable[[str, nn.Module], Answer]


def _check_part(p: int, order: str) -> None:
    if not is_integer(p) or p < 1:
        raise ArgumentError(mismatch("p of a HetConv", p, "a positive integer"))
    if order not in ("blocked", "interleaved"):
        raise ArgumentError(mismatch("order", repr(order), "'blocked' or 'interleaved'"))


def _plain_conv2d(module: nn.Module) -> nn.Conv2d | Keep | None:
    """Returns the module when it is an ``nn.Conv2d`` and nothing else, or why it is not."""
    answer = _plain(module, nn.Conv2d)
    if isinstance(answer, nn.Conv2d | Keep):
        return answer
    if isinstance(module, SupportConv2d | FusedConv2d):
        return Keep(f"it is a {type(module).__name__} already")
    kind = type(module)
    if isinstance(module, _ConvNd):
        return Keep(f"a {kind.__name__} is not a 2-D convolution")
    if "quantized" in kind.__module__ and "Conv" in kind.__name__:
        return Keep("it is quantised: its weights are integers")
    return None


def _plain(module: nn.Module, kind: type[nn.Module]) -> nn.Module | Keep | None:
    """Returns a module of exactly this class with ordinary parameters, or why it is not one."""
    if not isinstance(module, kind):
        return None
    if isinstance(module, LazyModuleMixin):
        return Keep("it is lazy and has no weights yet; call the network once first")
    if is_parametrized(module):
        return Keep("it is parametrised: its weight is computed from others")
    if type(module) is not kind:
        way = "; rules.computed_weights may make it plain" if kind is nn.Conv2d else ""
        return Keep(
            f"{type(module).__name__}, a subclass of {kind.__name__}, may do other things{way}"
        )
    weight = module._parameters.get("weight")
    if weight is None:
        return Keep("its weight is not a parameter of its own (weight normalisation or pruning)")
    if type(weight) is not nn.Parameter:
        return Keep(f"its weight is a {type(weight).__name__}; convert before sharding or wrapping")
    if "forward" in vars(module):
        return Keep("its forward was replaced on the instance")
    return module
