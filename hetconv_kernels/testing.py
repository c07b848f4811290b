# SPDX-License-Identifier: Apache-2.0
"""What tests of engines share: the oracle, the literal Plan executor, error bounds, poison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.common import crop_image, pad_image
from .backends.triton.plan import Plan
from .packing import mask_on
from .problem import Geometry

__all__ = [
    "error_bound",
    "execute_dgrad",
    "execute_fprop",
    "execute_wgrad",
    "oracle",
    "pack_slabs",
]


def oracle(x: Tensor, w: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """Computes the truth: ``F.conv2d`` on the masked dense weight, padded explicitly.

    Args:
        x: activations.  # [N, C, H, W]
        w: dense weight, dead entries holding anything.  # [F, C, KH, KW]
        geometry: Support, stride, pads, dilation.
        bias: per filter.  # [F]

    Returns:
        y, differentiable by PyTorch itself.  # [N, F, OH, OW]
    """
    masked = torch.where(mask_on(geometry.support, w.device), w, torch.zeros_like(w))
    return F.conv2d(
        pad_image(x, geometry.pads), masked, bias, geometry.stride, 0, geometry.dilation
    )


def error_bound(magnitude: Tensor, depth: int, dtype: torch.dtype) -> Tensor:
    """Bounds the error of each result from the depth of its accumulation.

    A result is a sum of `depth` products. Accumulated in float32 (float64 for float64), the sum
    errs by about √depth roundings of the products' total magnitude; a 16-bit result adds its own
    rounding, and where partial sums are kept in 16 bits, theirs.

    Args:
        magnitude: the same result computed from absolute values.
        depth: products in one result.
        dtype: of operands and result.

    Returns:
        An absolute bound for each result.  # like magnitude
    """
    wide = torch.promote_types(dtype, torch.float32)
    relative = 2 * (depth**0.5 + 2) * torch.finfo(wide).eps
    if dtype != wide:
        relative += 2 * torch.finfo(dtype).eps
    return relative * magnitude + torch.finfo(dtype).tiny


def pack_slabs(plan: Plan, w: Tensor) -> Tensor:
    """Packs a dense weight into the slabs of a Plan, zero where a slab has no live weight.

    Args:
        plan: the lowering; slab s of a step is [channels of the run, filters of the block].
        w: dense weight; dead entries are ignored.  # [F, C, KH, KW]

    Returns:
        The slabs one after another.  # [plan.slab_size]
    """
    source = torch.as_tensor(plan.slab_source, device=w.device)
    flat = w.contiguous().view(-1)[source.clamp(min=0)]
    return flat.masked_fill(source < 0, 0)


def execute_fprop(plan: Plan, geometry: Geometry, x: Tensor, slabs: Tensor) -> Tensor:
    """Runs a Plan's fprop literally: segment by segment, step by step.

    Args:
        plan: the lowering.
        geometry: stride, pads and dilation.
        x: activations.  # [N, C, H, W]
        slabs: packed weights.  # [plan.slab_size]

    Returns:
        y.  # [N, F, OH, OW]
    """
    padded = pad_image(x, geometry.pads)
    y = torch.full(
        (x.shape[0], geometry.support.filters, *geometry.output_size(*x.shape[2:])),
        float("nan"),
        dtype=x.dtype,
    )
    for s in range(len(plan.segments) - 1):
        filters = plan.rows[plan.segments[s] : plan.segments[s + 1]]
        acc = torch.zeros(x.shape[0], plan.block.filters, *y.shape[2:], dtype=x.dtype)
        for step in plan.steps[plan.starts[s] : plan.starts[s + 1]]:
            view = _window(padded, plan, geometry, step, y.shape[2:])
            acc += torch.einsum("nchw,cf->nfhw", view, _slab(plan, slabs, step))
        y[:, torch.as_tensor(filters)] = acc[:, : len(filters)]
    return y


def execute_dgrad(
    plan: Plan, geometry: Geometry, size: tuple[int, int], dy: Tensor, slabs: Tensor
) -> Tensor:
    """Runs a Plan's dgrad literally: every step adds to the channels that it reads.

    Args:
        plan: the lowering.
        geometry: stride, pads and dilation.
        size: height and width of x, in pixels.
        dy: gradient of y.  # [N, F, OH, OW]
        slabs: packed weights.  # [plan.slab_size]

    Returns:
        dx.  # [N, C, H, W]
    """
    top, bottom, left, right = geometry.pads
    channels = geometry.support.channels
    shape = (dy.shape[0], channels, size[0] + top + bottom, size[1] + left + right)
    padded = torch.zeros(shape, dtype=dy.dtype)
    for segment, step in zip(plan.owner, plan.steps, strict=True):
        filters = plan.rows[plan.segments[segment] : plan.segments[segment + 1]]
        slab = _slab(plan, slabs, step)[:, : len(filters)]
        part = torch.einsum("nfhw,cf->nchw", dy[:, torch.as_tensor(filters)], slab)
        rows, cols = _pixels(geometry, step, dy.shape[2:])
        read = plan.cols[step["channel"] : step["channel"] + step["count"]]
        index = torch.as_tensor(read)[:, None, None], rows[:, None], cols[None, :]
        padded[:, *index] += part
    return crop_image(padded, geometry.pads)


def execute_wgrad(plan: Plan, geometry: Geometry, dy: Tensor, x: Tensor) -> Tensor:
    """Runs a Plan's wgrad literally: one slab a step.

    Args:
        plan: the lowering.
        geometry: stride, pads and dilation.
        dy: gradient of y.  # [N, F, OH, OW]
        x: activations.  # [N, C, H, W]

    Returns:
        The gradient of the slabs.  # [plan.slab_size]
    """
    padded = pad_image(x, geometry.pads)
    slabs = torch.zeros(plan.slab_size, dtype=x.dtype)
    for segment, step in zip(plan.owner, plan.steps, strict=True):
        filters = plan.rows[plan.segments[segment] : plan.segments[segment + 1]]
        view = _window(padded, plan, geometry, step, dy.shape[2:])
        part = torch.einsum("nchw,nfhw->cf", view, dy[:, torch.as_tensor(filters)])
        _slab(plan, slabs, step)[:, : len(filters)] = part
    return slabs


def _slab(plan: Plan, slabs: Tensor, step: object) -> Tensor:
    """Returns the step's view into the packed weights.  # [count, block.filters]"""
    offset, count = int(step["slab"]), int(step["count"])  # type: ignore[index]
    return slabs[offset : offset + count * plan.block.filters].view(count, -1)


def _pixels(geometry: Geometry, step: object, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the padded rows and columns that a step reads for the output pixels."""
    rows, cols = (
        torch.arange(n) * stride + int(step[name]) * dilation  # type: ignore[index]
        for n, stride, dilation, name in zip(
            size, geometry.stride, geometry.dilation, ("dy", "dx"), strict=True
        )
    )
    return rows, cols


def _window(
    padded: Tensor, plan: Plan, geometry: Geometry, step: object, size: Sequence[int]
) -> Tensor:
    """Returns what a step reads, laid out as the output pixels.  # [N, count, OH, OW]"""
    rows, cols = _pixels(geometry, step, size)
    first, count = int(step["channel"]), int(step["count"])  # type: ignore[index]
    channels = torch.as_tensor(plan.cols[first : first + count])
    return padded[:, channels][:, :, rows][:, :, :, cols]
