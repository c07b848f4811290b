# SPDX-License-Identifier: Apache-2.0
"""The three primitives in plain PyTorch, group by group: what every engine has to equal.

For each group of filters that share columns: select the channels that the group reads, convolve
with ``F.conv2d`` (or its two gradients), put the result into place. Readable first; the engines
are for speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .backends.common import crop_image, pad_image
from .problem import Geometry


def group_fprop(geometry: Geometry, x: Tensor, w: Tensor) -> Tensor:
    """Computes conv(x, w); dead entries of w must be zero.

    Args:
        geometry: Support, stride, pads, dilation.
        x: activations.  # [N, C, H, W]
        w: dense weight.  # [F, C, KH, KW]

    Returns:
        y.  # [N, F, OH, OW]
    """
    oh, ow = geometry.output_size(x.shape[2], x.shape[3])
    y = x.new_zeros(x.shape[0], geometry.support.filters, oh, ow)
    if not x.shape[0]:
        return y
    padded = pad_image(x, geometry.pads)
    for filters, channels in _groups(geometry, x.device):
        y[:, filters] = F.conv2d(
            padded.index_select(1, channels),
            w[filters].index_select(1, channels),
            stride=geometry.stride,
            dilation=geometry.dilation,
        )
    return y


def group_dgrad(geometry: Geometry, height: int, width: int, dy: Tensor, w: Tensor) -> Tensor:
    """Computes dx; dead entries of w must be zero.

    Args:
        geometry: Support, stride, pads, dilation.
        height: input height, in pixels.
        width: input width, in pixels.
        dy: gradient of y.  # [N, F, OH, OW]
        w: dense weight.  # [F, C, KH, KW]

    Returns:
        dx.  # [N, C, H, W]
    """
    top, bottom, left, right = geometry.pads
    n, channels_in = dy.shape[0], geometry.support.channels
    # Groups overlap in channels, so their sums are kept wider than 16 bits.
    wide = torch.float32 if dy.dtype.itemsize == 2 else dy.dtype
    padded = torch.zeros(
        n, channels_in, height + top + bottom, width + left + right, dtype=wide, device=dy.device
    )
    if n:
        for filters, channels in _groups(geometry, dy.device):
            part = conv2d_input(
                (n, len(channels), *padded.shape[2:]),
                w[filters].index_select(1, channels),
                dy[:, filters],
                stride=geometry.stride,
                dilation=geometry.dilation,
            )
            padded.index_add_(1, channels, part.to(wide))
    return crop_image(padded, geometry.pads).to(dy.dtype)


def group_wgrad(geometry: Geometry, dy: Tensor, x: Tensor) -> Tensor:
    """Computes dw; entries outside the Support are whatever the dense product gives, or zero.

    Args:
        geometry: Support, stride, pads, dilation.
        dy: gradient of y.  # [N, F, OH, OW]
        x: activations.  # [N, C, H, W]

    Returns:
        dw, dense.  # [F, C, KH, KW]
    """
    dw = x.new_zeros(geometry.support.shape)
    if not x.shape[0]:
        return dw
    padded, stride = pad_image(x, geometry.pads), geometry.stride
    if geometry.support.kernel == (1, 1):  # oneDNN 3.12 may crash on its own choice of the pixels
        padded, stride = padded[:, :, :: stride[0], :: stride[1]], (1, 1)
    for filters, channels in _groups(geometry, x.device):
        part = conv2d_weight(
            padded.index_select(1, channels),
            (len(filters), len(channels), *geometry.support.kernel),
            dy[:, filters],
            stride=stride,
            dilation=geometry.dilation,
        )
        dw[filters[:, None], channels[None, :]] = part
    return dw


def _groups(geometry: Geometry, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each group's filters and the channels it reads; groups that read none are left out."""
    for group in geometry.support.groups:
        channels = np.flatnonzero(group.mask.any((1, 2)))
        if len(channels):
            yield (
                torch.tensor(group.filters, device=device),
                torch.tensor(channels, device=device),
            )
