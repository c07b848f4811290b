# SPDX-License-Identifier: Apache-2.0
"""Writes a quantised network as an ONNX file in QDQ form."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HetconvError, TraceError
from ..graph.trace import FAILURES, as_inputs, check_network
from .qdq import to_qdq


def to_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    form: str = "dense",
    sums: str = "fused",
    batches: Iterable[Any] | None = None,
) -> None:
    """Writes a quantised network as an ONNX file that others compute in integers.

    QuantizeLinear and DequantizeLinear stand around every convolution (`to_qdq`): weights are int8
    with a scale per filter, biases int32, activations have one scale a tensor. ONNX Runtime and
    OpenVINO read it; both round after the same sums, so a number of a layer may be one step off.
    The batch is dynamic where the network allows it. Needs onnx and onnxscript.

    ``form="composition"`` skips the zeros of HetConv and of unequal groups in any runtime.
    ``sums="rounded"`` lets ONNX Runtime compute every convolution in integers, for more steps; see
    `to_qdq`.

    Args:
        model: what `hk.quantize` made, in evaluation mode.
        example: an input in float32, or a tuple of inputs.
        path: of the file.
        form: ``"dense"`` or ``"composition"``.
        sums: ``"fused"`` or ``"rounded"``.
        batches: inputs in float32 on which the parts of rounded compositions find their ranges;
            None takes the example, which then has to be of the kind that the network will see.

    Raises:
        InputTypeError: no nn.Module, nothing in it is quantised, or no tensor in the example.
        ArgumentError: the network is in training mode, or another form or way to sum.
        TraceError: torch.export cannot trace it.
        HetconvError: onnx or onnxscript is not installed.
    """
    check_network(model)
    inputs = as_inputs(example)
    ours = to_qdq(model, form, sums, [inputs] if batches is None else batches)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise HetconvError(
            "writing ONNX needs onnx and onnxscript: pip install onnx onnxscript"
        ) from error
    tensors = all(isinstance(x, Tensor) for x in inputs)
    dynamic = tuple({0: torch.export.Dim.AUTO} if x.dim() else {} for x in inputs if tensors)
    try:
        program = torch.export.export(ours, inputs, dynamic_shapes=dynamic if tensors else None)
        torch.onnx.export(program, f=str(Path(path)), dynamo=True, verbose=False)
    except FAILURES as error:
        raise TraceError(f"{type(model).__name__} cannot be exported: {error}") from error
