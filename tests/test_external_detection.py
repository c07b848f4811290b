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
    "ssdlite320_mobilenet_v3_large": ({}, 320, 1.7),
    "ssd300_vgg16": ({}, 300, 2.5),
}
# Relative to the largest coordinate and the best score.
TOLERANCE = 1e-4


def no_loss(model: nn.Module, batch: Tensor) -> Tensor:
    raise AssertionError("nothing is trained here")


def create(name: str, **more: Any) -> tuple[nn.Module, Tensor]:
    """Makes a detector, with the same random weights each time, and an image."""
    package("torchvision")
    from torchvision.models import detection

    settings, size, _ = DETECTORS[name]
    torch.manual_seed(0)
    model = getattr(detection, name)(weights=None, weights_backbone=None, **settings | more).eval()
    return model, torch.rand(1, 3, size, size)


@pytest.mark.parametrize("name", DETECTORS)
def test_wsp_removes_filters_of_a_detector(name: str) -> None:
    model, x = create(name)
    report = hk.compress(
        model, WeakSubnetwork(0.7, epochs=0), data=[x], train_step=no_loss, example=x,
        measure=False, progress=False,
    )  # fmt: skip
    assert report.compacted
    assert type(report.model) is type(model)
    assert report.macs[0] > DETECTORS[name][2] * report.macs[1]
    assert report.difference < TOLERANCE


# With random weights the scores of these, of two classes and the background, are near a half or a
# third, and above the threshold; RetinaNet's begin at a hundredth.
FINDS: dict[str, dict[str, Any]] = {
    "retinanet_resnet50_fpn": {"num_classes": 3, "score_thresh": 0.0},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"num_classes": 3},
    "ssdlite320_mobilenet_v3_large": {},
    "ssd300_vgg16": {},
}


@pytest.mark.parametrize("name", DETECTORS)
def test_an_optimised_detector_finds_the_same(name: str) -> None:
    model, x = create(name, **FINDS[name])
    report = hk.optimize(model, x)
    assert type(report.model) is type(model)
    with torch.no_grad():
        (own,), (fast,) = model(x), report.model(x)
    assert own.keys() == fast.keys() == {"boxes", "labels", "scores"}
    assert len(own["boxes"])
    # Places of nearly the same score may change theirs in the order of scores.
    for key, largest in (("boxes", x.shape[-1]), ("scores", float(own["scores"].max()))):
        assert own[key].shape == fast[key].shape
        apart = (own[key].sort(0).values - fast[key].sort(0).values).abs().max()
        assert float(apart) < TOLERANCE * largest
