# SPDX-License-Identifier: Apache-2.0
"""Layers restricted to some of their filters and channels, in any order."""

from __future__ import annotations

from functools import cached_property
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..masks import BoolArray, IntArray
from ..nn import GroupedConv2d, HetConv2d, SupportConv2d, SupportLinear
from ..nn.conv import expanded_weight
from ..packing import mask_on, own_blocks
from ..problem import memory_format
from ..support import Support
from .copying import copied

Norm = nn.BatchNorm1d | nn.BatchNorm2d
Normalisation = TypeVar("Normalisation", bound=nn.Module)


class LayerMatrix:
    """A convolution or fully connected layer seen as a matrix of filters × channels.

    Args:
        module: an ``nn.Conv2d``, ``nn.Linear`` or one of this package's.

    Attributes:
        filters: F.
        channels: C.
        support: which weights may be other than zero.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        weight = self._dense()
        self.filters, self.channels = weight.shape[:2]
        if isinstance(module, SupportConv2d | SupportLinear):
            self.support = module.support
        elif isinstance(module, nn.Conv2d):
            self.support = expanded_weight(module)[1]
        else:
            self.support = Support.dense(self.channels, self.filters, 1)
        # What `merge` adds to the weights on one channel: (channel, channels, [F, KH, KW]).
        self._merged: tuple[int, IntArray, Tensor] | None = None

    @property
    def merges(self) -> bool:
        """Whether `merge` can be used: equal groups would not stay equal."""
        conv = isinstance(self.module, nn.Conv2d | SupportConv2d)
        return conv and self.support.uniform_groups in (None, 1)

    def merge(self, into: int, channels: IntArray, ratios: Tensor) -> None:
        """Lets one channel stand for others that are multiples of it, from the next `take` on.

        Args:
            into: the channel that stands for them.
            channels: the others.
            ratios: what each is a multiple of.  # float64 [len(channels)]
        """
        weight = self._dense()
        columns = weight[:, torch.as_tensor(channels, device=weight.device)].double()
        added = torch.einsum("fcyx,c->fyx", columns, ratios.to(weight.device))
        self._merged = into, channels, added

    @property
    def padded(self) -> bool:
        """Whether zeros around the image make a constant channel differ at the border."""
        module = self.module
        if isinstance(module, SupportConv2d):
            return any(module._geometry.pads)
        if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
            return False
        if isinstance(module.padding, str):
            return module.padding == "same" and max(module.kernel_size) > 1
        return any(module.padding)

    @property
    def bias(self) -> Tensor | None:
        """The bias.  # [F]"""
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return None if bias is None else bias.detach()

    @cached_property
    def reads(self) -> BoolArray:
        """Tells which filters have a weight other than zero on which channels.  # bool [F, C]"""
        found: BoolArray = self._dense().ne(0).flatten(2).any(2).cpu().numpy()
        return found

    def sums(self, channels: IntArray) -> Tensor:
        """Sums the weights on some channels over the taps.  # float64 [F, len(channels)]"""
        index = torch.as_tensor(channels, device=self.module.weight.device)  # type: ignore
        return self._dense().index_select(1, index).double().flatten(2).sum(2)

    def take(self, filters: IntArray, channels: IntArray, shift: Tensor | None = None) -> nn.Module:
        """Makes the layer of some filters and channels.

        Dense weights give an ordinary ``nn.Conv2d`` or ``nn.Linear``, equal groups stay groups,
        anything else keeps a Support.

        Args:
            filters: which, in their new order.
            channels: which, in their new order.
            shift: added to the bias, one for each of all filters.  # float64 [F]

        Returns:
            The layer itself where nothing changes, else a new one with copies of its weights.
        """
        same = np.array_equal(filters, np.arange(self.filters)) and np.array_equal(
            channels, np.arange(self.channels)
        )
        if same and shift is None and self._merged is None:
            return self.module
        weight = self._dense()
        if self._merged is not None:
            into, others, added = self._merged
            weight = weight.clone(memory_format=torch.preserve_format)
            weight[:, into] = (weight[:, into].double() + added).to(weight.dtype)
        form = memory_format(weight, weight)
        rows, columns = (torch.as_tensor(i, device=weight.device) for i in (filters, channels))
        taken = weight.index_select(0, rows).index_select(1, columns).contiguous(memory_format=form)
        bias = self.bias
        if shift is not None:
            whole = shift if bias is None else shift + bias.double()
            bias = whole.to(weight.dtype)
        if bias is not None:
            bias = bias.index_select(0, rows)
        mask = self.support.mask
        if self._merged is not None:
            mask = mask.copy()
            mask[:, into] |= mask[:, others].any(1)
        mask = mask[np.ix_(filters, channels)]
        support = self.support if same else Support.from_mask(mask, self.support.kind)
        return self._build(taken, bias, support)

    def _dense(self) -> Tensor:
        module = self.module
        if isinstance(module, SupportConv2d | SupportLinear):
            weight = module.dense_weight()
            if isinstance(module, GroupedConv2d):
                return _spread(weight, module.support)
        elif isinstance(module, nn.Conv2d):
            weight = expanded_weight(module)[0]
        else:
            weight = cast(Tensor, module.weight).detach()
        return weight if weight.dim() == 4 else weight[:, :, None, None]

    def _build(self, weight: Tensor, bias: Tensor | None, support: Support) -> nn.Module:
        """Makes a module of the plainest class that holds the weights."""
        old = self.module
        f, c = weight.shape[:2]
        forced = getattr(old, "backend", None)
        more = {} if forced is None else {"backend": forced}
        if isinstance(old, nn.Linear | SupportLinear):
            linear = nn.Linear(c, f, bias is not None, "meta", weight.dtype)
            _fill(linear, old, weight.flatten(1), bias)
            plain = isinstance(old, nn.Linear) or (support.is_dense and not more)
            return linear if plain else SupportLinear.from_linear(linear, support, **more)
        assert isinstance(old, nn.Conv2d | SupportConv2d)
        groups = support.uniform_groups or 1

        def conv2d(weight: Tensor, groups: int) -> nn.Conv2d:
            conv = nn.Conv2d(
                c, f, old.kernel_size, old.stride, old.padding, old.dilation, groups,  # type: ignore
                bias is not None, old.padding_mode, "meta", weight.dtype,  # type: ignore
            )  # fmt: skip
            _fill(conv, old, weight, bias)
            return conv

        if groups > 1 and isinstance(old, nn.Conv2d | GroupedConv2d):
            grouped = conv2d(own_blocks(weight.contiguous(), groups), groups)
            plain = isinstance(old, nn.Conv2d)
            return grouped if plain else GroupedConv2d.from_conv2d(grouped, **more)
        dense = conv2d(weight, 1)
        if support.is_dense and not more:
            return dense
        if isinstance(old, HetConv2d) and old.p <= c:  # noqa: SIM102
            if support == Support.het(c, f, old.kernel_size, old.p, "blocked"):
                return HetConv2d.from_conv2d(dense, old.p, "blocked", **more)
        return SupportConv2d.from_conv2d(dense, support, **more)


def take_norm(norm: Norm, channels: IntArray) -> Norm:
    """Makes the batch normalisation of some channels, in their new order."""
    assert norm.running_mean is not None
    if np.array_equal(channels, np.arange(len(norm.running_mean))):
        return norm
    new = _taken(norm, channels)
    new.num_features = len(channels)
    return new


def take_group_norm(norm: nn.GroupNorm, channels: IntArray) -> nn.GroupNorm:
    """Makes the group normalisation of some whole groups of channels."""
    if np.array_equal(channels, np.arange(norm.num_channels)):
        return norm
    new = _taken(norm, channels)
    new.num_groups = len(channels) // (norm.num_channels // norm.num_groups)
    new.num_channels = len(channels)
    return new


def _taken(norm: Normalisation, channels: IntArray) -> Normalisation:
    """Copies a normalisation with what it has for some channels."""
    new = copied(norm)
    index = torch.as_tensor(channels)
    for owner in ("_parameters", "_buffers"):
        for key, old in getattr(norm, owner).items():
            if old is None:
                continue
            taken = old.detach()
            taken = taken.index_select(0, index.to(old.device)) if old.dim() else taken.clone()
            if owner == "_parameters":
                taken = nn.Parameter(taken, requires_grad=old.requires_grad)
            getattr(new, owner)[key] = taken
    return new


def _fill(new: nn.Module, old: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    trained = bool(old.weight.requires_grad)
    new.weight = nn.Parameter(weight.contiguous() if weight.dim() < 4 else weight, trained)
    if bias is not None:
        new.bias = nn.Parameter(bias, trained)
    new.train(old.training)


def _spread(blocks: Tensor, support: Support) -> Tensor:
    """Writes a grouped weight [F, C/g, KH, KW] into the dense one.  # [F, C, KH, KW]"""
    mask = mask_on(support, blocks.device)
    dense = torch.zeros(mask.shape, dtype=blocks.dtype, device=blocks.device)
    return dense.masked_scatter_(mask, blocks)
