# SPDX-License-Identifier: Apache-2.0
"""SupportLinear: a fully-connected layer whose weights exist where a Support says."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, InputTypeError, SupportError, mismatch
from ..functional import fprop_problem, linear
from ..packing import bits_on
from ..problem import Problem, make_geometry
from ..support import Support
from .base import STAND_IN, SupportLayer, as_step, take_parameters


class SupportLinear(SupportLayer):
    """A pruned ``nn.Linear``: the 1×1 convolution of a one-pixel image.

    Args:
        in_features: C.
        out_features: F.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.
        support: which weights exist; its kernel is 1×1.
        backend: forces an engine for this layer; None follows `use_backend`.

    Shape:
        input [..., C], output [..., F], weight [F, C], as ``nn.Linear``.

    Raises:
        SupportError: the Support has another shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        support: Support,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(support, Support):
            raise InputTypeError(mismatch("support", type(support).__name__, "a Support"))
        if support.shape != (out_features, in_features, 1, 1):
            raise SupportError(
                mismatch(
                    "Support of SupportLinear", support.shape, (out_features, in_features, 1, 1)
                )
            )
        self.in_features, self.out_features = in_features, out_features
        self.backend = backend
        self._geometry = make_geometry(support)
        self.weight = nn.Parameter(torch.empty(self._dense_shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None,
        )
        bits_on(support, self.weight.device)
        self.reset_parameters()

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        return self.support.shape[:2]

    def reset_parameters(self) -> None:
        """Initialises like ``nn.Linear``, with each row's *live* fan-in in place of the dense."""
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies.  # [..., C] -> [..., F]"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        self._check_features(x)
        weight, bias = self._operands()
        return linear(x, weight, bias, self._geometry, self._backend_code())

    def problem(self, x: Tensor, frozen: bool = False) -> Problem:
        """Describes the call of this layer on an input, one pixel a row, as `SupportConv2d` does.

        Args:
            x: the input.  # [..., C]
            frozen: whether to describe the call after `freeze`.

        Raises:
            ArgumentError, InputTypeError: as the forward.
        """
        self._check_features(x)
        pixels = x.reshape(-1, self.in_features, 1, 1)
        return fprop_problem(pixels, *self._weight_as(frozen), self.bias)

    def _check_features(self, x: Tensor) -> None:
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ArgumentError(
                mismatch("input features", tuple(x.shape), f"[..., {self.in_features}]")
            )

    @classmethod
    def from_linear(cls, linear: nn.Linear, support: Support, **kwargs: Any) -> Self:
        """Takes over an ``nn.Linear`` and copies its weights, dead ones left out.

        Raises:
            InputTypeError: ``linear`` is not an ``nn.Linear``.
            SupportError: the Support has another shape.
        """
        if not isinstance(linear, nn.Linear):
            raise InputTypeError(mismatch("linear", type(linear).__name__, "an nn.Linear"))
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            "meta",
            linear.weight.dtype,
            support=support,
            **kwargs,
        )
        take_parameters(layer, linear, linear.weight)
        return layer

    def to_linear(self) -> nn.Linear:
        """Returns the dense ``nn.Linear`` that computes the same, with copies of the parameters."""
        dense = self.dense_weight()
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, "meta", dense.dtype
        )
        take_parameters(linear, self, dense)
        return linear

    def extra_repr(self) -> str:
        """Says what ``nn.Linear`` says, and the Support."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, support={self.support.kind}, "
            f"density={self.support.density:.3g}"
            + ("" if self.backend is None else f", backend={self.backend!r}")
            + (", frozen" if self.frozen else "")
        )
