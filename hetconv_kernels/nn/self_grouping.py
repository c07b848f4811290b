# SPDX-License-Identifier: Apache-2.0
"""SelfGroupConv2d: ragged, overlapping, data-dependent groups."""

from __future__ import annotations

from typing import Self

import numpy.typing as npt
from torch import nn

from ..errors import InputTypeError, mismatch
from ..support import Support
from .conv import SupportConv2d


class SelfGroupConv2d(SupportConv2d):
    """A self-grouping convolution: each cluster of filters reads its own set of channels.

    Groups are uneven in filters and channels, and overlap. Which channels a cluster keeps is chosen
    from trained weights (`hetconv_kernels.self_grouping`); this layer runs the
    result.

    Source: Guo, Wu, Kittler, Feng, "Self-grouping convolutional neural networks", Neural Networks
    132, 2020, arXiv 2009.13803.

    Args:
        Those of `SupportConv2d`.
    """

    @classmethod
    def from_groups(
        cls, conv: nn.Conv2d, labels: npt.ArrayLike, keep: npt.ArrayLike, backend: str | None = None
    ) -> Self:
        """Takes over a convolution whose filters were clustered.

        Args:
            conv: an ``nn.Conv2d``.
            labels: the cluster of each filter.  # int [F]
            keep: the channels that each cluster reads.  # bool [G, C]
            backend: forces an engine for this layer.

        Raises:
            InputTypeError: ``conv`` is not an ``nn.Conv2d``.
            SupportError: labels and channels do not fit the convolution.
        """
        if not isinstance(conv, nn.Conv2d):
            raise InputTypeError(mismatch("conv", type(conv).__name__, "an nn.Conv2d"))
        support = Support.self_grouped(labels, keep, conv.kernel_size)
        return cls.from_conv2d(conv, support, backend=backend)
