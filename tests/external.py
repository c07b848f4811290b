# SPDX-License-Identifier: Apache-2.0
"""Networks of timm, torchvision and segmentation_models_pytorch, with random weights.

They say nothing of accuracy, and much of the graphs that users bring: gates, shuffles, splits,
branches that are concatenated, standardised weights, outputs that are mappings.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

# Kept: an operator is there as long as the library that declared it.
_DECLARED: list[torch.library.Library] = []


class External(NamedTuple):
    """A network of another package.

    Attributes:
        package: timm, torchvision or segmentation_models_pytorch.
        name: of the network there.
        settings: of its function.
        size: of the images, in pixels.
    """

    package: str
    name: str
    settings: Mapping[str, Any] = {}
    size: int = 64

    @property
    def id(self) -> str:
        """Names it in a test."""
        short = {"segmentation_models_pytorch": "smp"}.get(self.package, self.package)
        return ":".join(filter(None, (short, self.name, self.settings.get("encoder_name"))))

    def create(self) -> nn.Module:
        """Makes the network, with the same random weights each time, in evaluation mode."""
        found, settings = package(self.package), dict(self.settings)
        torch.manual_seed(0)
        if self.package == "timm":
            made = found.create_model(self.name, pretrained=False, **settings)
        elif self.package == "torchvision":
            made = found.models.get_model(self.name, weights=None, **settings)
        else:
            made = getattr(found, self.name)(encoder_weights=None, **settings)
        return made.eval()

    def images(self, count: int = 2) -> Tensor:
        """Draws images.  # [N, 3, H, W]"""
        generator = torch.Generator().manual_seed(1)
        return torch.rand(count, 3, self.size, self.size, generator=generator)


NETWORKS = (
    External("timm", "resnet18"),
    External("timm", "mobilenetv3_small_100"),
    External("timm", "efficientnet_b0"),
    External("timm", "regnety_002"),
    External("timm", "res2net50_26w_4s"),
    External("timm", "convnext_atto"),
    External("timm", "ghostnet_100"),
    External("timm", "repvgg_a0"),
    External("timm", "resnetv2_50"),
    External("timm", "hrnet_w18_small"),
    External("timm", "skresnet18"),
    External("timm", "vit_tiny_patch16_224", {"img_size": 64}),
    External("torchvision", "mobilenet_v2"),
    External("torchvision", "shufflenet_v2_x0_5"),
    External("torchvision", "squeezenet1_1"),
    External("torchvision", "googlenet", {"init_weights": False, "aux_logits": False}),
    External("torchvision", "densenet121"),
    External("torchvision", "mnasnet0_5"),
    External("torchvision", "lraspp_mobilenet_v3_large", {"weights_backbone": None}),
    External("segmentation_models_pytorch", "Unet", {"encoder_name": "resnet18"}),
    External("segmentation_models_pytorch", "FPN", {"encoder_name": "mobilenet_v2"}),
    External("segmentation_models_pytorch", "DeepLabV3Plus", {"encoder_name": "resnet18"}),
)


def package(name: str) -> Any:
    """Imports a package, or skips the test with the reason.

    PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled part cannot be
    loaded, and its Python part asks for two operators of that. It is enough to declare them, and to
    give detectors a suppression of overlapping boxes in Python.
    """
    if importlib.util.find_spec("torchvision") is not None and not _DECLARED:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
            library.impl("nms", _nms, "CPU")
            _DECLARED.append(library)
            importlib.import_module("torchvision").extension._has_ops = lambda: True
    return pytest.importorskip(name, reason=f"{name} is not installed: `make external` does it")


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Lists the boxes that no better one overlaps by more than the threshold, best first."""
    overlaps = importlib.import_module("torchvision.ops").box_iou(boxes, boxes) > threshold
    left, kept = torch.ones(len(boxes), dtype=torch.bool), []
    for place in scores.argsort(descending=True, stable=True).tolist():
        if left[place]:
            kept.append(place)
            left &= ~overlaps[place]
    return torch.tensor(kept, dtype=torch.int64)
