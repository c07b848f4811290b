# SPDX-License-Identifier: Apache-2.0
"""Filters leave torchvision's detectors, which cannot be traced whole, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from external import package
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.compression import WeakSubnetwork

pytestmark = pytest.mark.slow  # minutes, and a package that is not small

# Their settings, the size of an image, and how many times fewer MACs WSP at 70 % leaves, at least.
DETECTORS: dict[str, tuple[dict[str, Any], int, float]] = {
    "retinanet_resnet50_fpn": ({"min_size": 128, "max_size": 128}, 128, 1.5),
    "fasterrcnn_mobilenet_v3_large_320_fpn": ({"min_size": 128, "max_size": 128}, 128, 1.5),
}


def no_loss(model: nn.Module, batch: Tensor) -> Tensor:
    raise AssertionError("nothing is trained here")


@pytest.mark.parametrize("name", DETECTORS)
def test_wsp_removes_filters_of_a_detector(name: str) -> None:
    package("torchvision")
    from torchvision.models import detection

    settings, size, fewer = DETECTORS[name]
    torch.manual_seed(0)
    model = getattr(detection, name)(weights=None, weights_backbone=None, **settings).eval()
    x = torch.rand(1, 3, size, size)
    report = hk.compress(
        model, WeakSubnetwork(0.7, epochs=0), data=[x], train_step=no_loss, example=x,
        measure=False, progress=False,
    )  # fmt: skip
    assert report.compacted
    assert type(report.model) is type(model)
    assert report.macs[0] > fewer * report.macs[1]
