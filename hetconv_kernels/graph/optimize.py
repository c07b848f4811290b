# SPDX-License-Identifier: Apache-2.0
"""optimize: everything that makes a trained network fast for inference, with an account of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import stats
from ..errors import HetconvError
from ..nn.base import SupportLayer
from . import trace
from .channels import Channels
from .check import Match, verify
from .compact import CompactReport, shrink
from .fold import Folded, Left, fold
from .layout import set_module
from .order import Reordered, order
from .trace import as_inputs, check_network


@dataclass(frozen=True)
class Part:
    """What was done to a network, or to the part of one that could be traced.

    Attributes:
        name: of the part; "" is the whole network.
        traced_by: ``torch.fx`` or ``torch.export``.
        compacted: what became smaller.
        reordered: which channels were put in another order.
        folded: what was fused.
    """

    name: str
    traced_by: str
    compacted: CompactReport
    reordered: tuple[Reordered, ...]
    folded: Folded


@dataclass(frozen=True)
class OptimizeReport:
    """What `optimize` did and did not do, and why; ``str()`` says it.

    Attributes:
        model: the network to run.
        parts: what was done, for the whole network or for each part that could be traced.
        untraced: the modules that could not be traced, and why.
        frozen: layers outside of all parts that were frozen.
        match: how far the outputs are from the original's.
    """

    model: nn.Module
    parts: tuple[Part, ...]
    untraced: tuple[Left, ...]
    frozen: tuple[str, ...]
    match: Match

    def __str__(self) -> str:
        lines = [f"outputs compared: {self.match}"]
        for part in self.parts:
            lines += ["", *_account(part)]
        if self.frozen:
            lines += ["", f"frozen, as they are: {', '.join(self.frozen)}"]
        if self.untraced:
            rows = [(left.name or "(the model)", left.reason) for left in self.untraced]
            lines += ["", stats.text_table(("not traced", "because"), rows)]
        return "\n".join(lines)


def optimize(model: nn.Module, example: Any) -> OptimizeReport:
    """Makes a trained network fast for inference.

    In turn: `compact` removes dead channels; `order` rearranges channels so that groups are
    contiguous; `fold` takes batch normalisation, residual sums and activations into the
    convolutions; layers with a Support are frozen. Where the network cannot be traced, its parts
    are tried, down to single layers. The outputs of the result are compared with the original's.

    The original is not touched. The result does not train.

    Args:
        model: the network, in evaluation mode.
        example: an input of the size that matters, or a tuple of inputs. Memory formats are the
            caller's: an input in channels_last is the faster one.

    Returns:
        The report, with the network as ``report.model``.

    Raises:
        InputTypeError: no nn.Module, or no tensor in the example.
        ArgumentError: the network is in training mode.
        VerificationError: the outputs differ by more than rounding.
    """
    trace.check_float(model)
    check_network(model)
    inputs = as_inputs(example)
    work = _Work(copy.deepcopy(model))
    with torch.no_grad():
        result = work.optimize(work.root, "", inputs)
        if result is not None:
            work.root = result
        frozen = tuple(_freeze(work.root))
    matched = work.match
    if matched is None or result is None or frozen:
        matched = verify(model, work.root, inputs, "optimize")
    return OptimizeReport(work.root, tuple(work.parts), tuple(work.untraced), frozen, matched)


@dataclass
class _Work:
    """A network on its way.

    Attributes:
        root: a copy of the network, which is changed.
    """

    root: nn.Module
    parts: list[Part] = field(default_factory=list)
    untraced: list[Left] = field(default_factory=list)
    match: Match | None = None

    def optimize(self, module: nn.Module, name: str, inputs: tuple[Any, ...]) -> nn.Module | None:
        """Optimises a module as a whole, or its children in place; returns what replaces it."""
        try:
            compacted, traced = shrink(copy.deepcopy(module), inputs)
            _, reordered = order(Channels(traced))
            folded = fold(traced.eval())
            self.match = verify(module, traced, inputs, "optimize")
        except HetconvError as error:
            self.untraced.append(Left(name, str(error)))
            self._children(module, name, inputs)
            return None
        self.parts.append(Part(name, traced.meta["traced by"], compacted, reordered, folded))
        return traced

    def _children(self, module: nn.Module, name: str, inputs: tuple[Any, ...]) -> None:
        """Optimises the children that are called once, on what they are called with."""
        calls = _calls(module, inputs)
        for key, child in list(module.named_children()):
            path = f"{name}.{key}" if name else key
            seen = calls.get(id(child), [])
            leaf = not any(True for _ in child.children())
            if leaf or len(seen) != 1:
                continue
            new = self.optimize(child, path, seen[0])
            if new is not None:
                set_module(module, key, new)


def _calls(module: nn.Module, inputs: tuple[Any, ...]) -> dict[int, list[tuple[Any, ...]]]:
    """Runs a module and notes what its children are called with."""
    seen: dict[int, list[tuple[Any, ...]]] = {}

    def note(child: nn.Module, args: tuple[Any, ...]) -> None:
        kept = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
        seen.setdefault(id(child), []).append(kept)

    handles = [child.register_forward_pre_hook(note) for child in module.children()]
    try:
        module(*copy.deepcopy(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _freeze(root: nn.Module) -> Iterator[str]:
    for name, module in root.named_modules():
        if isinstance(module, SupportLayer) and not module.frozen and module._owns_weight:
            module.freeze()
            yield name


def _account(part: Part) -> list[str]:
    where = part.name or "the network"
    lines = [f"{where}, traced by {part.traced_by}"]
    shrunk = part.compacted.shrunk
    lines.append(
        f"  {len(shrunk)} layers made smaller" if shrunk else "  no dead channels to remove"
    )
    reasons: dict[str, list[int]] = {}
    for stayed in part.compacted.stayed:
        reasons.setdefault(stayed.reason, []).append(stayed.channels)
    for reason, dead in reasons.items():
        lines.append(f"    {sum(dead)} dead channels at {len(dead)} places stayed: {reason}")
    for moved in part.reordered:
        lines.append(
            f"  {moved.channels} channels of {', '.join(moved.layers)} put in order: "
            f"{moved.runs[0]} runs -> {moved.runs[1]}"
        )
    if not part.reordered:
        lines.append("  no order of channels with fewer runs was found")
    counts: dict[str, int] = {}
    for fused in part.folded.fused:
        counts[fused.parts] = counts.get(fused.parts, 0) + 1
    lines += [f"  {count} fused: {parts}" for parts, count in counts.items()]
    if part.folded.removed:
        lines.append(f"  {part.folded.removed} steps without effect removed (dropout, identity)")
    lines += [f"  {left.name} left alone: {left.reason}" for left in part.folded.left]
    return lines
