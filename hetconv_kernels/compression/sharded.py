# SPDX-License-Identifier: Apache-2.0
"""Sharded networks: a plain copy of what FSDP2 has spread over the ranks."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from ..errors import InputTypeError, mismatch
from ..graph.convert import HOOKS
from ..graph.copying import copied

# Tables of what hooks are called with, by the numbers of the hooks.
_FLAGS = {
    "_forward_hooks_with_kwargs": "_forward_hooks",
    "_forward_hooks_always_called": "_forward_hooks",
    "_forward_pre_hooks_with_kwargs": "_forward_pre_hooks",
}
# How the names of attributes begin that torch keeps with a module that fully_shard was applied to:
# process groups, no weights.
_STATE = "__composable_api_"
_FSDP, _TENSOR_PARALLEL = "torch.distributed.fsdp", "torch.distributed.tensor"


def is_sharded(model: nn.Module) -> bool:
    """Whether a network has weights that are spread over ranks."""
    kind = _fsdp_module()
    return any(kind is not None and isinstance(module, kind) for module in model.modules()) or any(
        hasattr(parameter, "full_tensor") for parameter in model.parameters()
    )


@torch.no_grad()
def gathered(model: nn.Module) -> nn.Module:
    """Copies a network that ``fully_shard`` (FSDP2) was applied to as the plain one it was made of.

    Every rank gets all weights, so each needs the memory for the whole network; all ranks have to
    call it. The given network stays as it is, sharded.

    Raises:
        InputTypeError: the weights are spread in another way (tensor parallelism), which a plain
            network cannot stand for.
    """
    kind = _fsdp_module()
    modules = list(model.modules())
    for module in modules:
        if kind is not None and isinstance(module, kind):
            # After a forward without a backward it may hold whole weights.
            module.reshard()  # type: ignore[operator]
    _check(model, modules, kind)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():  # in the same order on all ranks
        if hasattr(parameter, "full_tensor"):
            whole = parameter.full_tensor().detach().clone()
            memo[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    touched = [module for module in modules if _is_touched(module, kind)]
    for module in touched:
        plain: Any = next(
            c for c in type(module).__mro__ if kind is None or not issubclass(c, kind)
        )
        memo[id(module)] = plain.__new__(plain)
    for module in touched:
        twin = memo[id(module)]
        for key, value in vars(module).items():
            if not key.startswith(_STATE):
                twin.__dict__[key] = copy.deepcopy(_own(module, key, value), memo)
    return copied(model, memo)


def _check(model: nn.Module, modules: list[nn.Module], kind: type | None) -> None:
    by_fsdp: set[int] = set()
    for module in modules:
        if kind is not None and isinstance(module, kind):
            by_fsdp.update(map(id, module.parameters()))
    odd = [
        name
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "full_tensor") and id(parameter) not in by_fsdp
    ]
    parallel = [
        type(module).__name__
        for module in modules
        for name in HOOKS
        for hook in vars(module).get(name, {}).values()
        if _home(hook).startswith(_TENSOR_PARALLEL)
    ]
    if odd or parallel:
        raise InputTypeError(
            mismatch(
                "model",
                f"sharded weights ({(odd or parallel)[0]}) that are not FSDP2's alone",
                "the plain network, or one that fully_shard was applied to",
                "Compress before sharding.",
            )
        )


def _is_touched(module: nn.Module, kind: type | None) -> bool:
    """Whether FSDP2 changed a module's class or put hooks on it."""
    if kind is not None and isinstance(module, kind):
        return True
    hooks = (hook for name in HOOKS for hook in vars(module).get(name, {}).values())
    return any(_home(hook).startswith(_FSDP) for hook in hooks)


def _own(module: nn.Module, key: str, value: Any) -> Any:
    """Leaves FSDP2's hooks out of an attribute of a module, if it holds hooks."""
    table = _FLAGS.get(key, key)
    if table not in HOOKS:
        return value
    kept = copy.copy(value)
    for number, hook in vars(module)[table].items():
        if _home(hook).startswith(_FSDP):
            kept.pop(number, None)
    return kept


def _home(hook: Any) -> str:
    """Names the module of the library that a hook comes from."""
    hook = getattr(hook, "hook", hook)  # torch wraps those of state dicts
    while hasattr(hook, "func"):
        hook = hook.func
    return getattr(hook, "__module__", None) or ""


def _fsdp_module() -> type | None:
    """Returns what ``fully_shard`` makes of a module; None where it has not been imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # to import it is slow
    return getattr(fsdp, "FSDPModule", None)
