# SPDX-License-Identifier: Apache-2.0
"""frequency_weights: what transforms a layer's coefficients back, kept with their Support."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import masking
from ..packing import FrozenCache, dense_weight, mask_on, owned
from ..support import Support
from .dct import dct_basis, to_spatial


def spatial_cache(
    support: Support, channels: int, kernel: tuple[int, int], frequencies: tuple[int, ...]
) -> FrozenCache:
    """Returns what keeps the spatial weight of a frozen layer, as the live vector of a dense one.

    Args:
        support: of the coefficients.
        channels: of the layer's input.
        kernel: its size (KH, KW).
        frequencies: that some coefficient has.
    """
    key = ("spatial weight", channels, kernel, frequencies)
    cache: FrozenCache | None = support.derived.get(key)
    if cache is None:
        images = dct_basis(kernel)[list(frequencies)]

        def build(live: Tensor) -> Tensor:
            dense = dense_weight(support, live.detach(), live.dtype)
            return owned(to_spatial(dense, channels, images, True).flatten())

        cache = support.derived[key] = FrozenCache(build, "frequency")
    return cache


def image_sums(
    support: Support, kernel: tuple[int, int], frequencies: tuple[int, ...], last: bool
) -> masking.ImageSums:
    """Returns what sums the images of a layer's frequencies by the compiled engine, on the CPU.

    Arguments as `spatial_cache`; ``last`` asks for a weight in channels_last.
    """
    key = ("images", kernel, frequencies, last)
    sums: masking.ImageSums | None = support.derived.get(key)
    if sums is None:
        with torch.inference_mode(False), torch.no_grad():
            images = dct_basis(kernel, torch.float32)[list(frequencies)].contiguous()
            mask = mask_on(support, images.device)
            mask = mask.view(support.filters, -1, len(frequencies)).transpose(1, 2).contiguous()
            sums = support.derived[key] = masking.ImageSums(mask, images, last)
    return sums
