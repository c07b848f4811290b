# SPDX-License-Identifier: Apache-2.0
"""HetConv2d: full kernels on 1/p of the channels, 1×1 kernels on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import nn

from ..errors import ArgumentError, mismatch
from ..masks import kernel_pair
from ..support import Support
from .conv import SupportConv2d, expanded_weight


class HetConv2d(SupportConv2d):
    """HetConv: each filter has K×K taps on 1/p of the channels and the centre tap on the rest.

    Drop-in for ``nn.Conv2d`` with the same padding; costs F·(K²·C/p + C − C/p) multiply-accumulates
    a pixel. p = 1 is the dense convolution, p = C depthwise plus pointwise in one layer.

    Source: Singh, Verma, Rai, Namboodiri, "HetConv: Heterogeneous Kernel-Based Convolutions for
    Deep CNNs", CVPR 2019, arXiv 1903.04120.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode, device, dtype, backend: as `SupportConv2d`; the kernel is odd.
        p: the part, from 1 to C; it need not divide the channel counts C and F.
        order: ``"blocked"`` (contiguous groups, the default) or ``"interleaved"`` (the paper's,
            filter f has the full kernel on channels c ≡ f mod p). A checkpoint belongs to one.

    Raises:
        ArgumentError: a value out of range.
        SupportError: p outside 1…C, or an even kernel.
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
        p: int = 4,
        order: str = "blocked",
        backend: str | None = None,
    ) -> None:
        support = Support.het(in_channels, out_channels, kernel_size, p, order)
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
        self.p, self.order = p, order
        self._fixed_support = support

    @classmethod
    def from_conv2d(  # type: ignore[override]
        cls, conv: nn.Conv2d, p: int = 4, order: str = "blocked", **kwargs: Any
    ) -> Self:
        """Takes over a convolution's arguments and projects its weights onto HetConv.

        Args:
            conv: an ``nn.Conv2d`` with groups=1 and an odd kernel.
            p: the part.
            order: ``"blocked"`` or ``"interleaved"``.
            **kwargs: keyword-only extras of the class.

        Raises:
            InputTypeError: ``conv`` is not an ``nn.Conv2d``.
            ArgumentError: ``conv`` is grouped.
            SupportError: p outside 1…C, or an even kernel.
        """
        weight, _ = expanded_weight(conv)
        if conv.groups != 1:
            raise ArgumentError(
                mismatch(
                    "groups of the convolution",
                    conv.groups,
                    "1",
                    "Grouped K×K + 1×1 pairs: fold_het. Grouped alone: GroupedConv2d.",
                )
            )
        return cls._from(conv, weight, p=p, order=order, **kwargs)


def fold_het(grouped: nn.Conv2d, pointwise: nn.Conv2d, **kwargs: Any) -> HetConv2d:
    """Folds a public HetConv, ``grouped(x) + pointwise(x)``, exactly into one HetConv2d.

    A K×K convolution in p groups plus a *full* 1×1 convolution is HetConv with the in-block 1×1
    weights written twice; folding adds them into the centre taps and saves F·C/p
    multiply-accumulates a pixel. The result equals the sum up to rounding.

    Args:
        grouped: the K×K convolution, K odd, "same"-style padding, zeros.
        pointwise: the 1×1 convolution on the same input, groups=1, no padding.
        **kwargs: keyword-only extras of HetConv2d but p and order.

    Returns:
        A HetConv2d with p = ``grouped.groups``, blocked.

    Raises:
        InputTypeError: an argument is not an ``nn.Conv2d``.
        ArgumentError: the two do not add up to a HetConv.
    """
    weight, _ = expanded_weight(grouped)
    center_weight, _ = expanded_weight(pointwise)
    kernel, stride = kernel_pair(grouped.kernel_size), kernel_pair(grouped.stride)
    dilation = kernel_pair(grouped.dilation)
    halo = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
    padding = (0, 0) if pointwise.padding == "valid" else pointwise.padding
    own_padding = halo if grouped.padding == "same" else grouped.padding
    facts = {
        "kernel sizes": (
            kernel[0] % 2 and kernel[1] % 2 and kernel_pair(pointwise.kernel_size) == (1, 1)
        ),
        "channels": (
            grouped.in_channels == pointwise.in_channels
            and grouped.out_channels == pointwise.out_channels
        ),
        "groups": pointwise.groups == 1,
        "strides": stride == kernel_pair(pointwise.stride),
        "paddings": own_padding == halo and padding in ((0, 0), "same"),
        "padding modes": grouped.padding_mode == "zeros",
        "dtypes and devices": (weight.dtype, weight.device)
        == (center_weight.dtype, center_weight.device),
    }
    wrong = [name for name, right in facts.items() if not right]
    if wrong:
        raise ArgumentError(
            mismatch(
                f"a pair that is no HetConv ({', '.join(wrong)})",
                f"{grouped} and {pointwise}",
                "an odd K×K convolution padded by K//2 with zeros, and a full unpadded 1×1 "
                "convolution of the same channels and stride",
            )
        )
    folded = weight.clone()
    folded[:, :, kernel[0] // 2, kernel[1] // 2] += center_weight[:, :, 0, 0]
    biases = [c.bias.detach() for c in (grouped, pointwise) if c.bias is not None]
    dense = nn.Conv2d(
        grouped.in_channels,
        grouped.out_channels,
        kernel,
        stride,
        halo,
        dilation,
        bias=bool(biases),
        device="meta",
        dtype=weight.dtype,
    )
    dense.weight = nn.Parameter(folded, requires_grad=grouped.weight.requires_grad)
    if biases:
        dense.bias = nn.Parameter(
            torch.stack(biases).sum(0), requires_grad=grouped.weight.requires_grad
        )
    dense.train(grouped.training)
    return HetConv2d.from_conv2d(dense, p=grouped.groups, order="blocked", **kwargs)
