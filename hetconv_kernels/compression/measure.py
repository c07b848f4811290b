# SPDX-License-Identifier: Apache-2.0
"""Measures a compressed network beside the dense one: the whole, and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import HetconvError
from ..graph.copying import copied, settle
from ..graph.hooks import calls_of
from ..graph.parts import same_around, traced_parts
from ..graph.worth import LeftPlain
from ..measure import stats, timing
from ..measure.profiling.reasons import backend_and_reason
from ..nn.base import SupportLayer
from .report import LayerReport

LAYOUTS = ("contiguous", "channels_last")
# What single precision may differ by over a network, relative to the largest output.
_TOLERANCE = 1e-3


class Whole(NamedTuple):
    """The time of the whole network; fields as in `CompressionReport`."""

    seconds: tuple[float, float]
    speedup: tuple[float, float, float]
    layouts: tuple[str, str]
    disturbed: tuple[str, ...] = ()


def for_inference(model: nn.Module) -> nn.Module:
    """Copies a network for inference: evaluation mode, layers with a Support frozen."""
    twin = copied(model).eval().requires_grad_(False)
    settle(twin)
    for module in twin.modules():
        if isinstance(module, SupportLayer):
            module.freeze()
    return twin


@torch.no_grad()
def difference(before: nn.Module, after: nn.Module, example: Tensor) -> float:
    """Compares outputs in evaluation mode, relative to the largest one.

    A detector chooses among boxes, and a rounding can make it choose another. Where the outputs
    differ and the network cannot be traced whole, its parts are compared, each on what it is called
    with, and what is around them, which has to give the same bit for bit.

    Raises:
        HetconvError: they differ by more than rounding explains.
    """
    one, two = for_inference(before), for_inference(after)
    worst = _apart(one(example), two(example))
    if not worst <= _TOLERANCE:
        worst = _apart_in_parts(one, two, example, worst)
    if not worst <= _TOLERANCE:
        raise HetconvError(
            f"The compressed network differs from its masked dense twin by {worst:.3g} of the "
            f"largest output, more than {_TOLERANCE}. Please report it; backend='vendor' works."
        )
    return worst


def _apart(wanted: Any, found: Any) -> float:
    """Returns the largest difference, relative to the largest value; infinite for other shapes."""
    ones, others = _outputs(wanted), _outputs(found)
    if [t.shape for t in ones] != [t.shape for t in others]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(ones, others, strict=True) if a.numel()]
    size = max((float(a.abs().max()) for a, _ in pairs), default=1.0) or 1.0
    apart = [float((a - b).abs().max()) / size for a, b in pairs]
    return float(torch.tensor([0.0, *apart], dtype=torch.float64).max())  # NaN if one is


def _apart_in_parts(one: nn.Module, two: nn.Module, example: Tensor, whole: float) -> float:
    """Compares two networks part by part; that of the whole where it can be traced."""
    found = traced_parts(one, (example,))
    if found.whole is not None:
        return whole
    # Layers by themselves, outside of all parts, are parts here.
    names = [part.name for part in found.parts]
    names += [n for n, m in one.named_modules() if _is_layer(m) and found.part_of(n) is None]
    calls = calls_of({name: _at(one, name) for name in names}, lambda: one(example))
    apart = [
        _apart(
            _at(one, name)(*call.arguments, **call.keywords),
            _at(two, name)(*call.arguments, **call.keywords),
        )
        for name, seen in calls.items()
        for call in seen
    ]
    same = same_around(one, two, [name for name in names if calls[name]], (example,))
    return float(torch.tensor(apart or [whole]).max()) if same else whole


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear | SupportLayer)


def time_networks(
    before: nn.Module, after: nn.Module, example: Tensor, max_seconds: float, rounds: int = 20
) -> Whole:
    """Times both networks in both memory formats, in turns; the fastest of each count."""
    variants: dict[str, Callable[[], Any]] = {}
    for side, model in (("before", before), ("after", after)):
        for layout in layouts_of(example):
            variants[f"{side} {layout}"] = _call(for_inference(model), example, layout)
    with torch.inference_mode():
        times = timing.interleaved(
            variants, rounds=rounds, warmup=1, max_seconds=max_seconds, device=example.device,
            retake=1,
        )  # fmt: skip
    best = [times.fastest([n for n in variants if n.startswith(s)]) for s in ("before", "after")]
    ratio = times.ratio(*best)
    return Whole(
        (times.median(best[0]), times.median(best[1])),
        (ratio.value, ratio.low, ratio.high),
        (best[0].split()[1], best[1].split()[1]),
        times.disturbed,
    )


def layouts_of(example: Tensor) -> tuple[str, ...]:
    """Lists the memory formats that an input can have."""
    return LAYOUTS if example.dim() == 4 else LAYOUTS[:1]


def layer_reports(
    before: nn.Module,
    after: nn.Module,
    example: Tensor,
    rows: tuple[list[stats.LayerMacs], list[stats.LayerMacs]],
    notes: dict[str, str],
    layouts: tuple[str, str] | None,
    max_seconds: float,
    plain: Sequence[LeftPlain] = (),
) -> tuple[LayerReport, ...]:
    """Reports every layer with weights; times those that changed when ``layouts`` is given.

    Args:
        before: the dense network.
        after: the compressed one.
        example: an input.
        rows: the work of the layers of both, see `stats.layer_macs`.
        notes: why layers stayed dense, by name.
        layouts: the memory formats in which the networks were fastest; None times nothing.
        max_seconds: about how long all layers together may be timed.
        plain: layers of ``after`` that were left plain.
    """
    zeros = {left.name: left for left in plain}
    notes = notes | {left.name: f"left plain: {left.reason}" for left in plain}
    old = {row.name: row for row in rows[0] if row.dense}
    modules = dict(after.named_modules())
    gone = [name for name in old if name not in modules]
    changed = [
        name
        for name in old
        if name not in gone
        and (
            type(modules[name]) is not type(_at(before, name))
            or modules[name].weight.shape != _at(before, name).weight.shape
        )
    ]

    def live_of(name: str) -> int:
        return zeros[name].live if name in zeros else _live(modules[name])

    measured: dict[str, Any] = {}
    if layouts is not None and changed:
        measured = _time_layers(before, after, example, changed, layouts, max_seconds)
    reports = []
    for name, row in old.items():
        # A layer may do its work through parts of itself, as FrequencyConv2d does.
        parts = [r for r in rows[1] if r.name == name or r.name.startswith(f"{name}.")]
        seconds, speedup, backend = measured.get(name, (None, None, "torch"))
        reports.append(
            LayerReport(
                name,
                "gone" if name in gone else type(modules[name]).__name__,
                (row.live, 0 if name in gone else live_of(name)),
                (row.macs, sum(r.macs for r in parts)),
                seconds,
                speedup,
                backend,
                ""
                if (name in changed and name not in zeros) or name in gone
                else notes.get(name, "the method dropped nothing here"),
            )
        )
    return tuple(reports)


def _time_layers(
    before: nn.Module,
    after: nn.Module,
    example: Tensor,
    names: list[str],
    layouts: tuple[str, str],
    max_seconds: float,
) -> dict[str, Any]:
    sides = []
    for model, layout in zip((before, after), layouts, strict=True):
        frozen = for_inference(model)
        if layout == "channels_last":
            frozen = frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        sides.append((frozen, _inputs(frozen, names, in_layout(example, layout))))
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name in names:
            (one, inputs), (two, others) = sides
            if name not in inputs or name not in others:
                continue
            layer = _at(two, name)
            times = timing.interleaved(
                {
                    "before": _bound(_at(one, name), inputs[name]),
                    "after": _bound(layer, others[name]),
                },
                rounds=10,
                warmup=1,
                max_seconds=max_seconds / len(names),
                device=example.device,
            )
            ratio = times.speedup("after")
            seconds = (times.median("before"), times.median("after"))
            speedup = (ratio.value, ratio.low, ratio.high)
            backend, _ = backend_and_reason(layer, (others[name],))
            found[name] = seconds, speedup, backend
    return found


def _inputs(model: nn.Module, names: list[str], example: Tensor) -> dict[str, Tensor]:
    """Runs a network once and notes the last input of each named layer."""
    with torch.no_grad():
        calls = calls_of({name: _at(model, name) for name in names}, lambda: model(example))
    return {name: seen[-1].arguments[0] for name, seen in calls.items() if seen}


def _call(model: nn.Module, example: Tensor, layout: str) -> Callable[[], Any]:
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _bound(model, in_layout(example, layout))


def in_layout(example: Tensor, layout: str) -> Tensor:
    """Returns an input in a memory format."""
    return (
        example.contiguous(memory_format=torch.channels_last)
        if layout == "channels_last"
        else example.contiguous()
    )


def _bound(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    return lambda: model(x)


def _live(layer: nn.Module) -> int:
    """Counts the weights of a layer, or of the parts that it is made of."""
    whole = stats.live_weights(layer)
    return sum(map(_live, layer.children())) if whole is None else whole


def _at(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _outputs(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [t for value in values for t in _outputs(value)]
