# SPDX-License-Identifier: Apache-2.0
"""Compositions: the convolution of a Support out of convolutions that every runtime has.

A runtime that knows only dense and grouped convolutions multiplies with the zeros of any other
Support. Where the Support allows it, fewer and smaller convolutions compute the same:

    HetConv         y = grouped K×K (x) + 1×1 (x)
    self-grouping   y = [ K×K (x's channels of group 1) | K×K (channels of group 2) | … ] reordered
    both            where HetConv's groups are uneven or interleaved
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .backends.common import pad_image
from .errors import ArgumentError, mismatch
from .masks import BoolArray, IntArray
from .packing import own_blocks
from .problem import Geometry, Pads
from .support import Support

FORMS = ("dense", "composition")
# One convolution for each group of a Support; with more, the calls cost more than they save.
MOST_PARTS = 64


def check_form(form: str) -> None:
    """Refuses a name that is no form.

    Raises:
        ArgumentError: it is not ``"dense"`` or ``"composition"``.
    """
    if form not in FORMS:
        raise ArgumentError(mismatch("form", repr(form), f"one of {', '.join(FORMS)}"))


class ConvPart(NamedTuple):
    """One convolution of a composition: some filters of the layer over some of its channels.

    Attributes:
        filters: whose weights it has, in its order; None for all.  # [members]
        channels: that it reads, in its order; None for all.  # [channels of the part]
        groups: equal groups in that order.
        own: the weights that it multiplies with, of all of the layer's.  # bool [F, C, KH, KW]
        centre: the one tap that it has, as a 1×1 convolution; None for the whole kernel.
    """

    filters: IntArray | None
    channels: IntArray | None
    groups: int
    own: BoolArray
    centre: tuple[int, int] | None = None

    def weight(self, dense: Tensor) -> Tensor:
        """Takes this part's weights out of the dense ones.

        # [F, C, KH, KW] -> [members, C/groups, KH, KW] or [members, C/groups, 1, 1]
        """
        w = torch.where(torch.from_numpy(self.own.copy()).to(dense.device), dense, 0)
        if self.filters is not None:
            w = w[index_of(self.filters, dense.device)]
        if self.channels is not None and self.groups == 1:
            w = w[:, index_of(self.channels, dense.device)]
        elif self.channels is not None:
            # Each group reads its own share of the gathered channels.
            share = index_of(self.channels, dense.device).view(self.groups, -1)
            blocks = w.view(self.groups, -1, *w.shape[1:])
            w = torch.cat([b[:, own] for b, own in zip(blocks, share, strict=True)])
        elif self.groups > 1:
            w = own_blocks(w.contiguous(), self.groups)
        if self.centre is not None:
            row, column = self.centre
            w = w[:, :, row : row + 1, column : column + 1]
        return w.contiguous()

    @property
    def multiplies(self) -> int:
        """Multiplications for a pixel of the output, zeros among the weights counted."""
        f, c, kh, kw = self.own.shape
        filters = f if self.filters is None else len(self.filters)
        channels = c if self.channels is None else len(self.channels)
        return filters * channels * (1 if self.centre else kh * kw) // self.groups


class Composition(NamedTuple):
    """The convolutions that a layer is composed of.

    Attributes:
        parts: whose results are concatenated.
        order: where each filter of the layer is in that; None where they are in order.  # [F]
        pointwise: the 1×1 convolution that is added to it, if there is one.
    """

    parts: tuple[ConvPart, ...]
    order: IntArray | None
    pointwise: ConvPart | None

    @property
    def multiplies(self) -> int:
        """Multiplications for a pixel of the output."""
        all_parts = self.parts if self.pointwise is None else (*self.parts, self.pointwise)
        return sum(part.multiplies for part in all_parts)


def compose(geometry: Geometry) -> Composition | None:
    """Finds the composition of a convolution that multiplies less than the dense or grouped one.

    Args:
        geometry: Support, stride, pads and dilation.

    Returns:
        The composition; None where there is none, which a single convolution of equal groups,
        many groups of a few filters and taps without structure have in common.
    """
    support = geometry.support
    if support.uniform_groups is not None:
        return None
    found = _with_pointwise(geometry) or _composed(support, None)
    f, c, kh, kw = support.shape
    return None if found is None or found.multiplies >= f * c * kh * kw else found


def _with_pointwise(geometry: Geometry) -> Composition | None:
    """HetConv: what has only its centre tap becomes a 1×1 convolution."""
    mask = geometry.support.mask
    kh, kw = mask.shape[2:]
    row, column = kh // 2, kw // 2
    whole: BoolArray = np.asarray(mask.all((2, 3)))
    alone = mask[:, :, row, column] & ~whole
    if kh * kw == 1 or not alone.any() or not whole.any():
        return None
    if int(mask.sum()) != int(whole.sum()) * kh * kw + int(alone.sum()):
        return None
    if any(pad < 0 for pad in pointwise_pads(geometry)):
        return None
    own = np.zeros_like(mask)
    own[:, :, row, column] = alone
    rings = Support.from_mask(mask & whole[:, :, None, None])
    return _composed(rings, ConvPart(None, None, 1, own, (row, column)))


def pointwise_pads(geometry: Geometry) -> Pads:
    """Returns the pads with which the centre tap alone gives an output of the same size."""
    kh, kw = geometry.support.kernel
    top, bottom, left, right = geometry.pads
    row, column = geometry.dilation[0] * (kh // 2), geometry.dilation[1] * (kw // 2)
    last = geometry.dilation[0] * (kh - 1) - row, geometry.dilation[1] * (kw - 1) - column
    return top - row, bottom - last[0], left - column, right - last[1]


def _composed(support: Support, pointwise: ConvPart | None) -> Composition | None:
    mask, groups = support.mask, support.groups
    if support.uniform_groups is not None:
        return Composition((ConvPart(None, None, support.uniform_groups, mask),), None, pointwise)
    if len(groups) > MOST_PARTS:
        return None
    # A group that has no weights is a zero weight on one channel.
    channels = [_some(np.flatnonzero(g.mask.any(axis=(1, 2)))) for g in groups]
    filters = np.concatenate([g.filters for g in groups])
    order: IntArray | None = np.argsort(filters)
    if np.array_equal(filters, np.arange(len(filters))):
        order = None
    if len({(len(g.filters), len(c)) for g, c in zip(groups, channels, strict=True)}) == 1:
        one = ConvPart(filters, np.concatenate(channels), len(groups), mask)
        return Composition((one,), order, pointwise)
    parts = tuple(ConvPart(g.filters, c, 1, mask) for g, c in zip(groups, channels, strict=True))
    return Composition(parts, order, pointwise)


def _some(channels: IntArray) -> IntArray:
    return channels if len(channels) else np.zeros(1, dtype=np.int64)


def index_of(numbers: IntArray, device: torch.device) -> Tensor:
    """Returns indices as a tensor.  # int64"""
    return torch.as_tensor(numbers.copy(), dtype=torch.int64, device=device)


def split_pads(pads: Pads) -> tuple[Pads, tuple[int, int]]:
    """Splits pads into those that go around the image first and those that ``conv2d`` adds."""
    top, bottom, left, right = pads
    if top == bottom and left == right:
        return (0, 0, 0, 0), (top, left)
    return pads, (0, 0)


class ComposedConv2d(nn.Module):
    """A convolution as a composition of ``nn.Conv2d``: what `export.plain` makes of a Support.

    Args:
        geometry: Support, stride, pads and dilation.
        composition: what `compose` found for it.
        weight: dense, dead weights zero.  # [F, C, KH, KW]
        bias: of the filters, or None.  # [F]
    """

    order: Tensor | None

    def __init__(
        self, geometry: Geometry, composition: Composition, weight: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        device = weight.device
        rings, point = composition.parts, composition.pointwise
        alone = point is None
        self.rings = nn.ModuleList(
            _PartConv2d(geometry, part, geometry.pads, weight, bias if alone else None)
            for part in rings
        )
        self.pointwise = None
        if point is not None:
            pads = pointwise_pads(geometry)
            self.pointwise = _PartConv2d(geometry, point, pads, weight, bias)
        order = composition.order
        self.register_buffer("order", None if order is None else index_of(order, device))

    def forward(self, x: Tensor) -> Tensor:
        """Convolves.  # [N, C, H, W] -> [N, F, OH, OW]"""
        y = joined_results([ring(x) for ring in self.rings], self.order)
        return y if self.pointwise is None else y + self.pointwise(x)


def joined_results(results: list[Tensor], order: Tensor | None) -> Tensor:
    """Concatenates the results of parts and puts the filters into the layer's order."""
    y = results[0] if len(results) == 1 else torch.cat(results, 1)
    return y if order is None else y.index_select(1, order)


class _PartConv2d(nn.Module):
    channels: Tensor | None

    def __init__(
        self, geometry: Geometry, part: ConvPart, pads: Pads, weight: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        w = part.weight(weight.detach())
        device = weight.device
        channels = None if part.channels is None else index_of(part.channels, device)
        self.register_buffer("channels", channels)
        self.pads, padding = split_pads(pads)
        self.conv = nn.Conv2d(
            w.shape[1] * part.groups, len(w), (w.shape[2], w.shape[3]), geometry.stride, padding,
            1 if part.centre else geometry.dilation, part.groups, bias is not None,
            device="meta", dtype=w.dtype,
        )  # fmt: skip
        self.conv.weight = nn.Parameter(w, weight.requires_grad)
        if bias is not None:
            own = bias if part.filters is None else bias[index_of(part.filters, device)]
            self.conv.bias = nn.Parameter(own.detach().clone(), bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.channels is None else x.index_select(1, self.channels)
        y: Tensor = self.conv(pad_image(x, self.pads) if any(self.pads) else x)
        return y
