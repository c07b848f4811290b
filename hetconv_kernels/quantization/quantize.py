# SPDX-License-Identifier: Apache-2.0
"""quantize: a trained network in 8 bits, calibrated on batches of its input, with an account of it.

`prepare` gives the same network under fake quantisation, to be trained on, and `convert` makes the
integer network of that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from ..errors import ArgumentError, InputTypeError, TraceError, mismatch
from ..graph.hooks import calls_of
from ..graph.layout import set_module
from ..graph.optimize import optimize
from ..graph.trace import check_float, check_network, record
from ..measure import stats
from ..measure.timing import interleaved
from ..nn.quantized_layer import QuantizedLayer
from ..nn.quantized_steps import Dequantize, Quantize, QuantizedStep
from .calibrate import Inputs, as_batches, layer_errors, observe, output_error
from .checks import INTEGER_RANGES
from .engine import engine_name
from .observers import make_observer
from .report import QuantizedLayerReport, QuantizeReport
from .rewrite import Ranges, assign_scales, build_fake_quantized, convert
from .steps import LAYER, Flow, Step, decide, find_steps

__all__ = ["convert", "prepare", "quantize"]

# A layer whose output keeps less than this of its signal is better left in float.
MIN_SQNR = 10.0


@torch.inference_mode(False)  # what is made there cannot be read or written everywhere
@torch.no_grad()
def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    dtype: str | torch.dtype = "int8",
    *,
    observer: str = "minmax",
    percentile: float = 99.99,
    activations: torch.dtype = torch.uint8,
    min_sqnr: float = MIN_SQNR,
    evaluate: Callable[[nn.Module], float] | None = None,
    max_drop: float | None = None,
    skip: Collection[str] = (),
    measure: bool = True,
) -> QuantizeReport:
    """Makes a trained network compute in 8 bits.

    The network is fused by `optimize`, calibrated, and rebuilt of quantised layers between which
    activations stay integers: convolutions with residual sum, ReLU and pooling in their epilogue,
    fully connected layers, sums, averages, max-pooling, concatenations, ReLU and ReLU6. Whatever
    else there is is computed in float between two conversions. Input and output are float32.

    The original is not touched. The result does not train; see `prepare`.

    Args:
        model: the network, in evaluation mode, in float32. Compressed ones keep their Supports.
        batches: inputs of the kind that the network will see, or what a data loader gives (labels
            behind the inputs are left out).
        dtype: of the weights: ``"int8"``.
        observer: how the range of a tensor is chosen: ``"minmax"``, ``"percentile"`` or ``"mse"``.
        percentile: what ``"percentile"`` covers, in per cent.
        activations: uint8 or int8.
        min_sqnr: layers whose signal-to-quantisation-noise ratio is less stay in float, in dB.
        evaluate: returns the accuracy of a network, the higher the better.
        max_drop: how much of it may be lost: the layers with the largest error go back to float,
            one after another, until it is kept.
        skip: names of layers that stay in float.
        measure: whether to time float32 and 8 bits, interleaved, on the first batch.

    Returns:
        The report, with the network as ``report.model``.

    Raises:
        InputTypeError: no plain nn.Module, or dtypes that cannot be quantised.
        ArgumentError: no batches, numbers that are NaN or infinite, an unknown observer or layer, a
            network in training mode or without a layer that can be quantised.
        TraceError: no part of the network can be traced.
    """
    work = _calibrated(model, batches, dtype, observer, percentile, activations, min_sqnr, skip)
    accuracy = None
    made = work.convert()
    if evaluate is not None:
        before = float(evaluate(work.root))
        accuracy = before, float(evaluate(made))
        while max_drop is not None and before - accuracy[1] > max_drop and work.give_up(max_drop):
            made = work.convert()
            accuracy = before, float(evaluate(made))
    elif max_drop is not None:
        raise ArgumentError(mismatch("max_drop", max_drop, "an evaluate to measure it by"))
    x = work.batches[0][0]
    timings = None
    if measure:
        inputs = work.batches[0]
        with torch.no_grad():
            timings = interleaved(
                {"float32": lambda: work.root(*inputs), "int8": lambda: made(*inputs)},
                rounds=10,
                max_seconds=4.0,
                device=x.device,
            )
    return QuantizeReport(
        model=made,
        optimized=work.root,
        layers=work.layers(),
        dtype=str(activations).removeprefix("torch."),
        observer=f"{observer} {percentile} %" if observer == "percentile" else observer,
        images=sum(len(inputs[0]) for inputs in work.batches),
        sqnr_db=output_error(work.root, made, work.batches),
        accuracy=accuracy,
        bytes=(stats.weight_bytes(work.root), stats.weight_bytes(made)),
        conversions=sum(isinstance(m, Quantize | Dequantize) for m in made.modules())
        + _float_outputs(made),
        timings=timings,
        engine=engine_name(x.device),
        fixed=work.fixed,
    )


@torch.inference_mode(False)  # what is made there cannot be read or written everywhere
@torch.no_grad()
def prepare(
    model: nn.Module,
    batches: Iterable[Any],
    dtype: str | torch.dtype = "int8",
    *,
    observer: str = "minmax",
    percentile: float = 99.99,
    activations: torch.dtype = torch.uint8,
    min_sqnr: float = MIN_SQNR,
    skip: Collection[str] = (),
) -> nn.Module:
    """Makes a network of fake-quantised layers, to be trained on: quantisation-aware training.

    It computes in float32 what `quantize` would compute in integers. Its parameters are the live
    weights and the biases of the layers; a step of any optimiser moves them, and gradients go
    straight through the rounding. The scale of a filter follows its weights, the Scales of
    activations stay as calibrated. Batch normalisation is folded into the weights beforehand, so
    its statistics are those of the trained network; dropout is gone. Layers that stay in float
    keep their weights. After training, `convert` makes the integer network.

    Args and errors as `quantize`.

    Returns:
        The network to train, in training mode.
    """
    work = _calibrated(model, batches, dtype, observer, percentile, activations, min_sqnr, skip)
    return work.root_with(work.fake()).train()


@dataclass
class _Part:
    """One traced part of a network.

    Attributes:
        name: in the network; "" is the whole.
        traced: its graph in float.
        batches: what it is called with.
        steps: what can be computed in 8 bits.
        ranges: of its tensors.
        reasons: by layer, why it stays in float.
        errors: by layer, the ratio of signal and quantisation noise, in dB.
        floats: layers that stay in float.
    """

    name: str
    traced: fx.GraphModule
    batches: list[Inputs]
    steps: dict[fx.Node, Step]
    ranges: Ranges
    reasons: dict[str, str]
    errors: dict[str, float]
    floats: set[str]
    dtype: torch.dtype

    def flow(self) -> Flow:
        """Decides where integers flow."""
        return decide(self.traced, self.steps, self.floats)

    def fake(self) -> fx.GraphModule:
        """Builds the fake-quantised part."""
        flow = self.flow()
        return build_fake_quantized(self.traced, flow, assign_scales(flow, self.ranges, self.dtype))

    def full(self, layer: str) -> str:
        """Returns the name that a layer has in the whole network."""
        return f"{self.name}.{layer}" if self.name else layer


@dataclass
class _Work:
    """A network on its way to 8 bits.

    Attributes:
        root: in float, fused.
        parts: those that were traced.
        batches: of the whole.
        fixed: optional arguments that it no longer has.
    """

    root: nn.Module
    parts: list[_Part]
    batches: list[Inputs]
    fixed: tuple[str, ...] = ()

    def fake(self) -> dict[str, nn.Module]:
        """Builds the parts under fake quantisation."""
        return {part.name: part.fake() for part in self.parts}

    def root_with(self, parts: dict[str, nn.Module]) -> nn.Module:
        """Returns the network with other parts."""
        if "" in parts:
            return parts[""]
        made = copy.deepcopy(self.root)
        for name, part in parts.items():
            set_module(made, name, part)
        return made

    def convert(self) -> nn.Module:
        """Builds the integer network."""
        return convert(self.root_with(self.fake()))

    def give_up(self, max_drop: float) -> bool:
        """Puts the layer with the largest error back to float; False when none is left."""
        left = [
            (error, part, name)
            for part in self.parts
            for name, error in part.errors.items()
            if name not in part.floats
        ]
        if not left:
            return False
        _, part, name = min(left, key=lambda row: row[0])
        part.floats.add(name)
        part.reasons[name] = f"the accuracy dropped by more than {max_drop}"
        return True

    def layers(self) -> tuple[QuantizedLayerReport, ...]:
        """Says what became of each layer, in the order of the network."""
        rows = []
        for part in self.parts:
            known = {s.name: s for s in part.steps.values() if s.kind == LAYER}
            for node in part.traced.graph.nodes:
                name = str(node.target)
                if node.op != "call_module" or (name not in known and name not in part.reasons):
                    continue
                kind = type(part.traced.get_submodule(name)).__name__
                rows.append(
                    QuantizedLayerReport(
                        part.full(name),
                        known[name].what if name in known else kind,
                        name in known and name not in part.floats,
                        part.errors.get(name),
                        part.reasons.get(name, ""),
                    )
                )
        return tuple(rows)


def _calibrated(
    model: nn.Module,
    batches: Iterable[Any],
    dtype: str | torch.dtype,
    observer: str,
    percentile: float,
    activations: torch.dtype,
    min_sqnr: float,
    skip: Collection[str],
) -> _Work:
    """Fuses and calibrates a network, and finds the layers that stay in float."""
    if dtype not in ("int8", torch.int8):
        raise ArgumentError(
            mismatch(
                "dtype",
                dtype,
                "'int8'",
                "For 16 bits: hk.optimize(model, example, dtype=torch.bfloat16).",
            )
        )
    if activations not in INTEGER_RANGES:
        raise InputTypeError(mismatch("activations", activations, "torch.uint8 or torch.int8"))
    make_observer(observer, percentile)  # refuses before anything long runs
    check_network(model)
    check_float(model)
    _check_dtype(model)
    inputs = as_batches(batches, model)
    report = optimize(model, inputs[0], leave_plain=False)
    found = [
        (name, part)
        for name, part in report.model.named_modules()
        if isinstance(part, fx.GraphModule)
    ]
    if not found:
        why = "; ".join(f"{left.name or 'the network'}: {left.reason}" for left in report.untraced)
        raise TraceError(f"no part of {type(model).__name__} can be traced: {why}")
    parts = [
        _part(name, part, _calls(report.model, part, inputs), observer, percentile, activations)
        for name, part in found
    ]
    unknown = set(skip) - {part.full(step.name) for part in parts for step in part.steps.values()}
    if unknown:
        raise ArgumentError(mismatch("skip", sorted(unknown), "names of layers of the network"))
    for part in parts:
        for name in (step.name for step in part.steps.values() if step.kind == LAYER):
            if part.full(name) in skip:
                part.floats.add(name)
                part.reasons[name] = "it is in skip"
        _judge(part, min_sqnr)
    if not any(step.kind == LAYER for part in parts for step in part.steps.values()):
        raise ArgumentError(
            mismatch(
                "layers that can be quantised",
                "none: " + "; ".join(r for part in parts for r in part.reasons.values()),
                "at least one convolution or fully connected layer",
            )
        )
    return _Work(report.model, parts, inputs, report.fixed)


def _part(
    name: str,
    traced: fx.GraphModule,
    batches: list[Inputs],
    observer: str,
    percentile: float,
    dtype: torch.dtype,
) -> _Part:
    record(traced, batches[0])
    steps, reasons = find_steps(traced)
    build_observer = partial(make_observer, observer, percentile)
    ranges = observe(traced, steps, batches, build_observer, dtype)
    return _Part(name, traced, batches, steps, ranges, reasons, {}, set(), dtype)


def _judge(part: _Part, min_sqnr: float) -> None:
    """Measures each layer's error and leaves in float what loses too much, or cannot be done."""
    flow = part.flow()
    scales = assign_scales(flow, part.ranges, part.dtype)
    part.errors, refused = layer_errors(part.traced, flow, scales, part.batches)
    for name, reason in refused.items():
        part.floats.add(name)
        part.reasons[name] = reason
    for name, error in part.errors.items():
        if error < min_sqnr:
            part.floats.add(name)
            part.reasons[name] = f"its SQNR is less than {min_sqnr:g} dB"


def _calls(root: nn.Module, part: fx.GraphModule, batches: list[Inputs]) -> list[Inputs]:
    """Lists what a part is called with."""
    if part is root:
        return batches
    with torch.no_grad():
        calls = calls_of({0: part}, lambda: [root(*inputs) for inputs in batches])
    return [call.arguments for call in calls[0]]


def _check_dtype(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise InputTypeError(
                mismatch(f"dtype of {name!r}", parameter.dtype, "torch.float32", "Use .float().")
            )


def _float_outputs(model: nn.Module) -> int:
    """Counts the layers and steps that give float32 in their epilogue."""
    kinds = (QuantizedLayer, QuantizedStep)
    return sum(isinstance(m, kinds) and hasattr(m, "y") and m.y is None for m in model.modules())
