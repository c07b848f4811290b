# SPDX-License-Identifier: Apache-2.0
"""Ways out of Python: networks in PyTorch's own operators only, and ONNX files of them.

Other hosts do not know this package's operators; they all know ``aten.conv2d``. A weight that does
not exist becomes a zero, so what leaves is right everywhere, but as slow as the dense convolution
where the host has nothing better (equal groups stay groups). In the form ``"composition"`` it is
several smaller convolutions (`hetconv_kernels.composition`), which skip the zeros everywhere.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends.common import pad_image
from .composition import ComposedConv2d, check_form, compose
from .errors import HetconvError, InputTypeError, TraceError, mismatch
from .files import unwritable
from .graph.check import verify
from .graph.copying import copied
from .graph.trace import FAILURES, as_inputs, check_network
from .nn import FrequencyConv2d, FusedConv2d, GroupedConv2d, SupportConv2d, SupportLinear
from .nn.base import SupportLayer
from .nn.quantized_layer import QuantizedLayer
from .nn.quantized_steps import QuantizedStep
from .packing import dense_weight, own_blocks
from .pooling import Pool, max_pooled
from .problem import Geometry, read_ints

__all__ = ["PlainConv2d", "decompose", "plain", "support_layers", "to_onnx"]

_ACTS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": lambda y: torch.clamp(y, 0, 6),
    "silu": F.silu,
    "gelu": F.gelu,
}


_OURS = (SupportLayer, FusedConv2d, FrequencyConv2d, QuantizedLayer)


class PlainConv2d(nn.Module):
    """act(conv(x) + bias + residual), pooled, in PyTorch's own operators: what `plain` makes of a
    `FusedConv2d`.

    Attributes:
        conv: an ``nn.Conv2d`` (or what computes as one).
        pads: zeros around the image, in pixels: top, bottom, left, right.
        act: the activation.
        pool: max-pooling of that, or None.
    """

    def __init__(
        self,
        conv: nn.Module,
        pads: tuple[int, int, int, int],
        act: str,
        pool: Pool | None = None,
    ) -> None:
        super().__init__()
        self.conv, self.pads, self.act, self.pool = conv, pads, act, pool

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolves, adds, activates and pools.  # [N, C, H, W] -> [N, F, OH, OW]"""
        y = self.conv(pad_image(x, self.pads) if any(self.pads) else x)
        y = _ACTS[self.act](y if residual is None else y + residual)
        return y if self.pool is None else max_pooled(y, self.pool)


def plain(model: nn.Module, form: str = "dense") -> nn.Module:
    """Copies a network with every layer of this package replaced by PyTorch's own.

    Convolutions become ``nn.Conv2d`` (equal groups stay groups), dead weights zeros; a
    `FusedConv2d` becomes a `PlainConv2d`, a `SupportLinear` an ``nn.Linear``; a `FrequencyConv2d`
    has its kernels transformed back. This is the way back to plain checkpoints: the ``state_dict``
    of the result has no extra state, and loads into the network as it was before ``convert`` (not
    after `optimize`, which folds normalisation away).

    In the form ``"composition"``, HetConv leaves as a grouped convolution plus a 1×1 and unequal
    groups as a convolution each, where that multiplies less than the dense one. Its checkpoints
    are its own, and its sums are in another order.

    Args:
        model: any network.
        form: ``"dense"`` or ``"composition"``.

    Raises:
        InputTypeError: no nn.Module, or a network in 8 bits.
        ArgumentError: another form.
    """
    check_form(form)
    if not isinstance(model, nn.Module):
        raise InputTypeError(mismatch("model", type(model).__name__, "an nn.Module"))
    if any(isinstance(m, QuantizedLayer | QuantizedStep) for m in model.modules()):
        raise InputTypeError(
            mismatch(
                "model",
                "layers in 8 bits, which PyTorch has no plain form of",
                "a network in float",
                "The float network is `optimized` of the report; to_onnx writes QDQ files.",
            )
        )
    return _replaced(copied(model), form)


def _replaced(module: nn.Module, form: str) -> nn.Module:
    if isinstance(module, SupportLinear):
        return module.to_linear()
    if isinstance(module, FrequencyConv2d):
        return module.to_conv2d()
    if isinstance(module, FusedConv2d):
        geometry = module._geometry
        inner = _composed(geometry, module.weight, module.shift, form)
        if inner is not None:
            pads = (0, 0, 0, 0)
            return PlainConv2d(inner, pads, module.act, module.pool).train(module.training)
        symmetric = geometry.symmetric_padding
        conv = _conv2d(geometry, module.weight, module.shift, symmetric or (0, 0))
        pads = (0, 0, 0, 0) if symmetric is not None else geometry.pads
        return PlainConv2d(conv, pads, module.act, module.pool).train(module.training)
    if isinstance(module, SupportConv2d):
        if module.padding_mode == "zeros":
            inner = _composed(module._geometry, module.weight, module.bias, form)
            if inner is not None:
                return inner.train(module.training)
        conv = module.to_conv2d()
        groups = module.support.uniform_groups or 1
        if groups == 1 or isinstance(module, GroupedConv2d):
            return conv
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return conv
        padding = module._geometry.symmetric_padding
        assert padding is not None
        return _conv2d(module._geometry, module.weight, module.bias, padding).train(module.training)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _replaced(child, form)
    return module


def _composed(
    geometry: Geometry, weight: Tensor, bias: Tensor | None, form: str
) -> ComposedConv2d | None:
    found = compose(geometry) if form == "composition" else None
    if found is None:
        return None
    dense = dense_weight(geometry.support, weight.detach(), weight.dtype)
    return ComposedConv2d(geometry, found, dense.requires_grad_(weight.requires_grad), bias)


def _conv2d(
    geometry: Geometry, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
) -> nn.Conv2d:
    """Makes the ``nn.Conv2d`` of a geometry and a canonical weight, grouped where it is that."""
    support = geometry.support
    groups = support.uniform_groups or 1
    dense = dense_weight(support, weight.detach(), weight.dtype)
    conv = nn.Conv2d(
        support.channels, support.filters, support.kernel, geometry.stride, padding,
        geometry.dilation, groups, bias is not None, device="meta", dtype=weight.dtype,
    )  # fmt: skip
    own = own_blocks(dense.contiguous(), groups) if groups > 1 else dense
    conv.weight = nn.Parameter(own, weight.requires_grad)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return conv


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
    return _ACTS[act](y).to(x.dtype)


def _unpacked(bits: Tensor, columns: int) -> Tensor:
    """Unpacks a Support's bits, the lowest first.  # uint8 [F, B] -> bool [F, columns]"""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    single = (bits[:, :, None] >> places) & 1
    return single.flatten(1)[:, :columns] != 0


def to_onnx(
    model: nn.Module, example: Any, path: str | os.PathLike[str], form: str = "dense"
) -> None:
    """Writes a network as an ONNX file, in operators that every ONNX host has.

    The network is made `plain` and compared with itself before; the batch is dynamic where the
    network allows it. A quantised network is written in QDQ form, by
    `hetconv_kernels.quantization.to_onnx`. Needs onnx and onnxscript.

    Args:
        model: the network, in evaluation mode, of any layers of this package.
        example: an input, or a tuple of inputs.
        path: of the file.
        form: ``"dense"``, or ``"composition"`` for hosts that would multiply with the zeros; see
            `plain`.

    Raises:
        InputTypeError: no nn.Module, or no tensor in the example.
        ArgumentError: the network is in training mode, or another form.
        TraceError: torch.export cannot trace it.
        VerificationError: the plain network differs by more than rounding.
        HetconvError: onnx or onnxscript is not installed, or the file cannot be written.
    """
    check_network(model)
    from .quantization.qdq import has_quantized

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


def support_layers(model: nn.Module) -> list[str]:
    """Names the layers of this package that are left in a network."""
    found: list[str] = []
    for name, module in model.named_modules():
        part = any(name.startswith(f"{whole}.") for whole in found)
        if isinstance(module, _OURS) and not part:
            found.append(name)
    return found
