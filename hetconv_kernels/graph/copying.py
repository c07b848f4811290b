# SPDX-License-Identifier: Apache-2.0
"""Deep copies of networks whose weights are computed, and those weights made ordinary ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.spectral_norm import remove_spectral_norm as _remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.utils import _pytree as pytree

from ..errors import InputTypeError, mismatch

Network = TypeVar("Network", bound=nn.Module)

# PyTorch's hooks that compute a weight before each forward and leave it as a plain attribute.
_COMPUTES = (prune.BasePruningMethod, WeightNorm, SpectralNorm)


def copied(model: Network, memo: dict[int, Any] | None = None) -> Network:
    """Deep-copies a network.

    A tensor with a history in an attribute of a module, such as a weight that ``nn.utils.prune``,
    ``weight_norm`` or ``spectral_norm`` computed from others at the last forward, which
    ``copy.deepcopy`` refuses, is copied without its history; of those three it is computed anew.

    Args:
        model: the network.
        memo: copies that exist already, by the ids of their originals.

    Raises:
        InputTypeError: something in the network cannot be copied.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for leaf in pytree.tree_leaves([*vars(module).values()]):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
    try:
        twin: Network = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, copy.Error) as error:
        raise InputTypeError(
            mismatch(
                "a network to be copied",
                f"a {type(model).__name__} that copy.deepcopy refuses ({error})",
                "one whose attributes can all be copied",
                "Take the attribute off it, or give the class a __deepcopy__.",
            )
        ) from error
    for module in twin.modules():
        for hook in _computing(module):
            if isinstance(hook, SpectralNorm) and module.training:
                continue  # it would take another step of its power iteration
            name = _name(hook)
            trained = getattr(module, name).requires_grad
            with torch.no_grad():
                hook(module, None)
            setattr(module, name, getattr(module, name).detach().requires_grad_(trained))
    return twin


@torch.no_grad()
def settle(model: nn.Module) -> tuple[str, ...]:
    """Makes computed weights ordinary Parameters, in place: parametrised, pruned, normed ones.

    Only for a network in evaluation mode that will not be trained: each is computed once and for
    all.

    Returns:
        Names of the weights.
    """
    settled: list[str] = []
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        settled += [dot + name for name in _unparametrised(module)]
        for hook in list(_computing(module)):
            name = _name(hook)
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, name)
            elif isinstance(hook, WeightNorm):
                remove_weight_norm(module, name)
            else:
                _remove_spectral_norm(module, name)
            settled.append(dot + name)
    return tuple(settled)


def _unparametrised(module: nn.Module) -> list[str]:
    """Makes what parametrisations compute ordinary; copies of the module keep theirs.

    ``remove_parametrizations`` takes the property off the class, which a copy shares.
    """
    if not parametrize.is_parametrized(module):
        return []
    lists: Any = module.parametrizations
    values = {name: getattr(module, name).detach() for name in lists}
    trained = {name: any(p.requires_grad for p in lists[name].parameters()) for name in lists}
    buffers = {name for name in lists if not isinstance(_original(lists[name]), nn.Parameter)}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        if name in buffers:
            module.register_buffer(name, value)
        else:
            module.register_parameter(name, nn.Parameter(value, trained[name]))
    return list(values)


def _original(parametrisations: Any) -> Tensor:
    first: Tensor = getattr(parametrisations, "original", None)  # type: ignore[assignment]
    return parametrisations.original0 if first is None else first


def _computing(module: nn.Module) -> Iterator[Any]:
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _COMPUTES))


def _name(hook: Any) -> str:
    name: str = hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name
    return name
