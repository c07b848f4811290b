# SPDX-License-Identifier: Apache-2.0
"""engine_only: a network whose steps are all the engine's, as far as that has them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..errors import InputTypeError, TraceError, mismatch
from ..nn import FrequencyConv2d, SupportConv2d, SupportLinear, fuse
from ..nn.base import ForcedBackend, SupportLayer
from ..support import Support
from .average import deepest, native_averages
from .copying import copied
from .formats import into_channels_last
from .layout import set_module
from .names import module_of, name_of
from .narrow import Narrow
from .optimize import optimize
from .planned import PlannedNetwork, planned


class EngineOnly(NamedTuple):
    """What `engine_only` made.

    Attributes:
        network: the network.
        changed: what became another step, in words.
        depth: of the deepest average, in pixels.
    """

    network: PlannedNetwork
    changed: tuple[str, ...]
    depth: int


def engine_only(model: nn.Module, inputs: tuple[Tensor, ...]) -> EngineOnly:
    """Copies a network with its steps made the engine's own.

    Layers are forced to it, whatever `auto` or the user chose. PyTorch's own linear layers and
    convolutions become this package's, with a dense Support; average pooling becomes an
    `AveragePool`; and images are brought into channels_last as they come in.

    Args:
        model: the network, in evaluation mode; one that is not optimised yet is, with all its
            Supports.
        inputs: of the forward.

    Raises:
        TraceError: it cannot be traced as a whole.
        VerificationError: `optimize` changes what it computes.
    """
    dtype: torch.dtype | None = None
    if isinstance(model, Narrow):
        dtype, model = model.dtype, model.body
    if not isinstance(model, PlannedNetwork):
        report = optimize(model, inputs, leave_plain=False)
        model = report.model
        if not isinstance(model, PlannedNetwork):
            reasons = "; ".join(left.reason for left in report.untraced[:3])
            raise TraceError(
                mismatch(
                    "network to be a program",
                    f"one that cannot be traced as a whole ({reasons})",
                    "a network whose graph torch.fx or torch.export finds",
                    "Save the parts that can be traced as programs of their own.",
                )
            )
    traced = copied(model)
    if dtype is not None:
        _cast_ends(traced, dtype, inputs)
    _remove_idle(traced, inputs)
    averages = native_averages(traced, [inputs], "cpu")
    changed = _layers(traced)
    changed += [f"{average.name} is an average pooling of the engine" for average in averages]
    changed += [
        f"{name} is brought into channels_last" for name in into_channels_last(traced, inputs)
    ]
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return EngineOnly(planned(traced.eval()), tuple(changed), deepest(averages))


class _Shapes(fx.Interpreter):
    """Notes the shapes of all values."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = tuple(value.shape)
        return value


def _layers(traced: fx.GraphModule) -> list[str]:
    """Makes the layers this package's, frozen, and free of engines that were forced on them."""
    changed: list[str] = []
    for node in list(traced.graph.nodes):
        module, name = module_of(node), str(node.target)
        new: nn.Module | None = None
        if isinstance(module, FrequencyConv2d):
            module = module.to_conv2d()
        if type(module) is nn.Linear:
            support = Support.dense(module.in_features, module.out_features, 1)
            new = SupportLinear.from_linear(module, support).eval().freeze()
        elif type(module) is nn.Conv2d or isinstance(module, SupportConv2d):
            if module.padding_mode == "zeros":
                new = fuse(module).eval()
        elif isinstance(module, SupportLayer) and not module.frozen:
            new = module.freeze()
        if new is not None:
            set_module(traced, name, new)
            if type(module) in (nn.Linear, nn.Conv2d):
                changed.append(f"{name} is a layer of the engine")
            module = new
        if isinstance(module, ForcedBackend):
            module.backend = "cpu"
    return changed


@torch.no_grad()
def _remove_idle(traced: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    """Takes out average pooling to the size that an image has already."""
    shapes = _Shapes(traced)
    shapes.run(*inputs)
    for node in list(traced.graph.nodes):
        source = node.args[0] if node.args else None
        same = source in shapes.found and shapes.found.get(node) == shapes.found[source]
        if same and name_of(node) == "adaptive_avg_pool2d":
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)


def _cast_ends(traced: fx.GraphModule, dtype: torch.dtype, inputs: tuple[Tensor, ...]) -> None:
    """Says in the graph what `Narrow` does around it."""
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    given = [x.dtype for x in inputs if x.is_floating_point()]
    for node, x in zip(placeholders, inputs, strict=True):
        if x.is_floating_point() and x.dtype != dtype:
            with traced.graph.inserting_after(placeholders[-1]):
                new = traced.graph.call_method("to", (node, dtype))
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    (output,) = (n for n in traced.graph.nodes if n.op == "output")
    if given and given[0] != dtype:

        def widened(node: fx.Node) -> fx.Node:
            with traced.graph.inserting_before(output):
                return traced.graph.call_method("to", (node, given[0]))

        output.args = fx.map_arg(output.args, widened)


def check_inputs(inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Refuses inputs that a program cannot be given.

    Raises:
        InputTypeError: one is no tensor on the CPU.
    """
    for number, x in enumerate(inputs):
        if not isinstance(x, Tensor) or x.device.type != "cpu" or x.layout != torch.strided:
            received = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise InputTypeError(
                mismatch(
                    f"example[{number}]",
                    received,
                    "a tensor on the CPU",
                    "Fix other arguments in a network of your own around this one.",
                )
            )
    return inputs
