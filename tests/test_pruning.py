# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own pruning counts live weights once it is told which they are."""

from __future__ import annotations

import pytest
import torch
from layers import build
from torch import nn
from torch.nn.utils import prune

import hetconv_kernels as hk
from hetconv_kernels.errors import InputTypeError, SupportError
from hetconv_kernels.pruning import live_only


def left(layer) -> int:
    return int((layer.weight.detach() * torch.from_numpy(layer.support.mask.copy())).ne(0).sum())


def test_magnitude_pruning_by_itself_takes_the_zeros_first() -> None:
    layer = hk.nn.HetConv2d(16, 16, 3, p=4)
    assert layer.support.density < 0.5
    prune.l1_unstructured(layer, "weight", 0.5)
    assert left(layer) == layer.support.live


@pytest.mark.parametrize("kind", ["support", "het", "selfgroup"])
@pytest.mark.parametrize("method", [prune.l1_unstructured, prune.random_unstructured])
def test_half_of_the_live_weights_go(kind: str, method) -> None:
    layer = build(kind)
    assert live_only(layer) == ("",)
    method(layer, "weight", 0.5)
    assert abs(left(layer) - layer.support.live / 2) <= 1
    method(layer, "weight", 3)  # a number of weights counts among what is left, too
    assert abs(left(layer) - (layer.support.live / 2 - 3)) <= 1
    x = torch.randn(1, layer.in_channels, 6, 6)
    y = layer(x)
    prune.remove(layer, "weight")
    torch.testing.assert_close(layer(x), y)
    layer.set_support(hk.Support.from_mask(layer.weight.detach().ne(0).numpy()))
    torch.testing.assert_close(layer.freeze()(x), y)


def test_pruning_over_all_layers_counts_live_weights() -> None:
    model = nn.Sequential(hk.nn.HetConv2d(8, 8, 3, p=2), nn.ReLU(), hk.nn.HetConv2d(8, 8, 3, p=8))
    assert live_only(model) == ("0", "2")
    pairs = [(model[0], "weight"), (model[2], "weight")]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.25)
    live = model[0].support.live + model[2].support.live
    assert abs(left(model[0]) + left(model[2]) - 0.75 * live) <= 1


def test_whole_filters_are_still_whole() -> None:
    layer = build("het")
    live_only(layer)
    prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
    assert layer.weight.detach().flatten(1).ne(0).any(1).sum() == layer.out_channels // 2


def test_what_it_leaves_alone_and_refuses() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), hk.nn.GroupedConv2d(4, 4, 3, groups=2))
    assert live_only(plain) == ()
    layer = build("het")
    live_only(layer)
    assert live_only(layer) == ()
    with pytest.raises(SupportError, match="is frozen"):
        live_only(build("het").freeze())
    with pytest.raises(InputTypeError, match="model: received Tensor"):
        live_only(torch.ones(1))
