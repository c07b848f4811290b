# SPDX-License-Identifier: Apache-2.0
"""GroupedConv2d: ``nn.Conv2d(groups=g)``, with the same parameters, made fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import InputTypeError, SupportError, mismatch
from ..support import Support
from .conv import SupportConv2d


class GroupedConv2d(SupportConv2d):
    """A grouped convolution with the signature, the weight shape and the numbers of ``nn.Conv2d``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode, device, dtype: as ``nn.Conv2d``.
        backend: forces an engine for this layer; None follows `use_backend`.

    Shape:
        weight [F, C/groups, KH, KW]; input and output as ``nn.Conv2d``.

    Raises:
        ArgumentError: a value out of range.
        SupportError: ``groups`` does not divide both C and F.
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
        backend: str | None = None,
    ) -> None:
        support = Support.grouped(in_channels, out_channels, kernel_size, groups)
        self._fixed_groups = groups
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            support=support,
            backend=backend,
        )

    def _check_groups(self, groups: int) -> None:
        """Any divisor is allowed; `Support.grouped` has checked it."""

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        f, c, kh, kw = self.support.shape
        return f, c // self._fixed_groups, kh, kw

    @property
    def _all_live(self) -> bool:
        return True

    def _check_support(self, support: Support) -> None:
        """Refuses any other Support: the groups of this layer are its Support."""
        super()._check_support(support)
        if support != self.support:
            raise SupportError(
                mismatch(
                    "Support of a GroupedConv2d",
                    support,
                    self.support,
                    "Use SupportConv2d.from_conv2d(layer.to_conv2d(), support).",
                )
            )

    def _to_live(self, dense: Tensor) -> Tensor:
        return dense.reshape(-1)

    def _to_dense(self, live: Tensor) -> Tensor:
        return live.reshape(self._dense_shape).clone()

    def _loaded(self, weight: Tensor) -> Tensor:
        wanted = (self.support.live,) if self.frozen else self._dense_shape
        fits = weight.shape in ((self.support.live,), self._dense_shape)
        return weight.reshape(wanted) if fits else weight

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, **kwargs: Any) -> Self:  # type: ignore[override]
        """Takes over an ``nn.Conv2d`` with any number of groups, copying its parameters.

        Raises:
            InputTypeError: ``conv`` is not an ``nn.Conv2d``.
        """
        if not isinstance(conv, nn.Conv2d):
            raise InputTypeError(mismatch("conv", type(conv).__name__, "an nn.Conv2d"))
        return cls._from(conv, conv.weight, groups=conv.groups, **kwargs)
