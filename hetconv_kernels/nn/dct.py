# SPDX-License-Identifier: Apache-2.0
"""The discrete cosine transform of convolution kernels, and the way back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["dct", "dct_basis", "idct"]

# Images of the frequencies, in elements, that are scaled and summed at once: two operations, where
# one image after the other needs no memory for all of them.
AT_ONCE = 2**16


def dct_basis(kernel: tuple[int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns the orthonormal 2-D DCT-II, one image for each frequency (u, v).

    B[u, v, y, x] = a(u)·cos(π(2y+1)u / 2KH) · b(v)·cos(π(2x+1)v / 2KW), with a(0)² = 1/KH and
    a(u)² = 2/KH otherwise, and so for b. Σ_yx B[i, y, x]·B[j, y, x] is 1 for i = j and else 0.

    # [KH·KW, KH, KW]
    """
    sides = []
    for size in kernel:
        u = torch.arange(size, dtype=torch.float64)[:, None]
        x = torch.arange(size, dtype=torch.float64)[None]
        side = torch.cos(math.pi * (2 * x + 1) * u / (2 * size)) * math.sqrt(2 / size)
        side[0] /= math.sqrt(2)
        sides.append(side)
    rows, columns = sides
    basis = rows[:, None, :, None] * columns[None, :, None, :]
    return basis.reshape(-1, *kernel).to(dtype)


def dct(weight: Tensor) -> Tensor:
    """Transforms each kernel: coefficient (u, v) stands where tap (y, x) was.

    # [F, C, KH, KW] -> [F, C, KH, KW]
    """
    basis = dct_basis((weight.shape[2], weight.shape[3]), weight.dtype).to(weight.device)
    return torch.einsum("fcyx,iyx->fci", weight, basis).reshape(weight.shape)


def idct(coefficients: Tensor) -> Tensor:
    """Transforms back.  # [F, C, KH, KW] -> [F, C, KH, KW]"""
    shape = coefficients.shape
    basis = dct_basis((shape[2], shape[3]), coefficients.dtype).to(coefficients.device)
    return torch.einsum("fci,iyx->fcyx", coefficients.flatten(2), basis)


def to_spatial(masked: Tensor, channels: int, images: Tensor, multiplied: bool) -> Tensor:
    """Sums the images of the frequencies, scaled by their coefficients.

    Args:
        masked: coefficients, dead ones zero.  # [F, C·frequencies, 1, 1]
        channels: C.
        images: of the frequencies.  # [frequencies, KH, KW]
        multiplied: whether a product of matrices may do it, several times as fast: an observer
            (a counter of FLOPs) would count that as work of the convolution.

    Returns:
        The kernels.  # [F, C, KH, KW]
    """
    images = images.to(masked)
    # Not where a product may round its operands: TF32, or bfloat16 by PyTorch's own setting.
    if multiplied and masked.is_cpu and torch.get_float32_matmul_precision() == "highest":
        kernels = masked.reshape(-1, len(images)) @ images.flatten(1)
        return kernels.view(len(masked), channels, *images.shape[1:])
    coefficients = masked.reshape(len(masked), channels, len(images), 1, 1)
    if masked.numel() * images[0].numel() <= AT_ONCE:
        return (coefficients * images).sum(2)
    terms, scaled = coefficients.unbind(2), images.unbind(0)
    total = terms[0] * scaled[0]
    for term, image in zip(terms[1:], scaled[1:], strict=True):
        total = torch.addcmul(total, term, image)
    return total
