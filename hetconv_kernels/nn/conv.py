# SPDX-License-Identifier: Apache-2.0
"""SupportConv2d: the drop-in for ``nn.Conv2d`` that the other convolutions are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, InputTypeError, SupportError, mismatch
from ..functional import conv2d, fprop_problem
from ..integers import as_count
from ..masks import kernel_pair
from ..packing import bits_on, dense_weight
from ..problem import Geometry, Problem, make_geometry
from ..support import Support
from .base import STAND_IN, SupportLayer, as_step, take_parameters

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class SupportConv2d(SupportLayer):
    """A convolution whose weights exist where a Support says: drop-in for ``nn.Conv2d``.

    Args:
        in_channels: C.
        out_channels: F.
        kernel_size: one number or (KH, KW).
        stride: one number or a pair, in pixels.
        padding: one number, a pair, ``"same"`` or ``"valid"``.
        dilation: one number or a pair, in pixels.
        groups: 1; groups are said by the Support.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: of the parameters.
        dtype: of the parameters.
        support: which weights exist.
        backend: forces an engine for this layer; None follows `use_backend`.

    Shape:
        input [N, C, H, W] or [C, H, W], output [N, F, OH, OW] or [F, OH, OW], as ``nn.Conv2d``.

    Raises:
        ArgumentError: a value out of range.
        SupportError: the Support has another shape.
        BackendError: the backend is unknown or not built here.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        support: Support,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kernel = kernel_pair(kernel_size)
        if not isinstance(support, Support):
            raise InputTypeError(mismatch("support", type(support).__name__, "a Support"))
        in_channels = as_count("in_channels", in_channels)
        out_channels = as_count("out_channels", out_channels)
        if support.shape != (out_channels, in_channels, *kernel):
            raise SupportError(
                mismatch(
                    f"Support of {type(self).__name__}",
                    support.shape,
                    f"{(out_channels, in_channels, *kernel)} (F, C, KH, KW)",
                )
            )
        if padding_mode not in _PADDING_MODES:
            raise ArgumentError(
                mismatch("padding_mode", repr(padding_mode), f"one of {', '.join(_PADDING_MODES)}")
            )
        self._check_groups(groups)
        if isinstance(padding, tuple | list) and len(padding) > 2:
            raise ArgumentError(
                mismatch("padding of a layer", padding, "one number, a pair, 'same' or 'valid'")
            )
        geometry = make_geometry(support, stride, padding, dilation)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = kernel, geometry.stride
        self.dilation = _as_pair(dilation)
        self.padding: str | tuple[int, int] = (
            padding if isinstance(padding, str) else _as_pair(padding)
        )
        self.padding_mode = padding_mode
        self.backend = backend
        # Other padding modes pad before the convolution, which then pads nothing.
        top, bottom, left, right = geometry.pads
        self._outer_pads = (left, right, top, bottom) if padding_mode != "zeros" else None
        self._geometry = (
            geometry
            if self._outer_pads is None
            else Geometry(support, geometry.stride, (0, 0, 0, 0), geometry.dilation)
        )
        self.weight = nn.Parameter(torch.empty(self._dense_shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None,
        )
        bits_on(support, self.weight.device)
        self.reset_parameters()

    def _check_groups(self, groups: int) -> None:
        if groups != 1:
            raise ArgumentError(
                mismatch(
                    f"groups of {type(self).__name__}",
                    groups,
                    "1, since the Support says which channels a filter reads",
                    "For nn.Conv2d(groups=g) use GroupedConv2d.",
                )
            )

    def reset_parameters(self) -> None:
        """Initialises like ``nn.Conv2d``, by each filter's *live* fan-in."""
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Convolves.  # [N, C, H, W] -> [N, F, OH, OW]"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        if self._outer_pads is not None:
            x = F.pad(x, self._outer_pads, mode=self.padding_mode)
        geometry = self._geometry
        weight, bias = self._operands()
        return conv2d(x, weight, bias, geometry, self._backend_code())

    def problem(self, x: Tensor, frozen: bool = False) -> Problem:
        """Describes the call of this layer on an input: what engines are asked about.

        Args:
            x: the input.  # [N, C, H, W] or [C, H, W]
            frozen: whether to describe the call after `freeze`.

        Raises:
            ArgumentError, InputTypeError: as the forward.
        """
        x = x.unsqueeze(0) if x.dim() == 3 else x
        if self._outer_pads is not None:
            x = F.pad(x, self._outer_pads, mode=self.padding_mode)
        return fprop_problem(x, *self._weight_as(frozen), self.bias)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, support: Support, **kwargs: Any) -> Self:
        """Takes over a convolution's arguments and copies its weights, dead ones left out.

        Args:
            conv: an ``nn.Conv2d``; a grouped one is expanded, and the Support intersected with it.
            support: which weights exist.
            **kwargs: keyword-only extras of the class.

        Raises:
            InputTypeError: ``conv`` is not an ``nn.Conv2d``, or ``support`` not a Support.
            SupportError: the Support has another shape.
        """
        weight, within = expanded_weight(conv)
        if conv.groups > 1 and isinstance(support, Support):
            support = support & within
        return cls._from(conv, weight, support=support, **kwargs)

    @classmethod
    def _from(cls, conv: nn.Conv2d, weight: Tensor, groups: int = 1, **kwargs: Any) -> Self:
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            groups,
            conv.bias is not None,
            conv.padding_mode,
            "meta",
            conv.weight.dtype,
            **kwargs,
        )
        take_parameters(layer, conv, weight)
        return layer

    def to_conv2d(self) -> nn.Conv2d:
        """Returns the ``nn.Conv2d`` that computes the same, with copies of the parameters."""
        weight = self.dense_weight()
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,  # type: ignore[arg-type]
            "meta",
            weight.dtype,
        )
        take_parameters(conv, self, weight)
        return conv

    def extra_repr(self) -> str:
        """Says what ``nn.Conv2d`` says, and the Support."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        for name, default in (
            ("padding", (0, 0)),
            ("dilation", (1, 1)),
            ("groups", 1),
            ("padding_mode", "zeros"),
            ("backend", None),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        text += ", bias=False" if self.bias is None else ""
        text += f", support={self.support.kind}, groups_of_filters={len(self.support.groups)}"
        text += f", density={self.support.density:.3g}"
        return text + (", frozen" if self.frozen else "")


def expanded_weight(conv: nn.Conv2d) -> tuple[Tensor, Support]:
    """Returns a convolution's dense weight and the Support of its groups.

    # [F, C, KH, KW]

    Raises:
        InputTypeError: ``conv`` is not an ``nn.Conv2d``.
    """
    if not isinstance(conv, nn.Conv2d):
        raise InputTypeError(mismatch("conv", type(conv).__name__, "an nn.Conv2d"))
    support = Support.grouped(conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups)
    weight = conv.weight.detach()
    if conv.groups > 1:
        weight = dense_weight(support, weight, weight.dtype)
    return weight, support


def _as_pair(value: int | Sequence[int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value,)
    return int(pair[0]), int(pair[-1])
