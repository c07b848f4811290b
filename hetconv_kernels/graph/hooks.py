# SPDX-License-Identifier: Apache-2.0
"""Hooks: what the layers of a network are called with, and when, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Key = TypeVar("Key")


class LayerCall(NamedTuple):
    """What a module was called with."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@contextmanager
def hooked(
    modules: Mapping[Key, nn.Module],
    before: Callable[[Key, LayerCall], None],
    after: Callable[[Key, LayerCall, Any], None] | None = None,
    always: bool = False,
) -> Iterator[None]:
    """Calls functions right before and right after each call of some modules.

    Other hooks of a module run outside of both, and nothing is left on it.

    Args:
        modules: by any key.
        before: takes the key of a module and what it is called with.
        after: takes the output too.
        always: whether ``after`` is called when a module raises, with None as its output.
    """
    handles = []
    try:
        for key, module in modules.items():

            def enter(_: Any, args: Any, kwargs: Any, key: Key = key) -> None:
                before(key, LayerCall(args, kwargs))

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            if after is None:
                continue

            def leave(_: Any, args: Any, kwargs: Any, output: Any, key: Key = key) -> None:
                after(key, LayerCall(args, kwargs), output)

            handles.append(
                module.register_forward_hook(
                    leave, prepend=True, with_kwargs=True, always_call=always
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def copy_of(x: Tensor) -> Tensor:
    """Copies a tensor in its layout: a later operation may work in place on what a layer got."""
    return x.detach().clone(memory_format=torch.preserve_format)


def without_values(x: Tensor) -> Tensor:
    """Returns an uninitialised tensor of the same kind and layout."""
    return torch.empty_like(x, memory_format=torch.preserve_format)


def calls_of(
    modules: Mapping[Key, nn.Module],
    run: Callable[[], object],
    keep: Callable[[Tensor], Tensor] = copy_of,
) -> dict[Key, list[LayerCall]]:
    """Runs something and lists what modules are called with meanwhile.

    Args:
        modules: by any key.
        run: runs the network that they are in.
        keep: what is kept of each tensor among the arguments.

    Returns:
        The calls of each module in their order, none where it was not called.
    """
    seen: dict[Key, list[LayerCall]] = {key: [] for key in modules}

    def note(key: Key, call: LayerCall) -> None:
        arguments = tuple(_kept(a, keep) for a in call.arguments)
        keywords = {name: _kept(a, keep) for name, a in call.keywords.items()}
        seen[key].append(LayerCall(arguments, keywords))

    with hooked(modules, note):
        run()
    return seen


def _kept(argument: Any, keep: Callable[[Tensor], Tensor]) -> Any:
    return keep(argument) if isinstance(argument, Tensor) else argument
