# SPDX-License-Identifier: Apache-2.0
"""The multiply-accumulates that the HetConv paper's networks are quoted with, reproduced exactly.

Singh, Verma, Rai, Namboodiri, CVPR 2019, arXiv 1903.04120: VGG-16 on CIFAR-10 with the classifier
512 -> 512 -> 10, every convolution but the stem replaced; convolutions and fully connected layers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels import models, stats

VGG16_CIFAR_MEGAMACS = {
    1: 313.464,
    2: 175.052,
    4: 105.846,
    8: 71.243,
    16: 53.941,
    32: 45.290,
    64: 40.965,
}


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    with torch.device("meta"):
        return models.vgg16_cifar()


def test_dense_vgg16_cifar(vgg):
    assert round(stats.macs(vgg, (3, 32, 32)) / 1e6, 3) == VGG16_CIFAR_MEGAMACS[1]


@pytest.mark.parametrize("order", ["blocked", "interleaved"])
@pytest.mark.parametrize("p", VGG16_CIFAR_MEGAMACS)
def test_hetconv_vgg16_cifar(vgg, p, order):
    report = hk.convert(vgg, hk.rules.het(p=p, order=order))
    assert len(report.swapped) == 12
    assert [kept.name for kept in report.kept] == ["features.0"]
    found = stats.macs(report.model, (3, 32, 32))
    assert round(found / 1e6, 3) == VGG16_CIFAR_MEGAMACS[p]
    assert report.macs((3, 32, 32)) == (313_463_808, found)


@pytest.mark.parametrize("p", [1, 2, 4, 8, 16, 32, 64])
def test_macs_of_one_output_pixel(p):
    C, F, K = 128, 64, 3
    support = hk.Support.het(C, F, K, p=p)
    assert support.macs(1, 1) == F * (K * K * C // p + C - C // p)


@pytest.mark.parametrize(
    ("name", "gigamacs"), [("vgg16", 15.4703), ("resnet50", 4.0892)], ids=["vgg16", "resnet50"]
)
def test_imagenet_networks(name, gigamacs):
    with torch.device("meta"):
        model = getattr(models, name)()
    assert round(stats.macs(model, (3, 224, 224)) / 1e9, 4) == gigamacs


def test_densenet_of_the_self_grouping_papers_cifar_table():
    with torch.device("meta"):
        model = models.densenet121_cifar()
    assert round(stats.macs(model, (3, 32, 32)) / 1e6, 3) == 888.351


@pytest.mark.parametrize(("percent", "gigamacs"), [(60, 1.92), (70, 1.56), (80, 1.20)])
def test_self_grouped_resnet50_without_its_down_sampling(percent, gigamacs):
    """By arithmetic on the shapes: 3.609 G in the bottlenecks, of which ``percent`` goes."""
    with torch.device("meta"):
        model = models.resnet50()
    chosen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels > 3 and "downsample" not in name:
            mask = np.zeros(layer.weight.shape, bool)
            mask[:, : round(layer.in_channels * (100 - percent) / 100)] = True
            chosen[name] = hk.Support.from_mask(mask)
    report = hk.convert(model, hk.rules.supports(chosen))
    assert len(report.swapped) == 48
    found = stats.macs(report.model, (3, 224, 224)) / 1e9
    assert found == pytest.approx(gigamacs, rel=5e-3)


@pytest.mark.parametrize("p", [4, 8, 16, 32])
def test_hetconv_in_place_of_the_pairs_of_mobilenet(p):
    with torch.device("meta"):
        model = models.mobilenet()
    report = hk.convert(model, hk.rules.het_pairs(p))
    side, C, total = 112, 32, 112 * 112 * 32 * 27 + 1024 * 1000
    widths = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5,
              (1024, 2), (1024, 1)]  # fmt: skip
    for F, stride in widths:
        side //= stride
        total += side * side * F * (9 * C // p + C - C // p)
        C = F
    assert len(report.swapped) == 13
    assert stats.macs(report.model, (3, 224, 224)) == total


@pytest.mark.parametrize("groups", [2, 4, 64])
def test_macs_of_the_rivals_of_hetconv(groups):
    layer = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    rule = hk.rules.depthwise_pointwise() if groups == 64 else hk.rules.grouped_pointwise(groups)
    rival = hk.convert(layer, rule).model
    ratio = stats.macs(rival, (64, 8, 8)) / stats.macs(layer, (64, 8, 8))
    assert ratio == pytest.approx(1 / groups + 1 / 9)
