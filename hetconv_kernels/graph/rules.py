# SPDX-License-Identifier: Apache-2.0
"""Rules for `convert`: each looks at one module and says what should stand in its place.

A rule is any callable ``(name, module) -> answer``. The answer is a new module, a `Keep` with the
reason why this module and what is inside it stays, or None when the rule has nothing to say about
it and its children are to be looked at.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..errors import ArgumentError, InputTypeError, SupportError, mismatch
from ..integers import is_integer
from ..nn import (
    FusedConv2d,
    GroupedConv2d,
    HetConv2d,
    SelfGroupConv2d,
    SupportConv2d,
    SupportLinear,
)
from ..support import Support

# Images have one (grey) to four (colour and transparency) channels.
_IMAGE_CHANNELS = 4


class Keep:
    """The answer of a rule that leaves a module, and everything inside it, as it is.

    Args:
        reason: a clause that completes "kept because …", for the report.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return f"Keep({self.reason!r})"


Answer = nn.Module | Keep | None
Rule = Callable[[str, nn.Module], Answer]


def het(p: int = 4, order: str = "blocked", skip_stem: bool = True, min_channels: int = 1) -> Rule:
    """Makes every suitable ``nn.Conv2d`` a `HetConv2d`, with the weights that survive.

    Kept, each with its reason: 1×1, grouped and depthwise convolutions, even kernels, layers with
    fewer than p channels or filters, and subclasses of ``nn.Conv2d``.

    Source: Singh, Verma, Rai, Namboodiri, "HetConv", CVPR 2019, arXiv 1903.04120.

    Args:
        p: the part; each filter keeps all taps on 1/p of its channels.
        order: ``"blocked"`` or ``"interleaved"``, see `Support.het`.
        skip_stem: whether convolutions that read an image (at most 4 channels) stay dense, as in
            the paper.
        min_channels: layers with fewer input channels or filters than this stay dense.

    Raises:
        ArgumentError: p or ``min_channels`` is not a positive integer, or an unknown order.
    """
    _check_part(p, order)
    if not is_integer(min_channels) or min_channels < 1:
        raise ArgumentError(mismatch("min_channels", min_channels, "a positive integer"))

    def rule(name: str, module: nn.Module) -> Answer:
        conv = _plain_conv2d(module)
        if not isinstance(conv, nn.Conv2d):
            return conv
        C, F, kernel = conv.in_channels, conv.out_channels, conv.kernel_size
        size = "×".join(map(str, kernel))
        if conv.groups == C > 1:
            return Keep("it is depthwise: no channel of a filter is left to thin out")
        if conv.groups > 1:
            return Keep(f"it has {conv.groups} groups; HetConv is made from a dense convolution")
        if kernel == (1, 1):
            return Keep("it is 1×1: it has nothing but the centre tap")
        if any(k % 2 == 0 for k in kernel):
            return Keep(f"its kernel is {size}: an even kernel has no centre tap")
        if skip_stem and C <= _IMAGE_CHANNELS:
            return Keep(f"it is a stem: it reads an image of {C} channels (skip_stem)")
        if min(C, F) < min_channels:
            return Keep(f"it has {C} channels and {F} filters, under min_channels={min_channels}")
        if p > C:
            return Keep(f"p={p} is more than its {C} channels")
        if p > F:
            return Keep(f"p={p} is more than its {F} filters: some channels would lose all of them")
        return HetConv2d.from_conv2d(conv, p=p, order=order)

    return rule


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
        network._modules = OrderedDict(result)
        return network.train(module.training)

    return rule


def grouped_pointwise(groups: int, norm: bool = True) -> Rule:
    """Makes every suitable ``nn.Conv2d`` a grouped K×K and a 1×1 convolution, a rival of HetConv.

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
    from ..compression.self_grouping import _check_percent
    from ..compression.self_grouping import self_group as group

    _check_percent(percent)
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
        support = group(conv.weight, percent, min(clusters, conv.out_channels), seed=seed)
        return SelfGroupConv2d.from_conv2d(conv, support)

    return rule


def grouped() -> Rule:
    """Makes every ``nn.Conv2d`` with ``groups > 1``, depthwise included, a `GroupedConv2d`."""

    def rule(name: str, module: nn.Module) -> Answer:
        conv = _plain_conv2d(module)
        if not isinstance(conv, nn.Conv2d):
            return conv
        if conv.groups == 1:
            return Keep("it has one group")
        return GroupedConv2d.from_conv2d(conv)

    return rule


class supports:
    """Gives the named layers their chosen Supports.

    ``nn.Conv2d`` becomes `SelfGroupConv2d`, ``nn.Linear`` becomes `SupportLinear`; the weights that
    survive stay. Layers that are not named are not looked at.

    Args:
        chosen: a Support for each name, as in ``model.named_modules()``.

    Raises:
        InputTypeError: a value is not a Support.
    """

    def __init__(self, chosen: Mapping[str, Support]) -> None:
        for name, support in chosen.items():
            if not isinstance(support, Support):
                raise InputTypeError(
                    mismatch(f"support of {name!r}", type(support).__name__, "a Support")
                )
        self.chosen = dict(chosen)

    @property
    def names(self) -> frozenset[str]:
        """The modules that must exist; `convert` refuses a network without them."""
        return frozenset(self.chosen)

    def __call__(self, name: str, module: nn.Module) -> Answer:
        """Answers for one module.

        Raises:
            SupportError: the Support has another shape than the layer.
        """
        support = self.chosen.get(name)
        if support is None:
            return None
        linear = _plain(module, nn.Linear)
        if isinstance(linear, nn.Linear):
            _check_shape(name, support, (linear.out_features, linear.in_features, 1, 1))
            return SupportLinear.from_linear(linear, support)
        conv = _plain_conv2d(module)
        if isinstance(conv, nn.Conv2d):
            if conv.groups > 1:
                return Keep(f"it has {conv.groups} groups; a Support is chosen for a dense layer")
            _check_shape(name, support, (conv.out_channels, conv.in_channels, *conv.kernel_size))
            return SelfGroupConv2d.from_conv2d(conv, support)
        return conv or linear or Keep(f"a {type(module).__name__} has no Support")


def dense() -> Rule:
    """Makes every layer of this package an ``nn.Conv2d`` or ``nn.Linear`` again, masked."""

    def rule(name: str, module: nn.Module) -> Answer:
        if isinstance(module, SupportLinear):
            return module.to_linear()
        if isinstance(module, SupportConv2d):
            return module.to_conv2d()
        return None

    return rule


def first_of(*rules: Rule) -> Rule:
    """Tries rules in order: the first that has a replacement wins.

    Where none has one, the reasons of all that keep the module are reported together.

    Example: ``first_of(grouped(), het(p=4))`` treats grouped and dense convolutions alike.

    Raises:
        ArgumentError: no rule is given.
    """
    if not rules:
        raise ArgumentError(mismatch("first_of", "no rules", "at least one"))
    return _FirstOf(rules)


class _FirstOf:
    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)

    @property
    def names(self) -> frozenset[str]:
        """The modules that some rule must find."""
        return frozenset().union(*(getattr(rule, "names", ()) for rule in self.rules))

    def __call__(self, name: str, module: nn.Module) -> Answer:
        reasons: dict[str, None] = {}  # a set that keeps the order
        for rule in self.rules:
            answer = rule(name, module)
            if isinstance(answer, Keep):
                reasons[answer.reason] = None
            elif answer is not None:
                return answer
        return Keep("; ".join(reasons)) if reasons else None


def _check_part(p: int, order: str) -> None:
    if not is_integer(p) or p < 1:
        raise ArgumentError(mismatch("p of a HetConv", p, "a positive integer"))
    if order not in ("blocked", "interleaved"):
        raise ArgumentError(mismatch("order", repr(order), "'blocked' or 'interleaved'"))


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
        place = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        spatial = nn.Conv2d(
            C, C, conv.kernel_size, conv.stride, conv.padding, conv.dilation, count,
            bias=not norm, padding_mode=conv.padding_mode, **place,
        )  # fmt: skip
        between = [nn.BatchNorm2d(C, **place), nn.ReLU(inplace=True)] if norm else []
        last = nn.Conv2d(C, conv.out_channels, 1, bias=conv.bias is not None, **place)
        return nn.Sequential(spatial, *between, last).train(conv.training)

    return rule


def _plain_conv2d(module: nn.Module) -> nn.Conv2d | Keep | None:
    """Returns the module when it is an ``nn.Conv2d`` and nothing else, or why it is not."""
    answer = _plain(module, nn.Conv2d)
    if isinstance(answer, nn.Conv2d | Keep):
        return answer
    if isinstance(module, SupportConv2d | FusedConv2d):
        return Keep(f"it is a {type(module).__name__} already")
    kind = type(module)
    if isinstance(module, _ConvNd):
        return Keep(f"a {kind.__name__} is not a 2-D convolution")
    if "quantized" in kind.__module__ and "Conv" in kind.__name__:
        return Keep("it is quantised: its weights are integers")
    return None


def _plain(module: nn.Module, kind: type[nn.Module]) -> nn.Module | Keep | None:
    """Returns a module of exactly this class with ordinary parameters, or why it is not one."""
    if not isinstance(module, kind):
        return None
    if isinstance(module, LazyModuleMixin):
        return Keep("it is lazy and has no weights yet; call the network once first")
    if is_parametrized(module):
        return Keep("it is parametrised: its weight is computed from others")
    if type(module) is not kind:
        return Keep(f"{type(module).__name__}, a subclass of {kind.__name__}, may do other things")
    weight = module._parameters.get("weight")
    if weight is None:
        return Keep("its weight is not a parameter of its own (weight normalisation or pruning)")
    if type(weight) is not nn.Parameter:
        return Keep(f"its weight is a {type(weight).__name__}; convert before sharding or wrapping")
    if "forward" in vars(module):
        return Keep("its forward was replaced on the instance")
    return module


def _check_shape(name: str, support: Support, shape: tuple[int, ...]) -> None:
    if support.shape != shape:
        raise SupportError(mismatch(f"shape of the Support of {name!r}", support.shape, shape))
