# SPDX-License-Identifier: Apache-2.0
"""Rules that make pairs of layers one, one layer a pair, or let layers group themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.self_grouping import self_group


def pair(channels: int, filters: int, stride: int = 1, *between: nn.Module) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        *between,
        nn.Conv2d(channels, filters, 1, bias=False),
    ]


@pytest.mark.parametrize("between", [(), (nn.BatchNorm2d(8), nn.ReLU6())], ids=["bare", "normed"])
@pytest.mark.parametrize("order", ["blocked", "interleaved"])
def test_a_pair_becomes_one_hetconv_of_its_shape_and_stride(between, order) -> None:
    model = nn.Sequential(*pair(8, 12, 2, *between), nn.BatchNorm2d(12))
    found = hk.convert(model, hk.rules.het_pairs(4, order)).model
    last = len(model) - 2
    assert list(found._modules) == [str(last), str(last + 1)]
    layer = found[0]
    assert isinstance(layer, hk.nn.HetConv2d)
    assert layer.support == hk.Support.het(8, 12, 3, 4, order)
    x = torch.randn(2, 8, 9, 9)
    assert found(x).shape == model(x).shape
    assert layer.bias is None
    assert len(model) == last + 2  # the given network is as it was


def test_pairs_in_nested_sequences_are_found_and_the_rest_stays() -> None:
    inner = nn.Sequential(*pair(8, 8))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *pair(8, 8), inner, nn.ReLU())
    found = hk.convert(model, hk.rules.het_pairs(2)).model
    kinds = [type(m) for m in found.modules() if not isinstance(m, nn.Sequential)]
    assert kinds == [nn.Conv2d, hk.nn.HetConv2d, hk.nn.HetConv2d, nn.ReLU]
    torch.testing.assert_close(found[0].weight, model[0].weight)


@pytest.mark.parametrize(
    "children",
    [
        [nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 1)],
        [nn.Conv2d(8, 8, 3, groups=8), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)],
        [nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, stride=2)],
        [nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()],
        [nn.Conv2d(8, 8, 2, groups=8), nn.Conv2d(8, 8, 1)],
    ],
    ids=["grouped", "pooled", "strided", "alone", "even"],
)
def test_what_is_no_pair_stays(children) -> None:
    report = hk.convert(nn.Sequential(*children), hk.rules.het_pairs(2))
    assert not report.swapped


def test_a_part_of_more_than_the_channels_is_kept_with_its_reason() -> None:
    report = hk.convert(nn.Sequential(*pair(8, 8)), hk.rules.het_pairs(16))
    assert "p=16 is more than the 8 channels" in report.kept[0].reason


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("groups", [2, 8])
def test_a_rival_has_the_shape_of_the_layer_and_can_be_trained(groups, norm) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, 2, 1, bias=False))
    rule = (
        hk.rules.grouped_pointwise(groups, norm) if groups < 8
        else hk.rules.depthwise_pointwise(norm)
    )  # fmt: skip
    report = hk.convert(model, rule)
    assert [swap.name for swap in report.swapped] == ["1"]
    new = report.model[1]
    assert (new[0].groups, len(new)) == (groups, 4 if norm else 2)
    x = torch.randn(2, 3, 9, 9)
    assert report.model(x).shape == model(x).shape
    report.model(x).sum().backward()
    assert new[0].weight.grad.abs().sum() > 0


def test_groups_that_do_not_divide_are_kept_with_their_reason() -> None:
    report = hk.convert(nn.Sequential(nn.Conv2d(9, 6, 3)), hk.rules.grouped_pointwise(4))
    assert "4 groups do not divide its 9 channels" in report.kept[0].reason


def test_self_group_gives_each_layer_the_support_of_its_own_weights() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"stem": nn.Conv2d(3, 8, 3), "a": nn.Conv2d(8, 20, 3), "down": nn.Conv2d(8, 20, 1)}
    )
    report = hk.convert(model, hk.rules.self_group(50, 4, skip=["d*"]))
    assert [swap.name for swap in report.swapped] == ["a"]
    layer = report.model["a"]
    assert isinstance(layer, hk.nn.SelfGroupConv2d)
    assert layer.support == self_group(model["a"].weight, 50, 4)
    reasons = {kept.name: kept.reason for kept in report.kept}
    assert "reads an image" in reasons["stem"]
    assert reasons["down"] == "named in skip"


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: hk.rules.het_pairs(0), ArgumentError),
        (lambda: hk.rules.het_pairs(2, "odd"), ArgumentError),
        (lambda: hk.rules.grouped_pointwise(0), ArgumentError),
        (lambda: hk.rules.self_group(100), ArgumentError),
        (lambda: hk.rules.self_group(50, 0), ArgumentError),
        (lambda: hk.rules.self_group(50, skip="down"), InputTypeError),
    ],
    ids=["p", "order", "groups", "percent", "clusters", "skip"],
)
def test_bad_settings(make, error) -> None:
    with pytest.raises(error):
        make()
