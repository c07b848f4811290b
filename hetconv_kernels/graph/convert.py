# SPDX-License-Identifier: Apache-2.0
"""convert: swap layers of a network by rule, and report what was swapped, what not, and why."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, InputTypeError, mismatch
from ..measure import stats, tables
from .copying import copied
from .rules import Keep, Rule

__all__ = ["ConversionReport", "convert"]

# Where torch keeps the hooks of a module.
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Swap(NamedTuple):
    """One place in the network where another module stands now.

    Attributes:
        name: of the place; "" is the network itself.
        before: the old module.
        after: the new module.
    """

    name: str
    before: nn.Module
    after: nn.Module


class KeptModule(NamedTuple):
    """One place that a rule looked at and left alone.

    Attributes:
        name: of the place; "" is the network itself.
        reason: completes "kept because …".
    """

    name: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did; ``str()`` is a table.

    Attributes:
        model: the converted network: a copy, or with ``inplace=True`` the given object, unless
            that was itself a layer to swap.
        swapped: the places that changed; a module shared by several places is listed at each.
        kept: the places that a rule considered and left alone.
    """

    model: nn.Module
    swapped: tuple[Swap, ...]
    kept: tuple[KeptModule, ...]

    def parameters(self) -> tuple[int, int]:
        """Counts the network's live parameters before and after."""
        after = stats.live_parameters(self.model)
        gone = sum(
            stats.live_parameters(swap.before) - stats.live_parameters(swap.after)
            for swap in self._distinct()
        )
        return after + gone, after

    def macs(
        self, input_size: Sequence[int] | Tensor, fc: bool = True, bias: bool = False
    ) -> tuple[int, int]:
        """Counts the multiply-accumulates of one forward pass before and after.

        Args:
            input_size: see `stats.macs`.
            fc: whether fully connected layers count.
            bias: whether the addition of a bias counts.

        Raises:
            ArgumentError: a swap was not one convolution or linear layer for another.
        """
        rows = stats.layer_macs(self.model, input_size, fc, bias)
        positions = {row.name: row.positions for row in rows if row.dense}
        after = before = sum(row.macs for row in rows)
        for swap in self._distinct():
            old, new = stats.live_weights(swap.before), stats.live_weights(swap.after)
            if old is None or new is None:
                raise ArgumentError(
                    mismatch(
                        f"swap at {swap.name!r}",
                        f"{type(swap.before).__name__} -> {type(swap.after).__name__}",
                        "one convolution or linear layer for another",
                        "Call stats.macs on the networks themselves.",
                    )
                )
            before += positions.get(swap.name, 0) * (old - new)
        return before, after

    def _distinct(self) -> list[Swap]:
        return list({id(swap.after): swap for swap in reversed(self.swapped)}.values())

    def __str__(self) -> str:
        before, after = self.parameters()
        lines = [
            f"{len(self.swapped)} swapped, {len(self.kept)} kept; "
            f"live parameters {before:,} -> {after:,}"
        ]
        if self.swapped:
            rows = [
                (
                    swap.name or "(the model)",
                    type(swap.before).__name__,
                    type(swap.after).__name__,
                    stats.live_parameters(swap.before),
                    stats.live_parameters(swap.after),
                )
                for swap in self.swapped
            ]
            lines += ["", tables.text_table(("swapped", "was", "is", "before", "after"), rows)]
        if self.kept:
            kept = [(kept.name or "(the model)", kept.reason) for kept in self.kept]
            lines += ["", tables.text_table(("kept", "because"), kept)]
        return "\n".join(lines)


def convert(model: nn.Module, rule: Rule, inplace: bool = False) -> ConversionReport:
    """Swaps the modules of a network for which a rule has a replacement, in a copy of it.

    The given network is not changed, unless by ``inplace=True``; the result is ``report.model``.
    All replacements are made before the first is put in place, so an error leaves the network as
    it was. Mode (train or eval) and ``requires_grad`` carry over. A module that stands at several
    places is swapped once, at all of them. Modules with hooks, and layers that share a parameter
    with another module, are kept, since a new module would not have the one nor do the other.
    Parameters are new objects: build the optimiser after converting.

    Args:
        model: the network; when it is itself a layer to swap, the result is ``report.model`` only.
        rule: see `hetconv_kernels.rules`; any callable ``(name, module) -> module | Keep | None``.
        inplace: True changes the given network itself instead of a deep copy, which saves its
            memory; when an error is raised it is as it was.

    Raises:
        InputTypeError: ``model`` is no nn.Module, is scripted or wrapped for data parallelism,
            ``rule`` is no callable, or its answer is neither a module, nor a Keep, nor None.
        ArgumentError: the rule names modules that the network does not have.
    """
    _check(model, rule)
    if not inplace:
        model = copied(model)
    shared = _shared_parameters(model)
    answers: dict[int, nn.Module | Keep | None] = {}
    swaps: list[tuple[Swap, nn.Module | None, str]] = []
    kept: list[KeptModule] = []

    def visit(name: str, module: nn.Module, parent: nn.Module | None, key: str) -> None:
        new = id(module) not in answers
        if new:
            answers[id(module)] = _answer(rule, name, module, shared)
        answer = answers[id(module)]
        if isinstance(answer, Keep):
            kept.append(KeptModule(name, answer.reason))
        elif answer is not None:
            swaps.append((Swap(name, module, answer), parent, key))
        elif new:
            for child_key, child in module._modules.items():
                if child is not None:
                    visit(f"{name}.{child_key}" if name else child_key, child, module, child_key)

    visit("", model, None, "")
    for swap, parent, key in swaps:
        if parent is None:
            model = swap.after
        else:
            parent._modules[key] = swap.after
    return ConversionReport(model, tuple(swap for swap, _, _ in swaps), tuple(kept))


def _check(model: nn.Module, rule: Rule) -> None:
    if not isinstance(model, nn.Module):
        raise InputTypeError(mismatch("model", type(model).__name__, "an nn.Module"))
    wrappers = (
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.jit.ScriptModule,
    )
    if isinstance(model, wrappers) or type(model).__name__ == "FullyShardedDataParallel":
        raise InputTypeError(
            mismatch(
                "model",
                f"a {type(model).__name__}",
                "the plain network",
                "Convert before wrapping.",
            )
        )
    if not callable(rule):
        raise InputTypeError(
            mismatch("rule", type(rule).__name__, "a callable", "See hetconv_kernels.rules.")
        )
    wanted: frozenset[str] = getattr(rule, "names", frozenset())
    if not wanted:
        return
    present = dict(model.named_modules(remove_duplicate=False))
    missing = sorted(wanted - present.keys())
    if missing:
        near = difflib.get_close_matches(missing[0], present, n=3)
        raise ArgumentError(
            mismatch(
                "names of modules to convert",
                missing,
                "names from model.named_modules()",
                f"Did you mean {', '.join(map(repr, near))}?" if near else "",
            )
        )


def _shared_parameters(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters that more than one module owns."""
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {key for key, count in owners.items() if count > 1}


def _answer(rule: Rule, name: str, module: nn.Module, shared: set[int]) -> nn.Module | Keep | None:
    answer = rule(name, module)
    if answer is None or isinstance(answer, Keep):
        return answer
    if not isinstance(answer, nn.Module):
        raise InputTypeError(
            mismatch(
                f"answer of the rule for {name!r}",
                type(answer).__name__,
                "a module, Keep(reason) or None",
            )
        )
    if answer is module:
        return Keep("the rule gave it back unchanged")
    reason = next(_what_would_be_lost(module, shared), None)
    if reason is not None:
        return Keep(reason)
    answer.train(module.training)
    for key, parameter in answer.named_parameters(recurse=False):
        old = module._parameters.get(key)
        if old is not None:
            parameter.requires_grad_(old.requires_grad)
    return answer


def _what_would_be_lost(module: nn.Module, shared: set[int]) -> Iterator[str]:
    if any(getattr(module, hooks, None) for hooks in HOOKS):
        yield "it has hooks, which a new module would not have; add them after converting"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if any(getattr(parameter, hooks, None) for hooks in _TENSOR_HOOKS):
            yield f"its {name} has gradient hooks, which a new parameter would not have"
        if id(parameter) in shared:
            yield f"its {name} is shared with another module and would no longer be"
