# SPDX-License-Identifier: Apache-2.0
"""Finds the average pooling in a graph, and makes it the engine's where that takes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..nn.average import AveragePool
from ..pooling import Pool
from .layout import set_module
from .names import module_of, name_of
from .trace import FAILURES

_NAMES = frozenset(("adaptive_avg_pool2d", "avg_pool2d", "mean"))


class Average(NamedTuple):
    """A step that became an `AveragePool`.

    Attributes:
        name: of the module, or of the operation.
        taps: pixels of a window, on the largest image that it was seen with.
    """

    name: str
    taps: int


def deepest(averages: Iterable[Average]) -> int:
    """Returns how many pixels the largest window has, at least 1."""
    return max((average.taps for average in averages), default=1)


@torch.no_grad()
def native_averages(
    traced: fx.GraphModule, calls: Sequence[tuple[Any, ...]], backend: str | None = None
) -> tuple[Average, ...]:
    """Makes average pooling `AveragePool`, in place, where the engine takes what it is given.

    Args:
        traced: the network.
        calls: the arguments of its forward, once for each call.
        backend: what is forced on the new modules.

    Returns:
        What was replaced, and what was an `AveragePool` before.
    """
    if not any(name_of(node) in _NAMES for node in traced.graph.nodes):
        return ()
    finder = _Finder(traced, backend)
    for inputs in calls:
        with suppress(*FAILURES):  # a graph of one call's sizes, which is refused later
            finder.run(*copy.deepcopy(inputs))
    done = [_replace(traced, node, *found) for node, found in finder.found.items()]
    if done:
        traced.graph.eliminate_dead_code()
        traced.delete_all_unused_submodules()
        traced.recompile()
    return tuple(done)


class _Finder(fx.Interpreter):
    """Finds the steps whose images the engine takes."""

    def __init__(self, traced: fx.GraphModule, backend: str | None) -> None:
        super().__init__(traced)
        self.backend = backend
        self.found: dict[fx.Node, tuple[AveragePool, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        source = n.args[0] if n.args and name_of(n) in _NAMES else None
        x = self.env.get(source) if isinstance(source, fx.Node) else None
        if isinstance(x, Tensor) and x.dim() == 4:
            pooling = average_of(n, tuple(x.shape))
            if pooling is not None:
                pooling.backend = self.backend or pooling.backend
                self._note(n, pooling, x)
        return super().run_node(n)

    def _note(self, node: fx.Node, pooling: AveragePool, x: Tensor) -> None:
        windows = pooling.windows(x.shape[2], x.shape[3])
        if windows is not None and pooling.by_engine(x):
            first, taps = self.found.get(node, (pooling, 1))
            self.found[node] = first, max(taps, math.prod(windows.kernel))


def _replace(traced: fx.GraphModule, node: fx.Node, pooling: AveragePool, taps: int) -> Average:
    """Puts the module in the place of a step."""
    if module_of(node) is pooling:
        return Average(str(node.target), taps)
    if node.op == "call_module":
        name = str(node.target)
    else:
        name = f"average_{node.name}"
        while hasattr(traced, name):
            name += "_"
    set_module(traced, name, pooling.eval())
    with traced.graph.inserting_before(node):
        new = traced.graph.call_module(name, (node.args[0],))
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)
    return Average(name if node.op == "call_module" else node.name, taps)


def average_of(node: fx.Node, shape: tuple[int, ...]) -> AveragePool | None:
    """Returns the average pooling that a step of a graph is; None for another step.

    Args:
        node: the step.
        shape: of its input.  # [N, C, H, W]
    """
    if len(shape) != 4:
        return None
    name, module = name_of(node), module_of(node)
    if isinstance(module, AveragePool):
        return module
    if module is not None and (module._forward_hooks or module._forward_pre_hooks):
        return None
    if module is not None and "forward" in module.__dict__:
        return None
    if name == "adaptive_avg_pool2d":
        size = _argument(node, module, 1, "output_size", None)
        sizes = (size, size) if isinstance(size, int) else size
        if not isinstance(sizes, list | tuple) or len(sizes) != 2:
            return None
        if not all(s is None or (isinstance(s, int) and s > 0) for s in sizes):
            return None
        return AveragePool(output_size=(sizes[0], sizes[1]))
    if name == "mean" and module is None:
        axes = _argument(node, None, 1, "dim", None)
        axes = sorted(a % 4 for a in axes) if _are_integers(axes) else None
        others = {key for key, value in node.kwargs.items() if value is not None}
        if axes != [2, 3] or not others <= {"dim", "keepdim"}:
            return None
        return AveragePool(keepdim=bool(_argument(node, None, 2, "keepdim", False)))
    if name == "avg_pool2d":
        window = _pair(_argument(node, module, 1, "kernel_size", None))
        given = _argument(node, module, 2, "stride", None)
        stride = _pair(given) if given else window
        padding = _pair(_argument(node, module, 3, "padding", 0))
        ceil = _argument(node, module, 4, "ceil_mode", False)
        everywhere = _argument(node, module, 5, "count_include_pad", True)
        divisor = _argument(node, module, 6, "divisor_override", None)
        if ceil or divisor is not None or window is None or stride is None or padding is None:
            return None
        return AveragePool(Pool(window, stride, padding), inside=not everywhere)
    return None


def _argument(node: fx.Node, module: nn.Module | None, place: int, name: str, usual: object) -> Any:
    if module is not None:
        return getattr(module, name, usual)
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, usual)


def _are_integers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if _are_integers(value) and len(value) in (1, 2):
        return (value[0], value[-1])
    return None
