# SPDX-License-Identifier: Apache-2.0
"""A network under torch.compile, whose layers are no calls any more: told apart by what they run.

A compiled network runs no hooks. But the operators of this package and PyTorch's own convolutions
and matrix products are events of torch.profiler there too. The k-th event of a name and shape is of
the k-th layer that runs such a thing in the network as it was before.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ... import ranges
from .. import timing

_PASSES = 5
_WARM_UP = 3
_CONVOLUTIONS = (
    "aten::convolution", "aten::mkldnn_convolution", "mkldnn::_convolution_pointwise",
    "aten::cudnn_convolution", "mkldnn::_convolution_pointwise.binary",
)  # fmt: skip
_PRODUCTS = ("aten::addmm", "aten::mm", "mkldnn::_linear_pointwise", "mkl::_mkl_linear")
_LAYER = "hetconv layer "
# Why a layer has no time of its own.
UNSEEN = "compiled together with others: its time is in 'everything else'"


def original(model: Any) -> nn.Module | None:
    """Returns the network inside of one that ``torch.compile`` gave; None of any other."""
    dynamo = sys.modules.get("torch._dynamo")  # not imported as long as nothing is compiled
    if dynamo is None or not isinstance(model, dynamo.OptimizedModule):
        return None
    inner: nn.Module = model._orig_mod
    return inner


def compiled_rounds(
    model: nn.Module,
    plain: nn.Module,
    example: Tensor,
    layers: Mapping[str, Any],
    rounds: int,
    max_seconds: float,
) -> tuple[float, tuple[str, ...]]:
    """Times a compiled network as a whole, and its layers by the events of torch.profiler.

    Args:
        model: compiled.
        plain: the network inside of it.
        example: an input.
        layers: by name, with ``layer``, ``samples`` and ``why``, which are filled.
        rounds: of the whole.
        max_seconds: that these may take.

    Returns:
        The median of the whole, in seconds, and what disturbed it.
    """
    for _ in range(_WARM_UP):
        model(example)
    times = timing.interleaved(
        {"it": lambda: model(example)}, rounds=rounds, max_seconds=max_seconds,
        device=example.device,
    )  # fmt: skip
    with ranges.enabled(nvtx=False):
        owners = _owners(plain, example, {name: seen.layer for name, seen in layers.items()})
        found = [_by_layer(model, example, owners) for _ in range(_PASSES)]
    for name, seen in layers.items():
        samples = [one[name] for one in found if name in one]
        seen.samples = samples if len(samples) == _PASSES else [0.0]
        if len(samples) < _PASSES:
            seen.backend, seen.why = "compiled", UNSEEN
    return times.median("it"), times.disturbed


def _owners(
    plain: nn.Module, example: Tensor, layers: Mapping[str, nn.Module]
) -> dict[str, list[str]]:
    """Lists by kind of event which layers have such an event, in their order."""
    handles, opened = [], list[record_function]()
    for name, layer in layers.items():

        def enter(*_: object, name: str = name) -> None:
            opened.append(record_function(_LAYER + name))
            opened[-1].__enter__()

        def leave(*_: object) -> None:
            opened.pop().__exit__(None, None, None)

        handles += [
            layer.register_forward_pre_hook(enter),
            layer.register_forward_hook(leave, always_call=True),
        ]
    try:
        events = _events(plain, example)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, list[str]] = defaultdict(list)
    for event in events:
        kind = _kind(event)
        if kind is None:
            continue
        above = event.cpu_parent
        while above is not None and not above.name.startswith(_LAYER):
            above = above.cpu_parent
        if above is not None:
            found[kind].append(above.name.removeprefix(_LAYER))
    return found


def _by_layer(
    model: nn.Module, example: Tensor, owners: Mapping[str, list[str]]
) -> dict[str, float]:
    """Runs a compiled network once; returns the seconds of each layer that is told apart."""
    met: dict[str, int] = defaultdict(int)
    found: dict[str, float] = defaultdict(float)
    for event in _events(model, example):
        kind = _kind(event)
        if kind is None:
            continue
        number, met[kind] = met[kind], met[kind] + 1
        names = owners.get(kind, [])
        if number < len(names):
            found[names[number]] += event.time_range.elapsed_us() * 1e-6
    return found


def _events(model: nn.Module, example: Tensor) -> list[Any]:
    """Runs a network once under torch.profiler; returns its events in the order of their starts."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if example.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        model(example)
    events: Any = profiler.events()
    return sorted(events, key=lambda event: event.time_range.start)


def _kind(event: Any) -> str | None:
    """Names what an event runs; None where it runs no layer, or is a part of one that does."""
    above = event.cpu_parent
    while above is not None:
        if _named(above) is not None:
            return None
        above = above.cpu_parent
    return _named(event)


def _named(event: Any) -> str | None:
    if event.name.startswith("hetconv."):
        return str(event.name)
    shapes = [tuple(shape) for shape in event.input_shapes or ()]
    if event.name in _CONVOLUTIONS:
        return f"convolution {shapes[:2]}"
    if event.name in _PRODUCTS:
        matrices = [shape for shape in shapes if len(shape) == 2][:2]
        if event.name.startswith("mk"):  # the weight as nn.Linear has it
            matrices[1:] = [shape[::-1] for shape in matrices[1:]]
        return f"product {matrices}"
    return None
