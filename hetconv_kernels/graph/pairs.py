# SPDX-License-Identifier: Apache-2.0
"""Rules that make pairs of layers one, or one layer a pair, or let layers group themselves.

They are part of `hetconv_kernels.rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..errors import ArgumentError, InputTypeError, mismatch
from ..integers import is_integer
from ..nn import HetConv2d, SelfGroupConv2d
from ..self_grouping import check_percent
from ..self_grouping import self_group as choose_support
from .plain import _IMAGE_CHANNELS, Answer, Keep, Rule, _check_part, _plain_conv2d


def het_pairs(p: int = 32, order: str = "blocked") -> Rule:
    """Makes each depthwise and pointwise pair of an ``nn.Sequential`` one fresh `HetConv2d`.

    A pair is a depthwise K×K convolution, then batch normalisation and activations or nothing,
    then a 1×1 convolution, as in MobileNet. What stands between the two goes with the depthwise
    layer, since one layer has no place for it. A HetConv is another function than the pair, so the
    new layer begins from fresh weights and **the network has to be trained**. The other children
    keep their names, and the new layer has that of the pointwise one. Pairs that are attributes of
    a class are not seen.

    Source: Singh, Verma, Rai, Namboodiri, "HetConv", CVPR 2019, arXiv 1903.04120; that the
    normalisation in between goes too is our reading.

    Args:
        p: the part; each filter keeps all taps on 1/p of its channels.
        order: ``"blocked"`` or ``"interleaved"``, see `Support.het`.

    Raises:
        ArgumentError: p is not a positive integer, or an unknown order.
    """
    _check_part(p, order)

    def rule(name: str, module: nn.Module) -> Answer:
        if type(module) is not nn.Sequential:
            return None
        children = list(module._modules.items())
        modules = [child for _, child in children]
        if all(_pointwise_after(modules, place) is None for place in range(len(modules))):
            return None  # convert looks at its children
        result: list[tuple[str, nn.Module | None]] = []
        place = 0
        while place < len(children):
            key, child = children[place]
            end = _pointwise_after(modules, place)
            if end is not None:
                depthwise, pointwise = child, children[end][1]
                assert isinstance(depthwise, nn.Conv2d)
                assert isinstance(pointwise, nn.Conv2d)
                least = min(pointwise.in_channels, pointwise.out_channels)
                if p > least:
                    return Keep(f"p={p} is more than the {least} channels or filters of {key!r}")
                key, child, place = children[end][0], _het_of(depthwise, pointwise, p, order), end
            elif type(child) is nn.Sequential:
                inner = rule(f"{name}.{key}" if name else key, child)
                child = inner if isinstance(inner, nn.Module) else child
            result.append((key, child))
            place += 1
        network = nn.Sequential()
        for name_within, made in result:
            network.register_module(name_within, made)
        return network.train(module.training)

    return rule


def grouped_pointwise(groups: int, norm: bool = True) -> Rule:
    """Makes every suitable ``nn.Conv2d`` a grouped K×K and a 1×1 convolution, HetConv's baseline.

    C·C·K²/groups + C·F multiply-accumulates for each output pixel; where C = F that is
    1/groups + 1/K² of the dense layer, the HetConv paper's ratio. The new layers begin from fresh
    weights, and **the network has to be trained**. 1×1, grouped and depthwise convolutions and
    those that read an image stay, and those whose channels ``groups`` does not divide.

    Source: the comparison in Singh, Verma, Rai, Namboodiri, "HetConv", CVPR 2019, arXiv
    1903.04120. That the grouped layer keeps the number of channels is our reading.

    Args:
        groups: of the K×K convolution.
        norm: whether batch normalisation and ReLU stand between the two, as in MobileNet.

    Raises:
        ArgumentError: ``groups`` is not a positive integer.
    """
    if not is_integer(groups) or groups < 1:
        raise ArgumentError(mismatch("groups", groups, "a positive integer"))
    return _separable(groups, norm)


def depthwise_pointwise(norm: bool = True) -> Rule:
    """Makes every suitable ``nn.Conv2d`` a depthwise K×K and a 1×1 convolution.

    `grouped_pointwise` with as many groups as channels: C·K² + C·F multiply-accumulates for each
    output pixel. Fresh weights: **the network has to be trained**.

    Args:
        norm: whether batch normalisation and ReLU stand between the two, as in MobileNet.
    """
    return _separable(None, norm)


def self_group(
    percent: float,
    clusters: int = 16,
    *,
    skip: Sequence[str] = (),
    skip_stem: bool = True,
    seed: int = 0,
) -> Rule:
    """Makes every suitable ``nn.Conv2d`` a `SelfGroupConv2d`, grouped by its own weights.

    One step of self-grouping, without training; `SelfGrouping` does the rising percentiles and
    the fine-tuning. The paper leaves the down-sampling of a ResNet alone:
    ``skip=["*.downsample.*"]``.

    Source: Guo, Wu, Kittler, Feng, Neural Networks 132, 2020, arXiv 2009.13803.

    Args:
        percent: of the (filter, channel) pairs to drop, 0 ≤ percent < 100.
        clusters: of filters in a layer; a layer of fewer filters has as many as filters.
        skip: patterns of names to leave alone.
        skip_stem: whether convolutions that read an image (at most 4 channels) stay dense.
        seed: of k-means.

    Raises:
        ArgumentError: percent or ``clusters`` out of range.
        InputTypeError: ``skip`` is text and not a list.
        HetconvError: scikit-learn is not installed, or a layer would lose every weight; raised
            when a network is converted.
    """
    check_percent(percent)
    if not is_integer(clusters) or clusters < 1:
        raise ArgumentError(mismatch("clusters", clusters, "a positive integer"))
    if isinstance(skip, str):
        raise InputTypeError(mismatch("skip", repr(skip), "a list of names", f"Use [{skip!r}]."))

    def rule(name: str, module: nn.Module) -> Answer:
        conv = _plain_conv2d(module)
        if not isinstance(conv, nn.Conv2d):
            return conv
        if any(fnmatchcase(name, pattern) for pattern in skip):
            return Keep("named in skip")
        if conv.groups > 1:
            return Keep(f"it has {conv.groups} groups; self-grouping begins from a dense layer")
        if skip_stem and conv.in_channels <= _IMAGE_CHANNELS:
            return Keep(f"it is a stem: it reads an image of {conv.in_channels} channels")
        support = choose_support(conv.weight, percent, min(clusters, conv.out_channels), seed=seed)
        return SelfGroupConv2d.from_conv2d(conv, support)

    return rule


# What may stand between a depthwise and a pointwise convolution that are one pair.
_BETWEEN = (
    nn.BatchNorm2d, nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU,
)  # fmt: skip


def _pointwise_after(children: Sequence[nn.Module | None], place: int) -> int | None:
    """Finds the pointwise convolution of the pair that begins at a place; None without one."""
    first = children[place]
    depthwise = _plain_conv2d(first) if first is not None else None
    if not isinstance(depthwise, nn.Conv2d):
        return None
    C, kernel = depthwise.in_channels, depthwise.kernel_size
    if not (depthwise.groups == C == depthwise.out_channels > 1) or kernel == (1, 1):
        return None
    if any(k % 2 == 0 for k in kernel):
        return None
    for end in range(place + 1, len(children)):
        child = children[end]
        if type(child) in _BETWEEN:
            continue
        conv = _plain_conv2d(child) if child is not None else None
        fits = isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1) and conv.groups == 1
        if not fits or not isinstance(conv, nn.Conv2d):
            return None
        return end if conv.stride == (1, 1) and conv.padding in ((0, 0), "valid") else None
    return None


def _het_of(depthwise: nn.Conv2d, pointwise: nn.Conv2d, p: int, order: str) -> HetConv2d:
    layer = HetConv2d(
        depthwise.in_channels, pointwise.out_channels, depthwise.kernel_size, depthwise.stride,
        depthwise.padding, depthwise.dilation, bias=pointwise.bias is not None,
        padding_mode=depthwise.padding_mode, p=p, order=order, device=pointwise.weight.device,
        dtype=pointwise.weight.dtype,
    )  # fmt: skip
    layer.train(pointwise.training)
    return layer


def _separable(groups: int | None, norm: bool) -> Rule:
    def rule(name: str, module: nn.Module) -> Answer:
        conv = _plain_conv2d(module)
        if not isinstance(conv, nn.Conv2d):
            return conv
        C, count = conv.in_channels, conv.in_channels if groups is None else groups
        if conv.groups > 1:
            return Keep(f"it has {conv.groups} groups already")
        if conv.kernel_size == (1, 1):
            return Keep("it is 1×1 already")
        if C <= _IMAGE_CHANNELS:
            return Keep(f"it is a stem: it reads an image of {C} channels")
        if C % count:
            return Keep(f"{count} groups do not divide its {C} channels")
        device, dtype = conv.weight.device, conv.weight.dtype
        made: Any = nn.Conv2d
        spatial = made(
            C, C, conv.kernel_size, conv.stride, conv.padding, conv.dilation, count,
            bias=not norm, padding_mode=conv.padding_mode, device=device,
            dtype=dtype,
        )  # fmt: skip
        between: list[nn.Module] = (
            [nn.BatchNorm2d(C, device=device, dtype=dtype), nn.ReLU(inplace=True)] if norm else []
        )
        last = nn.Conv2d(
            C, conv.out_channels, 1, bias=conv.bias is not None, device=device, dtype=dtype
        )
        return nn.Sequential(spatial, *between, last).train(conv.training)

    return rule
