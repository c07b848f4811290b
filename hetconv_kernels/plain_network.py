# SPDX-License-Identifier: Apache-2.0
"""Networks in PyTorch's own layers: the way back, and the form that other hosts know.

A weight that does not exist becomes a zero, so what leaves is right everywhere, but as slow as the
dense convolution where the host has nothing better (equal groups stay groups). In the form
``"composition"`` it is several smaller convolutions (`hetconv_kernels.composition`), which skip the
zeros everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends.common import pad_image
from .composition import ComposedConv2d, check_form, compose
from .errors import InputTypeError, mismatch
from .graph.copying import copied
from .nn import (
    AveragePool,
    FrequencyConv2d,
    FusedConv2d,
    GroupedConv2d,
    SupportConv2d,
    SupportLinear,
)
from .nn.quantized_layer import QuantizedLayer
from .nn.quantized_steps import QuantizedStep
from .packing import dense_weight, own_blocks
from .pooling import Pool, max_pooled
from .problem import Geometry

PLAIN_ACTS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": lambda y: torch.clamp(y, 0, 6),
    "silu": F.silu,
    "gelu": F.gelu,
}


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
        y = PLAIN_ACTS[self.act](y if residual is None else y + residual)
        return y if self.pool is None else max_pooled(y, self.pool)


class PlainMean(nn.Module):
    """The mean over all pixels: what `plain` makes of an `AveragePool` to one pixel.

    Attributes:
        keepdim: whether the result is an image.
    """

    def __init__(self, keepdim: bool) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        """Averages.  # [N, C, H, W] -> [N, C, 1, 1] or [N, C]"""
        return x.mean((-2, -1), keepdim=self.keepdim)


def has_quantized(model: nn.Module) -> bool:
    """Tells whether a network has layers or steps in 8 bits."""
    return any(isinstance(m, QuantizedLayer | QuantizedStep) for m in model.modules())


def plain(model: nn.Module, form: str = "dense") -> nn.Module:
    """Copies a network with every layer of this package replaced by PyTorch's own.

    Convolutions become ``nn.Conv2d`` (equal groups stay groups), dead weights zeros; a
    `FusedConv2d` becomes a `PlainConv2d`, a `SupportLinear` an ``nn.Linear``; a `FrequencyConv2d`
    has its kernels transformed back, and an `AveragePool` is PyTorch's pooling again. This is the
    way back to plain checkpoints: the ``state_dict`` of the result has no extra state, and loads
    into the network as it was before ``convert`` (not after `optimize`, which folds normalisation
    away).

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
    if has_quantized(model):
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
    if isinstance(module, AveragePool):
        return _plain_average(module).train(module.training)
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


def _plain_average(module: AveragePool) -> nn.Module:
    if module.pool is None and module.output_size == (1, 1):
        return PlainMean(module.keepdim)
    if module.pool is None:
        return nn.AdaptiveAvgPool2d(module.output_size)
    return nn.AvgPool2d(*module.pool, count_include_pad=not module.inside)


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
