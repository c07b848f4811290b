# SPDX-License-Identifier: Apache-2.0
"""Pool: max-pooling of a convolution's output, as part of it."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError, mismatch
from .integers import as_pair


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

    def check_values(self) -> None:
        """Refuses what no pooling can be done with; ``nn.MaxPool2d`` refuses the same.

        Raises:
            ArgumentError: a field is no pair of integers, or out of range.
        """
        for name, value, least in zip(self._fields, self, (1, 1, 0), strict=True):
            if not isinstance(value, tuple) or len(value) != 2:
                raise ArgumentError(mismatch(f"{name} of a pool", value, "a pair of integers"))
            as_pair(f"{name} of a pool", value, least)
        if any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise ArgumentError(
                mismatch("padding of a pool", self.padding, f"at most half of {self.kernel}")
            )

    def check(self, height: int, width: int) -> None:
        """Refuses an image that no window has a place in.

        Raises:
            ArgumentError: a field is out of range, or the pooled image would have no pixels.
        """
        self.check_values()
        if min(self.output_size(height, width)) < 1:
            raise ArgumentError(
                mismatch("size to be pooled", (height, width), f"an image that {self} fits in")
            )


def max_pooled(y: Tensor, pool: Pool) -> Tensor:
    """Pools a convolution's output in a pass of its own; errors as `Pool.check_values`."""
    pool.check_values()
    return F.max_pool2d(y, pool.kernel, pool.stride, pool.padding)
