# SPDX-License-Identifier: Apache-2.0
"""Rules for `convert`: each looks at one module and says what should stand in its place.

A rule is any callable ``(name, module) -> answer``. The answer is a new module, a `Keep` with the
reason why this module and what is inside it stays, or None when the rule has nothing to say about
it and its children are to be looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..errors import ArgumentError, InputTypeError, SupportError, mismatch
from ..integers import is_integer
from ..nn import (
    GroupedConv2d,
    HetConv2d,
    SelfGroupConv2d,
    SupportConv2d,
    SupportLinear,
)
from ..support import Support
from .computed import computed_weights
from .pairs import depthwise_pointwise, grouped_pointwise, het_pairs, self_group
from .plain import _IMAGE_CHANNELS, Answer, Keep, Rule, _check_part, _plain, _plain_conv2d

__all__ = [
    "Answer",
    "Keep",
    "Rule",
    "computed_weights",
    "dense",
    "depthwise_pointwise",
    "first_of",
    "grouped",
    "grouped_pointwise",
    "het",
    "het_pairs",
    "self_group",
    "supports",
]


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


def _check_shape(name: str, support: Support, shape: tuple[int, ...]) -> None:
    if support.shape != shape:
        raise SupportError(mismatch(f"shape of the Support of {name!r}", support.shape, shape))
