# SPDX-License-Identifier: Apache-2.0
"""Measures a network layer by layer while it runs, and its dense twins when asked."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ... import export
from ...errors import ArgumentError, InputTypeError, mismatch
from ...graph.hooks import hooked
from ...graph.trace import check_plain
from ...integers import is_integer
from ...nn import FrequencyConv2d, FusedConv2d
from ...nn.base import SupportLayer
from ...nn.quantized_steps import Quantize, QuantizedStep
from ...packing import PackEvent, watched_packings
from .. import roofline, stats, timing
from ..disturbance import Watch
from ..explain import _same_buffers
from ..roofline import Roofs
from ..timing import check_seconds
from .compiled import compiled_rounds, original
from .reasons import backend_and_reason, predicted
from .record import LayerProfile, Profile

_WARM_UP = 2
_LEAST_ROUNDS = 5


@dataclass
class _Seen:
    """What is noted of a layer while the network runs."""

    layer: nn.Module
    arguments: tuple[Any, ...] = ()
    calls: int = 0
    macs: int = 0
    dense_macs: int = 0
    bytes: int = 0
    dtype: str = ""
    backend: str = ""
    predicted: float | None = None
    why: str = ""
    started: float = 0.0
    round: float = 0.0
    packed: float = 0.0
    samples: list[float] = field(default_factory=list)


def profile(
    model: nn.Module,
    example: Tensor,
    *,
    dense: bool = False,
    rounds: int = 20,
    max_seconds: float = 10.0,
    roofs: Mapping[str, Roofs] | None = None,
) -> Profile:
    """Profiles the forward pass of a network or of one layer, as it is: mode, backend, layout.

    The layers are timed where they are, in the running network, which has run before; the clock
    waits for the device at both ends of each. Nothing of the network changes. Of a network that
    ``torch.compile`` gave, layers are told apart by the events of torch.profiler; one that was
    compiled together with others has no time of its own, and its reason says so.

    Args:
        model: a network, compiled or not, or a layer.
        example: an input on the network's device.  # [N, C, H, W], or what it takes
        dense: whether to time the dense layer in the place of each layer with a Support, in turns
            with it, in the faster memory format.
        rounds: passes that count; at least 5.
        max_seconds: lowers the rounds so that about this time is spent on them, and again on dense.
        roofs: ceilings by dtype, such as ``{"float32": Roofs(...)}``; measured when not given,
            which takes seconds.

    Returns:
        The profile; print it.

    Raises:
        InputTypeError: no plain nn.Module, or the example is no tensor.
        ArgumentError: fewer than 5 rounds, no time for them, the network cannot run on the
            example, or has no layer with weights.
    """
    compiled, inner = model, original(model)
    model = model if inner is None else inner
    check_plain(model)
    if not isinstance(example, Tensor):
        raise InputTypeError(mismatch("example", type(example).__name__, "a tensor"))
    if not is_integer(rounds) or rounds < _LEAST_ROUNDS:
        raise ArgumentError(mismatch("rounds", rounds, f"at least {_LEAST_ROUNDS}"))
    check_seconds("max_seconds", max_seconds)
    with torch.no_grad(), _same_buffers(model):
        layers = _first_pass(model, example)
        _count(model, example, layers)
        if inner is None:
            whole, disturbed = _rounds(model, example, layers, rounds, max_seconds)
        else:
            whole, disturbed = compiled_rounds(
                compiled, model, example, layers, rounds, max_seconds
            )
        _pack_times(model, example, layers)
        ceilings = _roofs(layers, example.device, roofs)
        twins, more = _dense(layers, example, rounds, max_seconds) if dense else ({}, ())
        disturbed = disturbed or more
    done = {name: statistics.median(seen.samples) for name, seen in layers.items()}
    layout = "channels_last" if _is_channels_last(example) else "contiguous"
    dtype = str(example.dtype).removeprefix("torch.")
    return Profile(
        model=type(model).__name__ + ("" if inner is None else ", compiled"),
        input=f"{tuple(example.shape)}, {dtype}, {example.device}, {layout}",
        seconds=whole,
        rest_seconds=max(0.0, whole - sum(done.values())),
        layers=tuple(
            LayerProfile(
                name=name,
                kind=type(seen.layer).__name__,
                calls=seen.calls,
                seconds=done[name],
                share=done[name] / whole,
                macs=seen.macs,
                dense_macs=seen.dense_macs,
                bytes=seen.bytes,
                percent_of_roof=_percent(ceilings[seen.dtype], seen, done[name]),
                backend=seen.backend,
                why=seen.why,
                dense_seconds=twins[name][0] if name in twins else None,
                speedup=twins[name][1] if name in twins else None,
                packing_seconds=seen.packed,
                predicted_seconds=None if seen.predicted is None else seen.predicted * seen.calls,
            )
            for name, seen in layers.items()
        ),
        roofs={name: (r.macs_per_s, r.bytes_per_s) for name, r in ceilings.items()},
        threads=torch.get_num_threads(),
        disturbed=disturbed,
    )  # fmt: skip


def _percent(roofs: Roofs, seen: _Seen, seconds: float) -> float:
    """Returns the least time for the work of a layer over its time, in per cent, or 0."""
    return 100 * roofs.floor(seen.macs, seen.bytes) / seconds if seconds else 0.0


def backends_of(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Names what runs each layer with weights, by the layer's name; nothing is timed."""
    with torch.no_grad(), _same_buffers(model):
        return {name: seen.backend for name, seen in _first_pass(model, example).items()}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the layers with weights, outermost first, and the steps in 8 bits between them."""
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        counts = isinstance(module, FrequencyConv2d | QuantizedStep)
        counts = counts or stats.live_weights(module) is not None
        if counts and id(module) not in inside:
            found[name] = module
            inside.update(map(id, module.modules()))
    return found


def _first_pass(model: nn.Module, example: Tensor) -> dict[str, _Seen]:
    """Runs the network once and notes each layer that is called, in the order of the calls."""
    layers = {name: _Seen(layer) for name, layer in layers_of(model).items()}
    called: dict[str, _Seen] = {}
    names = {id(seen): name for name, seen in layers.items()}

    def enter(seen: _Seen, arguments: tuple[Any, ...]) -> None:
        called.setdefault(names[id(seen)], seen)
        _note(seen, arguments)

    with _hooked(layers, enter, _note_output), stats.fitting(example):
        model(example)
    if not called:
        raise ArgumentError(
            mismatch("model", type(model).__name__, "a network that calls layers with weights")
        )
    return called


def _hooked(
    layers: Mapping[str, _Seen],
    before: Callable[[_Seen, tuple[Any, ...]], None],
    after: Callable[[_Seen, tuple[Any, ...], Any], None],
) -> AbstractContextManager[None]:
    return hooked(
        {name: seen.layer for name, seen in layers.items()},
        lambda name, call: before(layers[name], call.arguments),
        lambda name, call, output: after(layers[name], call.arguments, output),
    )


def _note(seen: _Seen, arguments: tuple[Any, ...]) -> None:
    if not seen.calls:
        # A later operation may work in place on what it gets.
        seen.arguments = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
        seen.backend, seen.why = backend_and_reason(seen.layer, arguments)
        seen.predicted = predicted(seen.layer, arguments)
        seen.dtype = str(_computed(seen.layer, arguments[0])).removeprefix("torch.")
    seen.calls += 1


def _computed(layer: nn.Module, x: Tensor) -> torch.dtype:
    """Returns the dtype of which a layer has the ceilings: a step's is that of its integers."""
    if isinstance(layer, Quantize):
        return layer.y.dtype
    return x.dtype


def _note_output(seen: _Seen, arguments: tuple[Any, ...], output: Tensor) -> None:
    tensors = [a for a in (*arguments, output) if isinstance(a, Tensor)]
    seen.bytes += sum(t.numel() * t.element_size() for t in tensors)
    seen.bytes += _live(seen.layer) * arguments[0].element_size()
    if isinstance(seen.layer, FrequencyConv2d):
        pixels = output.numel() // seen.layer.out_channels
        seen.dense_macs += pixels * seen.layer.to_conv2d().weight.numel()


def _live(layer: nn.Module) -> int:
    """Counts the weights of a layer, or of the parts that it is made of."""
    whole = stats.live_weights(layer)
    return sum(map(_live, layer.children())) if whole is None else whole


def _count(model: nn.Module, example: Tensor, layers: Mapping[str, _Seen]) -> None:
    """Adds the multiply-accumulates of each layer, those of its parts with it."""
    for row in stats.layer_macs(model, example):
        for name, seen in layers.items():
            if row.name == name or (not name and seen.layer is model):
                seen.macs += row.macs
                seen.dense_macs += row.positions * row.dense
            elif row.name.startswith(f"{name}."):
                seen.macs += row.macs


def _rounds(
    model: nn.Module,
    example: Tensor,
    layers: Mapping[str, _Seen],
    rounds: int,
    max_seconds: float,
) -> tuple[float, tuple[str, ...]]:
    """Runs the network and keeps a sample of each layer a round.

    Returns the whole's median, and what disturbed it.
    """
    clock = timing.clock(example.device)

    def start(seen: _Seen, _: Any) -> None:
        seen.started = clock()

    def stop(seen: _Seen, _: Any, __: Any) -> None:
        seen.round += clock() - seen.started

    if len(layers) == 1 and next(iter(layers.values())).layer is model:
        # One layer alone may be shorter than the clock can tell: many calls make a sample.
        (seen,) = layers.values()
        call = {"it": lambda: model(example)}
        times = timing.interleaved(
            call, rounds=rounds, max_seconds=max_seconds, device=example.device
        )
        seen.samples = list(times.samples["it"])
        return times.median("it"), times.disturbed
    whole: list[float] = []
    with _hooked(layers, start, stop):
        for _ in range(_WARM_UP):
            model(example)
        watch = Watch(example.device)
        began = clock()
        while len(whole) < rounds:
            watch.tick()
            for seen in layers.values():
                seen.round = 0.0
            before = clock()
            model(example)
            whole.append(clock() - before)
            for seen in layers.values():
                seen.samples.append(seen.round)
            if clock() - began > max_seconds and len(whole) >= _LEAST_ROUNDS:
                break
    return statistics.median(whole), watch.finish().reasons


def _pack_times(model: nn.Module, example: Tensor, layers: Mapping[str, _Seen]) -> None:
    """Notes what each layer spends on packing weights in a steady pass: the median of three."""
    passes: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(3):
        with watched_packings() as packed:

            def start(seen: _Seen, _: Any, packed: list[PackEvent] = packed) -> None:
                seen.started = sum(one.seconds for one in packed)

            def stop(seen: _Seen, _: Any, __: Any, packed: list[PackEvent] = packed) -> None:
                seen.packed += sum(one.seconds for one in packed) - seen.started

            for seen in layers.values():
                seen.packed = 0.0
            with _hooked(layers, start, stop):
                model(example)
        for name, seen in layers.items():
            passes[name].append(seen.packed)
    for name, seen in layers.items():
        seen.packed = statistics.median(passes[name])


def _roofs(
    layers: Mapping[str, _Seen], device: torch.device, given: Mapping[str, Roofs] | None
) -> dict[str, Roofs]:
    found = dict(given or {})
    for dtype in dict.fromkeys(seen.dtype for seen in layers.values()):
        if dtype not in found:
            found[dtype] = roofline.measure_roofs(device, getattr(torch, dtype))
    return found


def _dense(
    layers: Mapping[str, _Seen], example: Tensor, rounds: int, max_seconds: float
) -> tuple[dict[str, tuple[float, tuple[float, float, float]]], tuple[str, ...]]:
    """Times each layer with a Support in turns with its dense twin, in both memory formats.

    Returns what was found by the layer's name, and what disturbed the first that was disturbed.
    """
    found = {}
    disturbed: tuple[str, ...] = ()
    ours = {
        name: seen
        for name, seen in layers.items()
        if isinstance(seen.layer, SupportLayer | FusedConv2d | FrequencyConv2d)
    }
    for name, seen in ours.items():
        variants: dict[str, Any] = {"ours": _call(seen.layer, seen.arguments)}
        for form in (torch.contiguous_format, torch.channels_last):
            twin: Any = dense_twin(seen.layer)
            images = any(isinstance(a, Tensor) and a.dim() == 4 for a in seen.arguments)
            if not images and form == torch.channels_last:
                continue
            arguments = tuple(
                a.contiguous(memory_format=form) if isinstance(a, Tensor) and a.dim() == 4 else a
                for a in seen.arguments
            )
            variants[f"dense {form}"] = _call(twin.to(memory_format=form), arguments)
        times = timing.interleaved(
            variants, rounds=rounds, max_seconds=max_seconds / len(ours), device=example.device,
            retake=1,
        )  # fmt: skip
        disturbed = disturbed or times.disturbed
        rival = times.fastest([n for n in variants if n != "ours"])
        ratio = times.speedup("ours", over=rival)
        found[name] = (times.median(rival), (ratio.value, ratio.low, ratio.high))
    return found, disturbed


def dense_twin(layer: nn.Module) -> nn.Module:
    """Returns the layer with every weight, dead ones zero, as PyTorch alone computes it."""
    if isinstance(layer, FrequencyConv2d):
        return layer.to_conv2d()
    twin: Any = export.plain(layer)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            whole = _ungrouped(module)
            if not name:
                return whole
            parent, _, key = name.rpartition(".")
            setattr(twin.get_submodule(parent), key, whole)
    return twin


def _ungrouped(conv: nn.Conv2d) -> nn.Conv2d:
    from ...nn.conv import expanded_weight

    weight, _ = expanded_weight(conv)
    whole = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # type: ignore[arg-type]
        conv.dilation, 1, conv.bias is not None, conv.padding_mode, weight.device, weight.dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.no_grad():
        whole.weight.copy_(weight)
        if conv.bias is not None and whole.bias is not None:
            whole.bias.copy_(conv.bias)
    return whole.requires_grad_(False)


def _call(layer: Any, arguments: tuple[Any, ...]) -> Any:
    # forward itself, without the hooks that others may have put on the layer
    return lambda: layer.forward(*arguments)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
