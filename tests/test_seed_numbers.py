# SPDX-License-Identifier: Apache-2.0
"""The multiply-accumulates that the HetConv paper's networks are quoted with, reproduced exactly.

Singh, Verma, Rai, Namboodiri, CVPR 2019, arXiv 1903.04120: VGG-16 on CIFAR-10 with the classifier
512 -> 512 -> 10, every convolution but the stem replaced; convolutions and fully connected layers.
"""

from __future__ import annotations

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
