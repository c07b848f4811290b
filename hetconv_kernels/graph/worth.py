# SPDX-License-Identifier: Apache-2.0
"""worth: layers with a Support for which no engine pays become plain layers with zeros again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..backends import choose, predict
from ..backends.dense_cost import outside_program, plain_seconds
from ..backends.vendor import Vendor
from ..nn import FrequencyConv2d, SupportConv2d, SupportLinear
from ..nn.base import SupportLayer
from .hooks import calls_of, without_values
from .layout import set_module

SparseLayer = SupportConv2d | SupportLinear | FrequencyConv2d


class LeftPlain(NamedTuple):
    """A layer that is PyTorch's own, since no Support pays there.

    Attributes:
        name: of the layer.
        reason: completes "left plain: …".
        live: weights that are no zeros by its Support; of a layer whose kernels are sparse in the
            frequency domain, its coefficients.
    """

    name: str
    reason: str
    live: int


@torch.no_grad()
def leave_plain(
    model: nn.Module, inputs: Sequence[tuple[Any, ...]], program: bool = False
) -> tuple[LeftPlain, ...]:
    """Replaces layers in place by the ``nn.Conv2d`` or ``nn.Linear`` that they came from.

    A layer goes where its plain twin, zeros in its weight, is predicted to take no longer than the
    frozen layer with whatever engine `auto` picks, what Python takes around the call included, on
    all inputs. Left as they are: layers with an engine or a path forced on them, with hooks or a
    computed weight, layers that share a parameter or stand at several places, and all where no
    prediction rests on a measurement of such hardware.

    Args:
        model: a network in which layers have a Support, in evaluation mode.
        inputs: what it is called with, once each.
        program: whether it will run as a native program: there a layer of the engine takes no
            Python, and a plain one is a call between two pieces.
    """
    if backends.forced_code():
        return ()
    candidates = _candidates(model)
    if not candidates:
        return ()
    seen = calls_of(candidates, lambda: [model(*each) for each in inputs], without_values)
    left = []
    for name, noted in seen.items():
        layer: Any = candidates[name]
        if not noted or any(call.keywords for call in noted):
            continue
        calls = [call.arguments[0] for call in noted]
        answers = [_reason(layer, x, program) for x in calls]
        if None in answers:
            continue
        plain: Any = layer.to_linear() if isinstance(layer, SupportLinear) else layer.to_conv2d()
        if any(x.dim() == 4 and not x.is_contiguous() for x in calls):
            plain = plain.to(memory_format=torch.channels_last)
        support = _holder(layer).support
        left.append(LeftPlain(name, answers[-1] or "", support.live))
        set_module(model, name, plain)
    return tuple(left)


def _holder(layer: SparseLayer) -> SupportLayer:
    """Returns the layer that holds the weights and their Support."""
    return layer.mix if isinstance(layer, FrequencyConv2d) else layer


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the layers that may be replaced, by name."""
    places: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for owned in (module, *module.parameters(recurse=False)):
            places[id(owned)] = places.get(id(owned), 0) + 1
    parents = {id(c): m for m in model.modules() for c in m.children()}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parent = parents.get(id(module))
        if (
            not isinstance(module, SparseLayer)
            or parent is None
            or isinstance(parent, FrequencyConv2d)
        ):
            continue
        holder = _holder(module)
        if (
            module.backend is None
            and holder.backend is None
            and getattr(module, "path", "auto") == "auto"
            and holder._owns_weight
            and not any(m._forward_hooks or m._forward_pre_hooks for m in (module, holder))
            and all(places[id(o)] == 1 for o in (module, holder, *module.parameters()))
        ):
            found[name] = module
    return found


def _reason(layer: SparseLayer, x: Tensor, program: bool) -> str | None:
    """Says why the plain layer is as fast on such an input; None where it is not."""
    if x.dim() == 3 and not isinstance(layer, SupportLinear):
        return None
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return None
    problem = layer.problem(x, frozen=True)
    if not Vendor().measured(problem):
        return None
    if isinstance(layer, FrequencyConv2d):
        there, back = layer.predicted(x, frozen=True)
        ours, name = min((there, "way of the frequencies"), (back, "the dense kernels"))
    else:
        engine: Any = choose(problem, 0).backend
        ours, name = predict(engine, problem), engine.name
    plain = plain_seconds(problem)
    if program and name == "cpu":
        ours = engine.estimate_in_program(problem)
        plain = outside_program(problem, plain)
    if ours < plain:
        return None
    return (
        f"on {list(x.shape)} no Support pays; predicted are {plain * 1e6:.1f} µs with zeros and "
        f"{ours * 1e6:.1f} µs by {name}"
    )
