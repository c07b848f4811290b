# SPDX-License-Identifier: Apache-2.0
"""The QDQ form of a quantised network: what others' tools read, in PyTorch's own operators.

Every quantised tensor is written as integers that are dequantised before each use, and every
computation as one in float whose result is quantised: a runtime that knows the pattern computes in
integers again. PyTorch's PT2E programs and ONNX's QDQ files are both of this form.

    conv:  quantize(act(conv2d(dequantize(x), dequantize(w), dequantize(b)) + dequantize(r)))

A weight that does not exist is a zero, which is exact; equal groups stay groups.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import HetconvError, InputTypeError, mismatch
from ..nn.quantized import QuantizedLayer, QuantizedLinear
from ..nn.quantized_steps import (
    Dequantize,
    Quantize,
    QuantizedAdd,
    QuantizedAvgPool2d,
    QuantizedMaxPool2d,
    QuantizedPad,
    Requantize,
)
from ..packing import dense_weight, own_blocks
from ..pooling import Pool, max_pooled
from .checks import limits
from .scheme import Scale

STEPS = (
    Dequantize, Quantize, QuantizedAdd, QuantizedAvgPool2d, QuantizedMaxPool2d, QuantizedPad,
    Requantize,
)  # fmt: skip


def has_quantized(model: nn.Module) -> bool:
    """Tells whether a network has layers or steps in 8 bits."""
    return any(isinstance(m, (QuantizedLayer, *STEPS)) for m in model.modules())


def to_qdq(model: nn.Module) -> nn.Module:
    """Copies a quantised network in QDQ form; what it has in float becomes `export.plain`.

    Its results are those of the integer network but for the last bit before each rounding, so that
    a number may come out one step off.

    Args:
        model: what `hk.quantize` made, or a module with quantised layers.

    Raises:
        InputTypeError: no nn.Module, or a module without quantised layers.
        HetconvError: this PyTorch has no operators of that form.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(mismatch("model", type(model).__name__, "an nn.Module"))
    if not has_quantized(model):
        raise InputTypeError(
            mismatch(
                "model", f"{type(model).__name__} in float", "a network with quantised layers",
                "hetconv_kernels.quantize makes one; export.plain is for networks in float.",
            )
        )  # fmt: skip
    from ..export import plain

    operators()
    return plain(_replaced(copy.deepcopy(model)))


def operators() -> Any:
    """Returns PyTorch's ``quantized_decomposed`` operators.

    Raises:
        HetconvError: this PyTorch does not have them.
    """
    try:
        import torch.ao.quantization.fx._decomposed  # registers them
    except ImportError as error:
        raise HetconvError(
            f"PyTorch {torch.__version__} has no operators quantized_decomposed, which PT2E "
            "programs and QDQ files are written in: use a version that has them (2.4 to 2.13)."
        ) from error
    return torch.ops.quantized_decomposed


def quantized(x: Tensor, scale: Scale) -> Tensor:
    """Quantises by PyTorch's operator."""
    y: Tensor = operators().quantize_per_tensor(
        x, scale.scale, scale.zero_point, *limits(scale.dtype), scale.dtype
    )
    return y


def dequantized(x: Tensor, scale: Scale) -> Tensor:
    """Dequantises by PyTorch's operator."""
    y: Tensor = operators().dequantize_per_tensor(
        x, scale.scale, scale.zero_point, *limits(scale.dtype), scale.dtype
    )
    return y


def _replaced(module: nn.Module) -> nn.Module:
    if isinstance(module, fx.GraphModule):
        _note_scales(module)
    if isinstance(module, QuantizedLayer):
        return QdqLayer(module)
    if isinstance(module, STEPS):
        return QdqStep(module)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _replaced(child)
    return module


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


def _finish(y: Tensor, act: str, scale: Scale | None) -> Tensor:
    if act == "relu":
        y = torch.relu(y)
    elif act == "relu6":
        y = torch.clamp(y, 0.0, 6.0)
    return y if scale is None else quantized(y, scale)


def _pooled(y: Tensor, pool: Pool, scale: Scale | None) -> Tensor:
    if scale is None:
        return max_pooled(y, pool)
    return quantized(max_pooled(dequantized(y, scale), pool), scale)


class QdqLayer(nn.Module):
    """A `QuantizedConv2d` or `QuantizedLinear` in QDQ form, with the same arguments."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    bias_scale: Tensor
    zeros: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        if layer.x is None:
            raise InputTypeError(layer._uncalibrated())
        geometry, support = layer._geometry, layer.support
        self.x, self.y, self.residual = layer.x, layer.y, layer.residual
        self.act, self.pool = layer.act, layer.pool
        self.linear = isinstance(layer, QuantizedLinear)
        self.groups = 1 if self.linear else support.uniform_groups or 1
        self.stride, self.dilation = list(geometry.stride), list(geometry.dilation)
        symmetric = geometry.symmetric_padding
        self.padding = list(symmetric or (0, 0))
        self.pads = None if symmetric is not None else geometry.pads
        weight = dense_weight(support, layer.weight, torch.int8)
        if self.groups > 1:
            weight = own_blocks(weight.contiguous(), self.groups)
        self.register_buffer("weight", weight.flatten(1) if self.linear else weight.contiguous())
        scale = layer.weight_scale
        self.register_buffer("weight_scale", scale.clone())
        self.register_buffer("bias", layer.bias.clone())
        self.register_buffer("bias_scale", (scale.double() * self.x.scale).float())
        self.register_buffer("zeros", torch.zeros_like(scale, dtype=torch.int64))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Computes in float what stands between integers."""
        if self.pads is not None:
            top, bottom, left, right = self.pads
            x = F.pad(x, (left, right, top, bottom), value=self.x.zero_point)
        image = dequantized(x, self.x)
        per_filter = operators().dequantize_per_channel
        weight = per_filter(self.weight, self.weight_scale, self.zeros, 0, -128, 127, torch.int8)
        bias = per_filter(
            self.bias, self.bias_scale, self.zeros, 0, -(2**31), 2**31 - 1, torch.int32
        )
        if self.linear:
            return _finish(F.linear(image, weight, bias), self.act, self.y)
        y = F.conv2d(image, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            assert self.residual is not None
            y = y + dequantized(residual, self.residual)
        y = _finish(y, self.act, self.y)
        return y if self.pool is None else _pooled(y, self.pool, self.y)


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
            return _finish(dequantized(x, step["x"]), step["act"], step["y"])
        if kind == "QuantizedPad":
            return F.pad(x, list(step["pads"]), value=step["x"].zero_point)
        if kind == "QuantizedMaxPool2d":
            if self.scale is None:  # what it pools was not found; any increasing map will do
                return max_pooled(x.to(torch.float32), step["pool"]).to(x.dtype)
            return quantized(max_pooled(dequantized(x, self.scale), step["pool"]), self.scale)
        if kind == "QuantizedAdd":
            assert other is not None
            total = dequantized(x, step["a"]) + dequantized(other, step["b"])
            return _finish(total, step["act"], step["y"])
        numbers = dequantized(x, step["x"])
        if step["size"] != (1, 1):
            return quantized(F.adaptive_avg_pool2d(numbers, step["size"]), step["x"])
        mean = numbers.mean((2, 3), keepdim=step["keepdim"])
        return _finish(mean, "none", step["y"])
