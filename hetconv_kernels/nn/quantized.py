# SPDX-License-Identifier: Apache-2.0
"""QuantizedConv2d and QuantizedLinear: layers in 8 bits, for inference."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, InputTypeError, mismatch
from ..packing import live_weight
from ..problem import Geometry
from ..quantization.scheme import Scale
from ..support import Support
from .base import STAND_IN, as_step
from .conv import SupportConv2d
from .fused import FusedConv2d, fuse
from .linear import SupportLinear
from .quantized_layer import QuantizedLayer


class QuantizedConv2d(QuantizedLayer):
    """act(conv(x) + bias + residual) in 8 bits, max-pooled where it has a `Pool`.

    Made by `hk.quantize`, or by `from_float`. A layer without a Scale of its input is not
    calibrated and refuses to run.

    Args:
        geometry: Support, stride, pads and dilation.
        x: Scale of the input.
        y: Scale of the output; None for float32.
        residual: Scale of what is added before the activation, if anything is.
        act: ``"none"``, ``"relu"`` or ``"relu6"``.
        pool: max-pooling of that, or None.
        backend: forces an engine for this layer; None follows `use_backend`.
        device: of the buffers.

    Shape:
        x [N, C, H, W], residual [N, F, OH, OW] and output the same, or what pooling makes of it:
        uint8 or int8 as the Scales say. Outputs are in channels_last, the layout that is fastest.

    Raises:
        ArgumentError: an activation that is no clamp.
        BackendError: the backend is unknown or not built here.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolves with the epilogue in one pass.  # [N, C, H, W] -> [N, F, OH, OW]"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x, residual)
            return recorded
        return self._run(x, residual)

    @classmethod
    def from_float(
        cls,
        layer: FusedConv2d | SupportConv2d | nn.Conv2d,
        x: Scale,
        y: Scale | None = None,
        residual: Scale | None = None,
    ) -> Self:
        """Quantises the weights of a convolution, in evaluation mode.

        Args:
            layer: an ``nn.Conv2d`` or a convolution of this package, with zero padding.
            x: Scale of the input.
            y: Scale of the output; None for float32.
            residual: Scale of what is added, if anything is.

        Raises:
            InputTypeError: ``layer`` is something else.
            ArgumentError: its activation is no clamp, its padding mode is not zeros, a weight is
                NaN or infinite, or an accumulator could leave int32.
        """
        fused = layer if isinstance(layer, FusedConv2d) else fuse(layer)
        made = cls(
            fused._geometry,
            x=x,
            y=y,
            residual=residual,
            act=fused.act,
            pool=fused.pool,
            device=fused.weight.device,
        )
        return made.set_float_(fused.weight, fused.shift)

    def extra_repr(self) -> str:
        """Says sizes, Scales and Support."""
        f, c, kh, kw = self.support.shape
        return f"{c}, {f}, kernel_size={(kh, kw)}, stride={self._geometry.stride}, {self._tail()}"


class QuantizedLinear(QuantizedLayer):
    """act(x · Wᵀ + bias) in 8 bits: the 1×1 convolution of a one-pixel image.

    Args:
        As `QuantizedConv2d`; the Support's kernel is 1×1.

    Shape:
        input [..., C], output [..., F].
    """

    def __init__(self, geometry: Geometry, **kwargs: Any) -> None:
        super().__init__(geometry, **kwargs)
        rows = self.support.kernel == geometry.stride == (1, 1) and not any(geometry.pads)
        if not rows or self.pool is not None or self.residual is not None:
            raise ArgumentError(
                mismatch(
                    "QuantizedLinear",
                    f"kernel {self.support.kernel}, stride {geometry.stride}, pads "
                    f"{geometry.pads}, pool {self.pool}, residual {self.residual}",
                    "a 1×1 kernel, stride 1, no pads, no pooling, no residual",
                )
            )
        self.in_features, self.out_features = self.support.channels, self.support.filters

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies.  # [..., C] -> [..., F]"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        y = self._run(self._image(x), None)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _image(self, x: Tensor) -> Tensor:
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ArgumentError(
                mismatch("input features", tuple(x.shape), f"[..., {self.in_features}]")
            )
        return x.reshape(-1, self.in_features, 1, 1)

    @classmethod
    def from_float(
        cls, layer: SupportLinear | nn.Linear, x: Scale, y: Scale | None = None, act: str = "none"
    ) -> Self:
        """Quantises the weights of a fully connected layer.

        Args:
            layer: an ``nn.Linear`` or a `SupportLinear`.
            x: Scale of the input.
            y: Scale of the output; None for float32.
            act: what follows: ``"none"``, ``"relu"`` or ``"relu6"``.

        Raises:
            InputTypeError: ``layer`` is something else.
            ArgumentError: as `QuantizedConv2d.from_float`.
        """
        if isinstance(layer, nn.Linear):
            dense = Support.dense(layer.in_features, layer.out_features, 1)
            layer = SupportLinear.from_linear(layer, dense)
        if not isinstance(layer, SupportLinear):
            raise InputTypeError(mismatch("layer", type(layer).__name__, "a fully connected layer"))
        made = cls(layer._geometry, x=x, y=y, act=act, device=layer.weight.device)
        weight = layer.weight.detach()
        live = weight if weight.dim() == 1 else live_weight(layer.support, weight)
        zeros = torch.zeros(layer.out_features, device=weight.device)
        return made.set_float_(live, zeros if layer.bias is None else layer.bias.detach())

    def extra_repr(self) -> str:
        """Says sizes, Scales and Support."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._tail()}"
