# SPDX-License-Identifier: Apache-2.0
"""Why a layer is or is not fast: `explain`, and `warmup` before a capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backends import NAMES, available_backends, choose, get_backend
from .disturbance import far_above
from .disturbance import shown as said
from .errors import ArgumentError, InputTypeError, mismatch
from .nn.base import SupportLayer
from .nn.conv import SupportConv2d
from .nn.fused import FusedConv2d
from .nn.linear import SupportLinear
from .nn.quantized_layer import QuantizedLayer
from .packing import watched

__all__ = ["Candidate", "Explanation", "explain", "warmup"]


@dataclass(frozen=True)
class Candidate:
    """What one backend says of a layer's forward pass.

    Attributes:
        name: of the backend.
        reasons: why it cannot run it; empty when it can.
        efficiency: useful over executed multiply-accumulates; None when it cannot run.
        predicted_s: predicted time of one call, in seconds.
        measured_s: median measured time of one call, in seconds; None when not measured.
        notes: what else the backend says of how it would run it, in sentences.
        packing_s: what of a steady call is spent on packing the weight, in seconds: 0 where the
            packed form is kept, or none is needed; None when not measured.
    """

    name: str
    reasons: tuple[str, ...]
    efficiency: float | None
    predicted_s: float | None
    measured_s: float | None
    notes: tuple[str, ...] = ()
    packing_s: float | None = None


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; ``str()`` of it is a table.

    Attributes:
        layer: the layer's own description.
        input: shape, dtype, device and memory format of the input.
        groups: distinct mask rows, as (filters, channels read) of the largest ones first.
        group_count: how many there are.
        density: live over dense weights.
        macs: live multiply-accumulates of the call.
        dense_macs: those of the dense convolution.
        chosen: the backend that runs.
        forced: whether it was forced rather than chosen.
        candidates: every backend that is built here.
        frozen: whether the layer is frozen, so that packed forms of its weight are kept.
        disturbed: what shows that other work spoilt the measured times; empty when nothing does.
    """

    layer: str
    input: str
    groups: tuple[tuple[int, int], ...]
    group_count: int
    density: float
    macs: int
    dense_macs: int
    chosen: str
    forced: bool
    candidates: tuple[Candidate, ...]
    disturbed: tuple[str, ...] = ()
    frozen: bool = False

    @property
    def packing_s(self) -> float | None:
        """What the chosen backend spends on packing in a steady call; None if not measured."""
        return next((c.packing_s for c in self.candidates if c.name == self.chosen), None)

    @property
    def faster_than_dense(self) -> bool | None:
        """Whether the chosen backend was measured faster than `vendor`.

        None where it was not measured, or the measurement was disturbed.
        """
        times = {c.name: c.measured_s for c in self.candidates}
        chosen, vendor = times.get(self.chosen), times.get("vendor")
        if chosen is None or vendor is None or self.disturbed:
            return None
        return self.chosen != "vendor" and chosen < vendor

    def to_dict(self) -> dict[str, Any]:
        """Returns the explanation as JSON-serialisable data."""
        return asdict(self)

    def __str__(self) -> str:
        shown = ", ".join(f"{f} filters x {c} channels" for f, c in self.groups)
        more = self.group_count - len(self.groups)
        lines = [
            self.layer,
            f"input    {self.input}",
            f"groups   {self.group_count}: {shown}" + (f", and {more} more" if more else ""),
            f"work     {self.macs / 1e6:.3f} M MACs of {self.dense_macs / 1e6:.3f} M dense "
            f"({self.dense_macs / max(self.macs, 1):.2f}x fewer), density {self.density:.3g}",
            f"packing  {self._packing()}",
            "",
            f"  {'backend':<11}{'efficiency':>11}{'predicted':>13}{'measured':>13}",
        ]
        for c in self.candidates:
            mark = "*" if c.name == self.chosen else " "
            if c.reasons:
                lines.append(f"{mark} {c.name:<11}refused: {' '.join(c.reasons)}")
                continue
            efficiency = f"{c.efficiency:.0%}" if c.efficiency is not None else "-"
            lines.append(
                f"{mark} {c.name:<11}{efficiency:>11}{_micros(c.predicted_s):>13}"
                f"{_micros(c.measured_s):>13}"
            )
            lines += [f"    {note}" for note in c.notes]
        lines += ["", self._verdict()]
        for c in self.candidates:
            if c.name != self.chosen or c.measured_s is None or c.predicted_s is None:
                continue
            if far_above(c.measured_s, c.predicted_s):
                lines.append(
                    f"{c.name} took {c.measured_s / c.predicted_s:.0f} times what was predicted: "
                    "other work, or a layer too small for its threads; see docs/benchmarks.md."
                )
        if self.disturbed:
            lines.append(f"The measured times are {said(self.disturbed)}.")
        return "\n".join(lines)

    def _packing(self) -> str:
        seconds = self.packing_s
        if self.frozen and not seconds:
            return "none in a steady call: the layer is frozen, its packed weight is kept"
        if seconds is None:
            return "at each call, if the backend needs it: the layer is not frozen"
        if not seconds:
            return "none: the weight is read as it is"
        way_out = "the weight of this frozen layer is computed or trained"
        if not self.frozen:
            way_out = "layer.freeze() or hk.optimize keeps the packed weight"
        return f"{_micros(seconds)} of each call of {self.chosen}; {way_out}"

    def _verdict(self) -> str:
        how = "forced" if self.forced else "chosen"
        if self.chosen == "vendor":
            return (
                f"{how}: vendor, PyTorch's dense convolution. It executes every dense "
                "multiply-accumulate, so this layer is as fast as dense and no faster."
            )
        if self.faster_than_dense is False:
            return f"{how}: {self.chosen}. It was measured slower than the dense convolution."
        return f"{how}: {self.chosen}."


def explain(
    layer: SupportLayer | FusedConv2d | QuantizedLayer, x: Tensor, measure: bool = True
) -> Explanation:
    """Explains which backend runs a layer's forward pass, why, and how fast each one is.

    Args:
        layer: a layer of this package with a Support, fused or quantised too; without residual.
        x: an example input.  # [N, C, H, W] or [C, H, W], of a linear layer [..., C]
        measure: whether to time the backends that can run it, interleaved (never on meta).

    Returns:
        The explanation; print it.

    Raises:
        InputTypeError: the layer is not one of these.
        ArgumentError, BackendError: as the layer's forward.
    """
    if isinstance(layer, QuantizedLayer):
        from .quantization.explained import explain_quantized  # which needs what is above

        return explain_quantized(layer, x, measure)
    if not isinstance(layer, SupportConv2d | SupportLinear | FusedConv2d):
        raise InputTypeError(
            mismatch(
                "layer",
                type(layer).__name__,
                "a layer of hetconv_kernels.nn with a Support",
                "For a whole model call explain on each of its layers.",
            )
        )
    if x.dim() == 3 and isinstance(layer, SupportConv2d):
        x = x.unsqueeze(0)
    problem = layer.problem(x)
    forced = layer._backend_code()
    chosen = choose(problem, forced).backend.name
    runnable = [n for n in available_backends() if not get_backend(n).unsupported_reasons(problem)]
    measurable = measure and problem.batch and not x.is_meta
    measured, packing, disturbed = _measure(layer, x, runnable) if measurable else ({}, {}, ())
    candidates = []
    for name in available_backends():
        engine = get_backend(name)
        reasons = tuple(engine.unsupported_reasons(problem))
        notes = getattr(engine, "notes", lambda _: ())  # an engine may have more to say
        candidates.append(
            Candidate(
                name,
                reasons,
                None if reasons else engine.efficiency(problem),
                None if reasons else engine.estimate(problem),
                measured.get(name),
                () if reasons else tuple(notes(problem)),
                packing.get(name),
            )
        )
    support = layer.support
    sizes = sorted(
        ((len(g.filters), int(g.mask.any((1, 2)).sum())) for g in support.groups), reverse=True
    )
    dtype = f"{x.dtype}" + (f" autocast to {problem.dtype}" if x.dtype != problem.dtype else "")
    layout = "channels_last" if problem.channels_last else "contiguous"
    return Explanation(
        layer=repr(layer),
        input=f"{tuple(x.shape)}, {dtype}, {x.device}, {layout}",
        groups=tuple(sizes[:4]),
        group_count=len(sizes),
        density=support.density,
        macs=problem.macs,
        dense_macs=problem.dense_macs,
        chosen=chosen,
        forced=NAMES[forced] != "auto",
        candidates=tuple(candidates),
        frozen=layer.frozen,
        disturbed=disturbed,
    )


def warmup(model: nn.Module, *inputs: Any, backward: bool = False) -> None:
    """Runs a model once so that nothing is looked up or built later, during a graph capture.

    The model's mode, buffers and gradients, and the random state, are as before afterwards.

    Args:
        model: any module.
        *inputs: what its forward takes, on the model's device.
        backward: whether to run the backward pass too (gradients are discarded).
    """
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({t.device.index or 0 for t in tensors if t.is_cuda})
    with (
        _same_buffers(model),
        torch.random.fork_rng(devices=devices),
        torch.set_grad_enabled(backward),
    ):
        outputs = model(*inputs)
        if backward:
            results = outputs if isinstance(outputs, tuple | list) else (outputs,)
            results = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
            wanted = [p for p in model.parameters() if p.requires_grad]
            if not results:
                raise ArgumentError(
                    "warmup(backward=True): no output of the model needs a gradient."
                )
            # Laid out like the outputs, as a loss makes them; those of a sum would be expanded.
            ones = [torch.ones_like(t) for t in results]
            torch.autograd.grad(results, wanted, ones, allow_unused=True)


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Puts back the buffers that are changed meanwhile, and leaves no trace on the others."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, copy in kept:
            module._buffers[name] = buffer
            # A needless write would make engines forget what they prepared from a fused weight;
            # in-place versions do not tell (batch normalisation changes its buffers unversioned).
            if not buffer.is_meta and not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)


def _measure(
    layer: SupportConv2d | SupportLinear | FusedConv2d, x: Tensor, names: list[str]
) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
    """Times each backend; returns the seconds of a steady call and of packing in one, and why not
    to trust them.
    """
    from .timing import interleaved  # not needed to import the package

    def call(name: str) -> Any:
        def run() -> Tensor:
            layer.backend = name
            y: Tensor = layer.forward(x)  # without the hooks that others may have put on the layer
            return y

        return run

    before = layer.backend
    try:
        with torch.no_grad():
            calls = {name: call(name) for name in names}
            timings = interleaved(calls, device=x.device, rounds=9)
            return (
                {name: timings.median(name) for name in names},
                {name: packing_seconds(calls[name]) for name in names},
                timings.disturbed,
            )
    finally:
        layer.backend = before


def packing_seconds(call: Callable[[], object], rounds: int = 3) -> float:
    """Returns the median time that a call spends on packing weights, in seconds.

    Args:
        call: has run before.
        rounds: how often to call it.
    """
    spent = []
    for _ in range(rounds):
        with watched() as seen:
            call()
        spent.append(sum(packed.seconds for packed in seen))
    return sorted(spent)[rounds // 2]


def _micros(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f} us"
