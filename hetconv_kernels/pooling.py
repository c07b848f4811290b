# SPDX-License-Identifier: Apache-2.0
"""Pool: max-pooling of a convolution's output, as part of it."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError, mismatch


class Pool(NamedTuple):
    """Max-pooling of a convolution's output, as ``nn.MaxPool2d`` does it, without dilation.

    Attributes:
        kernel: (vertical, horizontal), in pixels.
        stride: the same.
        padding: the same, at most half of the kernel.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the pooled height and width of height × width pixels."""
        (kh, kw), (sh, sw), (ph, pw) = self
        return (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1

    def check(self, height: int, width: int) -> None:
        """Refuses an image that no window has a place in.

        Raises:
            ArgumentError: the pooled image would have no pixels.
        """
        if min(self.output_size(height, width)) < 1:
            raise ArgumentError(
                mismatch("size to be pooled", (height, width), f"an image that {self} fits in")
            )


def max_pooled(y: Tensor, pool: Pool) -> Tensor:
    """Pools a convolution's output in a pass of its own."""
    return F.max_pool2d(y, pool.kernel, pool.stride, pool.padding)
