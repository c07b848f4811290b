# SPDX-License-Identifier: Apache-2.0
"""What our layers are compared with: dense convolutions, and compositions a user could write.

*Dense* is ``nn.Conv2d`` of the whole layer, in both memory formats. *Composition* is the same
function as our layer out of PyTorch's own operators: a grouped convolution plus a 1×1 for HetConv,
a gather and a convolution per group for self-grouping, a mask multiplied in at every call. The two
are different questions (what is saved, and what our kernels add) and get a column each.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import hetconv_kernels as hk
from benchmarks.cases import Case

MOST_GATHERED_GROUPS = 64


def dense_baseline(case: Case, weight: Tensor) -> nn.Module:
    """The whole layer as one ``nn.Conv2d``; dead weights are zeros that it multiplies with."""
    return _conv(case.c, case.f, case.k, weight, stride=case.stride)


def compositions(case: Case, support: hk.Support, weight: Tensor) -> dict[str, nn.Module]:
    """The ways in which a user could write this layer without us, each equal to it."""
    kind, groups = case.support.kind, support.groups
    if kind == "dense":
        return {}
    if kind == "grouped":
        return {"grouped": _grouped(case, case.support.value, weight)}
    if kind == "het":
        p = case.support.value
        if case.support.order == "blocked" and case.c % p == 0 and case.f % p == 0:
            return {"grouped+1x1": GroupedPlusPointwise(case, p, weight)}
        return {"gather+1x1": GatherPlusPointwise(case, support, weight)}
    found: dict[str, nn.Module] = {"mask-per-call": MaskPerCall(case, support, weight)}
    if kind == "learned_groups":
        found["gather+grouped"] = GatherGrouped(case, support, weight)
    if kind != "irregular" and len(groups) <= MOST_GATHERED_GROUPS:
        found["gather-per-group"] = GatherPerGroup(case, support, weight)
    return found


def prepacked(module: nn.Module, x: Tensor) -> nn.Module:
    """Compiles a module with its weights frozen, which lets oneDNN pack them once (inductor)."""
    from torch._inductor import config

    with config.patch(freezing=True), torch.no_grad():
        compiled = cast(nn.Module, torch.compile(module.eval(), fullgraph=True))
        compiled(x)  # compiles while the option holds
    return compiled


class GroupedPlusPointwise(nn.Module):
    """HetConv as it is published: a grouped K×K convolution plus a 1×1 on all channels."""

    def __init__(self, case: Case, p: int, weight: Tensor) -> None:
        super().__init__()
        centre = weight[:, :, case.k // 2, case.k // 2].clone()
        filters, channels = case.f // p, case.c // p
        for g in range(p):  # the grouped part has these weights already
            centre[g * filters : (g + 1) * filters, g * channels : (g + 1) * channels] = 0
        self.grouped = _grouped(case, p, weight)
        self.pointwise = _conv(case.c, case.f, 1, centre[..., None, None], stride=case.stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(x) + self.pointwise(x)


class GatherPerGroup(nn.Module):
    """Per distinct group: select its channels, convolve, and put the filters in their places."""

    def __init__(self, case: Case, support: hk.Support, weight: Tensor) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        self.channels: list[Tensor] = []
        order: list[Tensor] = []
        for group in support.groups:
            filters = _index(group.filters)
            channels = _index(np.flatnonzero(group.mask.any(axis=(1, 2))))
            if len(channels) == 0:  # a convolution of no channels: a zero weight on one of them
                channels = torch.zeros(1, dtype=torch.int64)
            part = weight[filters.to(weight.device)][:, channels.to(weight.device)]
            self.convs.append(_conv(len(channels), len(filters), case.k, part, stride=case.stride))
            self.channels.append(channels.to(weight.device))
            order.append(filters)
        self.order = torch.argsort(torch.cat(order)).to(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            conv(x.index_select(1, channels))
            for conv, channels in zip(self.convs, self.channels, strict=True)
        ]
        return torch.cat(parts, 1).index_select(1, self.order)


class GatherPlusPointwise(nn.Module):
    """HetConv with uneven or interleaved groups: gathered K×K parts plus a 1×1 on all channels."""

    def __init__(self, case: Case, support: hk.Support, weight: Tensor) -> None:
        super().__init__()
        full = torch.as_tensor(support.mask.all(axis=(2, 3)).copy(), device=weight.device)
        own = hk.Support.from_mask(
            support.mask & full.cpu().numpy()[:, :, None, None],
        )
        centre = weight[:, :, case.k // 2, case.k // 2].masked_fill(full, 0)
        self.rings = GatherPerGroup(case, own, weight)
        self.pointwise = _conv(case.c, case.f, 1, centre[..., None, None], stride=case.stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.rings(x) + self.pointwise(x)


class GatherGrouped(nn.Module):
    """Groups of equal size: one gather, one grouped convolution (what CondenseNet does)."""

    def __init__(self, case: Case, support: hk.Support, weight: Tensor) -> None:
        super().__init__()
        groups = support.groups
        channels = [np.flatnonzero(g.mask.any(axis=(1, 2))) for g in groups]
        parts = [
            weight[_index(g.filters)][:, _index(c)] for g, c in zip(groups, channels, strict=True)
        ]
        index = torch.cat([_index(c) for c in channels])
        self.channels = index.to(weight.device)
        self.conv = _conv(
            len(index), case.f, case.k, torch.cat(parts), stride=case.stride, groups=len(groups)
        )
        filters = torch.cat([_index(g.filters) for g in groups])
        self.order = torch.argsort(filters).to(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.index_select(1, self.channels)).index_select(1, self.order)


class MaskPerCall(nn.Module):
    """The mask multiplied into a dense weight at every call, as pruning code does."""

    def __init__(self, case: Case, support: hk.Support, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.mask = torch.as_tensor(support.mask.copy()).to(weight)
        self.stride, self.padding = case.stride, case.k // 2

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight * self.mask, None, self.stride, self.padding)


def _index(numbers: Any) -> Tensor:
    return torch.from_numpy(numbers.copy())


def _grouped(case: Case, groups: int, weight: Tensor) -> nn.Conv2d:
    """``nn.Conv2d(groups=groups)`` with the weights of the diagonal blocks."""
    filters, channels = case.f // groups, case.c // groups
    blocks = [
        weight[g * filters : (g + 1) * filters, g * channels : (g + 1) * channels]
        for g in range(groups)
    ]
    return _conv(case.c, case.f, case.k, torch.cat(blocks), stride=case.stride, groups=groups)


def _conv(c: int, f: int, k: int, weight: Tensor, *, stride: int, groups: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(
        c, f, k, stride, k // 2, groups=groups, bias=False, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        conv.weight.copy_(weight)
    return conv
