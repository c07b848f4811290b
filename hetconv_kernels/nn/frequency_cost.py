# SPDX-License-Identifier: Apache-2.0
"""frequency_cost: what both ways of a `FrequencyConv2d` are predicted to take."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import masking, ops
from ..backends import choose
from ..backends.cost_model import INVERSE, INVERSE_CALL, SUMMED
from ..observers import sizes
from ..problem import Geometry
from .dct import AT_ONCE

if TYPE_CHECKING:
    from .frequency import FrequencyConv2d


def frequency_seconds(layer: FrequencyConv2d, x: Tensor, frozen: bool) -> float:
    """Predicts the way of the frequencies: the transform, and the 1×1 convolution of its maps.

    Args:
        layer: the layer.
        x: an input; only its shape, layout, dtype and device count.
        frozen: as if the layer were frozen, or not.
    """
    shape, mix = sizes(x), layer.mix
    weight = mix.weight.new_empty(mix.support.live, device="meta") if frozen else mix.weight
    transform = layer._transform_frozen if frozen else layer._transform
    basis = layer.basis.flatten() if frozen else layer.basis
    filters, size = transform.support.filters, transform.output_size(shape[2], shape[3])
    last = torch.channels_last if not x.is_contiguous() else torch.contiguous_format
    maps = torch.empty((shape[0], filters, *size), dtype=x.dtype, device="meta")
    maps = maps.contiguous(memory_format=last)
    mixed = replace(mix._geometry, frozen=frozen)
    return _seconds(layer, transform, x, x, basis) + _seconds(layer, mixed, maps, x, weight)


def spatial_seconds(layer: FrequencyConv2d, x: Tensor, frozen: bool) -> float:
    """Predicts the way in space: the kernels transformed back, and the dense convolution.

    A frozen layer transforms them once. Other layers sum the images of their frequencies, and mask
    and lay out the weights, at each call. Arguments as `frequency_seconds`.
    """
    geometry = layer._spatial_frozen if frozen else layer._spatial
    dense = x.new_empty(geometry.support.shape, device="meta")
    seconds = _seconds(layer, geometry, x, x, dense.flatten() if frozen else dense)
    if frozen:
        return seconds
    count = len(layer.live_frequencies)
    images = count * dense.numel()
    if x.is_cpu and x.dtype == torch.float32 and masking.native_engine() is not None:
        return seconds + images * SUMMED + INVERSE_CALL
    return seconds + images * INVERSE + (2 if images <= AT_ONCE else count) * INVERSE_CALL


def _seconds(
    layer: FrequencyConv2d, geometry: Geometry, maps: Tensor, x: Tensor, weight: Tensor
) -> float:
    """Predicts one convolution, by whatever engine would run it."""
    size = (sizes(maps)[2], sizes(maps)[3])
    problem = ops.describe("fprop", geometry, maps, maps, weight, size, {})
    problem = replace(problem, device=x.device, weight_dtype=x.dtype)
    return choose(problem, layer._backend_code()).backend.estimate(problem)
