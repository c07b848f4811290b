# SPDX-License-Identifier: Apache-2.0
"""The QDQ form of a quantised network: what others' tools read, in PyTorch's own operators.

Every quantised tensor is written as integers that are dequantised before each use, and every
computation as one in float whose result is quantised: a runtime that knows the pattern computes in
integers again. PyTorch's PT2E programs and ONNX's QDQ files are both of this form.

    conv:  quantize(act(conv2d(dequantize(x), dequantize(w), dequantize(b)) + dequantize(r)))

A weight that does not exist is a zero, which is exact; equal groups stay groups. In the form
``"composition"`` a layer is several smaller convolutions (`hetconv_kernels.composition`), which
skip the zeros in any runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..composition import check_form
from ..errors import ArgumentError, InputTypeError, mismatch
from ..nn.quantized import QuantizedLayer
from ..nn.quantized_steps import (
    Dequantize,
    Quantize,
    QuantizedAdd,
    QuantizedAvgPool2d,
    QuantizedMaxPool2d,
    QuantizedPad,
    Requantize,
)
from ..plain_network import has_quantized, plain
from ..pooling import max_pooled
from .qdq_layer import SUMS, QdqLayer, dequantized, finished, operators, quantized
from .scheme import Scale

QDQ_STEPS = (
    Dequantize, Quantize, QuantizedAdd, QuantizedAvgPool2d, QuantizedMaxPool2d, QuantizedPad,
    Requantize,
)  # fmt: skip


def to_qdq(
    model: nn.Module,
    form: str = "dense",
    sums: str = "fused",
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """Copies a quantised network in QDQ form; what it has in float becomes `export.plain`.

    A layer's results are those of the integer network but for the last bit before each rounding, so
    that a number may come out one step off. With ``sums="rounded"`` each operand of a sum is
    quantised before it, which runtimes without a sum in a convolution's epilogue need to compute it
    in integers; a number may then be ``steps`` of its `QdqLayer` off:

        ⌊1 + Σ sᵢ / (2 s_y)⌋      over the Scales sᵢ of the operands that are rounded

    What is added to a residual has a Scale that holds every number which the residual cannot bring
    back into the range of the output. The two halves of a composition have those of their numbers
    on ``batches``; beyond these they saturate.

    Args:
        model: what `hk.quantize` made, or a module with quantised layers.
        form: ``"dense"`` or ``"composition"``.
        sums: ``"fused"`` or ``"rounded"``.
        batches: inputs (or tuples of inputs) in float32, which only rounded compositions need.

    Raises:
        InputTypeError: no nn.Module, or a module without quantised layers.
        ArgumentError: another form or way to sum, or batches are needed and there are none.
        HetconvError: this PyTorch has no operators of that form.
    """
    check_form(form)
    if sums not in SUMS:
        raise ArgumentError(mismatch("sums", repr(sums), f"one of {', '.join(SUMS)}"))
    if not isinstance(model, nn.Module):
        raise InputTypeError(mismatch("model", type(model).__name__, "an nn.Module"))
    if not has_quantized(model):
        raise InputTypeError(
            mismatch(
                "model", f"{type(model).__name__} in float", "a network with quantised layers",
                "hetconv_kernels.quantize makes one; export.plain is for networks in float.",
            )
        )  # fmt: skip
    operators()
    made = plain(_replaced(copy.deepcopy(model), form, sums), form)
    _calibrate(made, batches)
    return made


def _replaced(module: nn.Module, form: str, sums: str) -> nn.Module:
    if isinstance(module, fx.GraphModule):
        _note_scales(module)
    if isinstance(module, QuantizedLayer):
        return QdqLayer(module, form, sums)
    if isinstance(module, QDQ_STEPS):
        return QdqStep(module)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _replaced(child, form, sums)
    return module


def _calibrate(made: nn.Module, batches: Iterable[Any] | None) -> None:
    """Finds the Scales of what compositions round in their middle."""
    open_layers = [m for m in made.modules() if isinstance(m, QdqLayer) and m.seen is not None]
    if not open_layers:
        return
    count = 0
    with torch.no_grad():
        for batch in batches or ():
            made(*(batch if isinstance(batch, tuple) else (batch,)))
            count += 1
    if count == 0:
        raise ArgumentError(
            mismatch(
                "batches", "none", "inputs of the kind that the network will see",
                "The parts of a composition are rounded before they are added, and their ranges "
                'have to be seen; form="dense" and sums="fused" need none.',
            )
        )  # fmt: skip
    for layer in open_layers:
        layer.settle_()


def _note_scales(traced: fx.GraphModule) -> None:
    """Gives each max-pooling the Scale of what it pools, which the integers do without."""
    scales: dict[fx.Node, Scale | None] = {}
    for node in traced.graph.nodes:
        sources = node.all_input_nodes
        scales[node] = scales.get(sources[0]) if sources else None
        if node.op == "call_module":
            module = traced.get_submodule(str(node.target))
            if isinstance(module, QuantizedMaxPool2d):
                module.scale = scales[node]  # type: ignore[assignment]
            elif not isinstance(module, QuantizedPad):
                scales[node] = getattr(module, "y", scales[node])


class QdqStep(nn.Module):
    """A step between quantised layers in QDQ form, with the same arguments."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.kind = type(step).__name__
        self.scale: Scale | None = getattr(step, "scale", None)
        self.step: dict[str, Any] = {name: getattr(step, name) for name in step.fields}  # type: ignore[union-attr]

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Computes in float what stands between integers."""
        step, kind = self.step, self.kind
        if kind == "Quantize":
            return quantized(x, step["y"])
        if kind == "Dequantize":
            return dequantized(x, step["x"])
        if kind == "Requantize":
            return finished(dequantized(x, step["x"]), step["act"], step["y"])
        if kind == "QuantizedPad":
            return F.pad(x, list(step["pads"]), value=step["x"].zero_point)
        if kind == "QuantizedMaxPool2d":
            if self.scale is None:  # what it pools was not found; any increasing map will do
                return max_pooled(x.to(torch.float32), step["pool"]).to(x.dtype)
            return quantized(max_pooled(dequantized(x, self.scale), step["pool"]), self.scale)
        if kind == "QuantizedAdd":
            assert other is not None
            total = dequantized(x, step["a"]) + dequantized(other, step["b"])
            return finished(total, step["act"], step["y"])
        numbers = dequantized(x, step["x"])
        if step["size"] != (1, 1):
            return quantized(F.adaptive_avg_pool2d(numbers, step["size"]), step["x"])
        mean = numbers.mean((2, 3), keepdim=step["keepdim"])
        return finished(mean, "none", step["y"])
