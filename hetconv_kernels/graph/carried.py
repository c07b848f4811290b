# SPDX-License-Identifier: Apache-2.0
"""What a module carries beside its class and arguments: tensors, hooks, a forward of its own.

A file describes layers by class and arguments. Pruning, weight norms and users add to that: tensors
in place of the weight, hooks that compute it, hooks that change what comes out. A network that is
built from the description has none of it, so `io.save` asks here first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ArgumentError, mismatch
from ..files import Json
from ..support import Support
from .layer_json import layer_from_json, layer_to_json

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
_WAY_OUT = (
    "Make it permanent (torch.nn.utils.prune.remove, remove_weight_norm, remove_spectral_norm), "
    "remove hooks, or give save(..., into=network) a network that has the same, and "
    "load(..., into=network) such a one later."
)


class Carried(NamedTuple):
    """What one module, its parts included, carries.

    Attributes:
        tensors: size and dtype of its parameters and buffers, by name.
        hooks: what hooks are on it and its parts.
        own_forward: its parts with a forward of their own, not of their class.
        arguments: its description, without the memory format and the name of its Support.
    """

    tensors: dict[str, str]
    hooks: tuple[str, ...]
    own_forward: tuple[str, ...]
    arguments: Json | None

    def beside(self, other: Carried) -> list[str]:
        """Says what is here and not in the other, or the other way round."""
        found = [f"the {hook}" for hook in self.hooks if hook not in other.hooks]
        found += [f"no {hook}" for hook in other.hooks if hook not in self.hooks]
        found += [
            f"a forward of its own{f' in {name}' if name else ''}"
            for name in self.own_forward
            if name not in other.own_forward
        ]
        for name in sorted(self.tensors.keys() | other.tensors.keys()):
            here, there = self.tensors.get(name, "nothing"), other.tensors.get(name, "nothing")
            if here != there:
                found.append(f"{name!r} as {here} where a rebuilt one has {there}")
        mine, theirs = self.arguments or {}, other.arguments or {}
        apart = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
        if apart:
            found.append(f"{', '.join(apart)} that its class does not take over")
        return found


def carried(module: nn.Module, tensors: bool = True) -> Carried:
    """Finds what a module carries.

    Args:
        module: with its parts, if it is a described layer.
        tensors: whether its tensors count; else only the module itself is looked at.
    """
    parts = dict(module.named_modules()) if tensors else {"": module}
    hooks = [
        f"{kind} {getattr(hook, '__qualname__', type(hook).__qualname__)}"
        for part in parts.values()
        for attribute, kind in _HOOKS.items()
        for hook in getattr(part, attribute).values()
    ]
    own = tuple(name for name, part in parts.items() if "forward" in part.__dict__)
    named: dict[str, torch.Tensor] = {}
    if tensors:
        named |= dict(module.named_parameters(remove_duplicate=False))
        named |= dict(module.named_buffers(remove_duplicate=False))
    sizes = {
        name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in named.items()
    }
    described = layer_to_json(module) if tensors else None
    if described is not None:
        described = {k: v for k, v in described.items() if k != "channels_last"}
        if "support" in described:  # which weights exist; how it was made is only its name
            described["support"] = Support.from_json(described["support"]).digest
    return Carried(sizes, tuple(hooks), own, described)


def check_described(
    model: nn.Module, layers: Mapping[str, Json], into: nn.Module | None = None
) -> None:
    """Refuses a network that carries what its description leaves out.

    Args:
        model: the network.
        layers: the descriptions of its layers, by name.
        into: a network that it will be loaded into; what that one carries too is not lost.

    Raises:
        ArgumentError: something would be lost; the message names the first modules and what.
    """
    others = {} if into is None else dict(into.named_modules())
    lost: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{whole}.") for whole in layers if whole) or (
            name and "" in layers
        ):
            continue
        described = layers.get(name)
        here = carried(module, described is not None)
        if described is None:
            rebuilt = Carried({}, (), (), None)
        else:
            rebuilt = carried(layer_from_json(_through_json(described)))
            rebuilt = rebuilt._replace(arguments=_through_json(rebuilt.arguments))
            here = here._replace(arguments=_through_json(here.arguments))
        beside = here.beside(rebuilt)
        if beside and name in others:
            there = carried(others[name], described is not None)
            beside = here.beside(there._replace(arguments=_through_json(there.arguments)))
        if beside:
            lost.append(f"{name or 'the network itself'} with {', '.join(beside[:4])}")
    if lost:
        raise ArgumentError(
            mismatch(
                "network to save",
                "; ".join(lost[:3]) + ("; ..." if len(lost) > 3 else ""),
                "modules that their class and arguments describe",
                _WAY_OUT,
            )
        )


def _through_json(value: Any) -> Any:
    """Returns what a file would give back: lists for tuples."""
    if isinstance(value, dict):
        return {key: _through_json(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_through_json(v) for v in value]
    return value
