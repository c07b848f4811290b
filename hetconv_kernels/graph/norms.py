# SPDX-License-Identifier: Apache-2.0
"""norms: batch normalisation into linear layers, and into the layer that reads it.

In evaluation mode batch normalisation is x·scale + shift, channel by channel. It becomes part

- of a linear layer or a `FrequencyConv2d` before it: rows of the weight times scale, bias·scale +
  shift;
- of a linear layer or a convolution after it: columns of the weight times scale, and the bias grows
  by what the layer makes of the shift. A convolution must not pad: its zeros are not shifted.

What follows a convolution is `fold`'s, which takes the activation along.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..nn import FrequencyConv2d, GroupedConv2d, SupportConv2d, SupportLinear
from ..nn.base import SupportLayer
from ..problem import make_geometry
from ..support import Support
from .copying import copied
from .layout import set_module
from .names import module_of
from .plain import Keep, _plain
from .take import Norm

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class FoldedNorm(NamedTuple):
    """A batch normalisation that became part of a layer.

    Attributes:
        layer: name of the layer.
        before: whether it stood before the layer.
        kind: ``linear``, ``conv`` or ``frequency``.
    """

    layer: str
    before: bool
    kind: str


def fold_norms(traced: fx.GraphModule) -> tuple[list[FoldedNorm], dict[str, str]]:
    """Folds batch normalisations into what is beside them, in place.

    Args:
        traced: what `trace` gave, in evaluation mode, without steps that do nothing.

    Returns:
        What was folded, and why other normalisations cannot be folded into the layer after them.
    """
    calls = Counter(n.target for n in traced.graph.nodes if n.op == "call_module")
    done: list[FoldedNorm] = []
    reasons: dict[str, str] = {}
    for node in list(traced.graph.nodes):
        norm = module_of(node)
        if type(norm) not in NORMS or calls[node.target] > 1 or not _whole(norm, node):
            continue
        source = node.args[0]
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if _takes_over(source) and len(source.users) == 1 and calls[source.target] == 1:
            layer, before = source, False
        elif _is_conv(source) and len(source.users) == 1:
            continue  # `fold` does it, or says why not
        elif user is not None and calls[user.target] == 1 and user.all_input_nodes == [node]:
            layer, before = user, True
            reason = _why_not_before(user)
            if reason is not None:
                reasons[str(node.target)] = reason
                continue
        else:
            continue
        module = module_of(layer)
        assert module is not None
        set_module(traced, str(layer.target), merged(module, norm, before))  # type: ignore[arg-type]
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
        kind = "conv" if _is_conv(layer) else "linear" if _is_linear(layer) else "frequency"
        done.append(FoldedNorm(str(layer.target), before, kind))
    traced.recompile()
    return done, reasons


@torch.no_grad()
def merged(layer: nn.Module, norm: Norm, before: bool) -> nn.Module:
    """Copies a layer with a batch normalisation in its weights, computed in float64.

    Args:
        layer: an ``nn.Linear``, ``nn.Conv2d`` (groups=1, no padding if the norm is before it) or a
            layer of this package; a `FrequencyConv2d` only with the norm after it.
        norm: with running statistics.
        before: whether the norm stands before the layer.
    """
    twin = copied(layer)
    if isinstance(twin, FrequencyConv2d):
        twin.mix = merged(twin.mix, norm, before)  # type: ignore[assignment]
        return twin
    frozen = isinstance(twin, SupportLayer) and twin.frozen
    if isinstance(twin, SupportLayer):
        twin.thaw()
    any_layer: nn.Linear | nn.Conv2d = twin  # type: ignore[assignment]  # ours have the same names
    weight = twin.dense_weight() if isinstance(twin, SupportLayer) else any_layer.weight
    wide, old = weight.detach().double(), any_layer.bias
    scale, shift = affine(norm)
    scale, shift = scale.to(wide.device), shift.to(wide.device)
    bias = wide.new_zeros(len(wide)) if old is None else old.detach().double()
    ends = [1] * (wide.dim() - 2)
    if before:
        bias = bias + (wide * shift.view(1, -1, *ends)).flatten(1).sum(1)
        wide = wide * scale.view(1, -1, *ends)
    else:
        bias = bias * scale + shift
        wide = wide * scale.view(-1, 1, *ends)
    any_layer.weight.copy_(wide)
    if old is None:
        any_layer.bias = nn.Parameter(bias.to(weight.dtype), any_layer.weight.requires_grad)
    else:
        old.copy_(bias)
    if frozen:
        assert isinstance(twin, SupportLayer)
        twin.freeze()
    return twin


def affine(norm: Norm) -> tuple[Tensor, Tensor]:
    """Returns what a batch normalisation multiplies with and adds.  # float64 [C] each"""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _whole(norm: nn.Module | None, node: fx.Node) -> bool:
    """Whether a normalisation has statistics, and channels where layers have them."""
    shape = node.meta.get("shape", ())
    known = getattr(norm, "running_mean", None) is not None
    return known and len(shape) == (2 if isinstance(norm, nn.BatchNorm1d) else 4)


def _is_linear(node: object) -> bool:
    return isinstance(node, fx.Node) and _is_plain(module_of(node), nn.Linear, SupportLinear)


def _takes_over(node: object) -> bool:
    """Whether a step is a layer that takes over what follows it; `fold` has the convolutions."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    module = module_of(node)
    if type(module) is FrequencyConv2d:
        return module.mix._owns_weight
    return _is_linear(node)


def _is_conv(node: object) -> bool:
    return isinstance(node, fx.Node) and _is_plain(module_of(node), nn.Conv2d, SupportConv2d)


def _is_plain(module: nn.Module | None, plain: type[nn.Module], ours: type[SupportLayer]) -> bool:
    if isinstance(module, ours):
        return module._owns_weight
    answer = None if module is None else _plain(module, plain)
    return answer is not None and not isinstance(answer, Keep)


def _why_not_before(user: fx.Node) -> str | None:
    """Says why what reads a normalisation cannot take it over."""
    module = module_of(user)
    if _is_linear(user):
        return None if len(user.meta.get("shape", ())) == 2 else "it is read in another shape"
    if not _is_conv(user):
        return "no layer reads it alone"
    if isinstance(module, GroupedConv2d) or getattr(module, "groups", 1) > 1:
        return "the convolution after it is grouped"
    if _pads(module):
        return "the convolution after it pads with zeros, which it would not have shifted"
    return None


def _pads(module: nn.Module | None) -> bool:
    if isinstance(module, SupportConv2d):
        return module.padding_mode != "zeros" or any(module._geometry.pads)
    assert isinstance(module, nn.Conv2d)
    dense = Support.dense(module.in_channels, module.out_channels, module.kernel_size)
    geometry = make_geometry(dense, module.stride, module.padding, module.dilation)
    return module.padding_mode != "zeros" or any(geometry.pads)
