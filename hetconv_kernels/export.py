# SPDX-License-Identifier: Apache-2.0
"""Ways out of Python: programs for the C library, PyTorch's own operators only, ONNX files of them.

Other hosts do not know this package's operators; they all know ``aten.conv2d``. What a network
becomes for them is `plain`'s.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import HetconvError, TraceError
from .files import unwritable
from .graph.check import verify
from .graph.onnx_file import warn_of_differences
from .graph.trace import FAILURES, as_inputs, check_network
from .nn import FrequencyConv2d, FusedConv2d
from .nn.base import SupportLayer
from .nn.quantized_layer import QuantizedLayer
from .plain_network import PLAIN_ACTS, PlainConv2d, has_quantized, plain
from .problem import read_ints

if TYPE_CHECKING:
    from .graph.program_file import SavedNetwork


__all__ = ["PlainConv2d", "decompose", "plain", "program", "support_layers", "to_onnx"]

_OURS = (SupportLayer, FusedConv2d, FrequencyConv2d, QuantizedLayer)


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Rewrites an exported program so that it convolves with ``aten.conv2d`` only.

    For programs that are there already; a network is better exported after `plain`, whose weights
    are dense beforehand and not at every call.

    Args:
        program: what torch.export gave or loaded.

    """
    table = torch.export.default_decompositions()
    for target in list(table):  # only ours: everything else stays as it was exported
        del table[target]
    table[torch.ops.hetconv.fprop.default] = _decomposed_fprop
    return program.run_decompositions(table)


def _decomposed_fprop(
    x: Tensor,
    w: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    geometry: list[int],
    backend: int,
) -> Tensor:
    """Computes what the operator ``hetconv::fprop`` computes, in aten."""
    named = read_ints(geometry)
    shape = (bits.shape[0], *named.columns)
    groups = 1
    if w.dim() == 4 and w.shape[1] != shape[1]:  # nn.Conv2d's own weight of equal groups
        groups, weight = shape[1] // w.shape[1], w
    else:
        mask = _unpacked(bits, math.prod(named.columns)).view(shape)
        if w.dim() == 1:
            weight = w.new_zeros(shape).masked_scatter(mask, w)
        else:
            weight = torch.where(mask, w.reshape(shape), 0.0)
    top, bottom, left, right = named.pads
    symmetric = top == bottom and left == right
    image = x if symmetric else F.pad(x, (left, right, top, bottom))
    y = torch.conv2d(
        image,
        weight.to(x.dtype),
        None,
        named.stride,
        (top, left) if symmetric else (0, 0),
        named.dilation,
        groups,
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    y = y.to(wide)
    for vector, combine in ((scale, torch.mul), (shift, torch.add)):
        if vector is not None:
            y = combine(y, vector.to(wide)[:, None, None])
    if residual is not None:
        y = y + residual
    return PLAIN_ACTS[act](y).to(x.dtype)


def _unpacked(bits: Tensor, columns: int) -> Tensor:
    """Unpacks a Support's bits, the lowest first.  # uint8 [F, B] -> bool [F, columns]"""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    single = (bits[:, :, None] >> places) & 1
    return single.flatten(1)[:, :columns] != 0


def to_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    form: str = "dense",
    *,
    check: bool = True,
) -> None:
    """Writes a network as an ONNX file, in operators that every ONNX host has.

    The network is made `plain` and compared with itself before; the batch is dynamic where the
    network allows it. Where ONNX Runtime is installed, it runs the file beside the network, and a
    warning says when they differ by more than rounding. The truth of both comparisons is computed
    in float64, which takes a while on large images. A quantised network is written in QDQ form,
    by `hetconv_kernels.quantization.to_onnx`. Needs onnx and onnxscript.

    Args:
        model: the network, in evaluation mode, of any layers of this package.
        example: an input, or a tuple of inputs.
        path: of the file.
        form: ``"dense"``, or ``"composition"`` for hosts that would multiply with the zeros; see
            `plain`.
        check: whether to compare; of a quantised network nothing is compared here.

    Raises:
        InputTypeError: no nn.Module, or no tensor in the example.
        ArgumentError: the network is in training mode, or another form.
        TraceError: torch.export cannot trace it.
        VerificationError: the plain network differs by more than rounding.
        HetconvError: onnx or onnxscript is not installed, or the file cannot be written.
    """
    check_network(model)
    if has_quantized(model):
        from .quantization.onnx_qdq import to_onnx as quantized_to_onnx

        return quantized_to_onnx(model, example, path, form)
    inputs = as_inputs(example)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise HetconvError(
            "writing ONNX needs onnx and onnxscript: pip install onnx onnxscript"
        ) from error
    ours = plain(model, form)
    if check:
        verify(model, ours, inputs, "export.plain")
    tensors = all(isinstance(x, Tensor) for x in inputs)
    dynamic = tuple({0: torch.export.Dim.AUTO} if x.dim() else {} for x in inputs if tensors)
    try:
        program = torch.export.export(ours, inputs, dynamic_shapes=dynamic if tensors else None)
        torch.onnx.export(program, f=str(Path(path)), dynamo=True, verbose=False)
    except OSError as error:
        raise unwritable(str(path), error) from error
    except FAILURES as error:
        raise TraceError(f"{type(model).__name__} cannot be exported: {error}") from error
    if check:
        warn_of_differences(model, Path(path), inputs)


def program(model: nn.Module, example: Any, path: str | os.PathLike[str]) -> SavedNetwork:
    """Saves a network as one file that runs without Python, by the C library ``libhetconv``.

    The file holds a native program for inputs of the example's shapes, dtypes and strides: weights
    (those that exist, unpacked, so that it serves every instruction set), geometry, epilogues and
    the plan of the memory. All of its steps are the engine's: layers that other engines would
    compute are given to it, average pooling too, so numbers may differ from the network's by
    rounding, which is checked. What the file computes is compared, bit for bit, with what
    ``network`` of the result computes in Python, before it is written.

    Args:
        model: the network, in evaluation mode: as it was trained, or what `optimize` or `quantize`
            gave. Before `optimize` it keeps every Support.
        example: an input, or a tuple of inputs, on the CPU.
        path: of the file.

    Returns:
        What was saved.

    Raises:
        InputTypeError: no nn.Module, or an input that is no tensor on the CPU.
        ArgumentError: the network is in training mode.
        TraceError: it cannot be traced as a whole.
        BackendError: a step is one that only PyTorch computes, an output is not a whole tensor, or
            the engine is not built here.
        VerificationError: the outputs differ by more than rounding.
        HetconvError: the file cannot be written.
    """
    from .graph.program_file import save_program

    return save_program(model, example, path)


def support_layers(model: nn.Module) -> list[str]:
    """Names the layers of this package that are left in a network."""
    found: list[str] = []
    for name, module in model.named_modules():
        part = any(name.startswith(f"{whole}.") for whole in found)
        if isinstance(module, _OURS) and not part:
            found.append(name)
    return found
