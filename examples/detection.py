# SPDX-License-Identifier: Apache-2.0
"""Trains a detector of torchvision, removes filters of it by WSP, and trains on.

    python examples/detection.py [--train-epochs N] [--epochs N] [--percentile Q] [--out FOLDER]

The images are drawn: a bright rectangle or disc on noise. A detector cannot be traced whole, since
its code loops over boxes: `hk.compress` takes the backbone and the towers of the head, and keeps
what goes in and out of them. Needs torchvision.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

import hetconv_kernels as hk

EDGE = 64
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class Backbone(nn.Module):
    """Makes one map of features, an eighth of the image's size."""

    out_channels = 64

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def detector() -> RetinaNet:
    anchors = AnchorGenerator(sizes=((14, 20, 28),), aspect_ratios=((0.7, 1.0, 1.4),))
    return RetinaNet(
        Backbone(), 2, min_size=EDGE, max_size=EDGE, anchor_generator=anchors,
        detections_per_img=5, topk_candidates=50,
    )  # fmt: skip


def drawn(count: int, generator: torch.Generator) -> Batch:
    """Draws images with one object each: class 0 is a rectangle, class 1 a disc."""
    images, targets = [], []
    rows = torch.arange(EDGE)[:, None]
    for _ in range(count):
        kind, height, width = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((0, 2), (12, 30), (12, 30))
        )
        width = height if kind else width
        top, left = (
            int(torch.randint(0, EDGE - size, (), generator=generator)) for size in (height, width)
        )
        inside = torch.zeros(EDGE, EDGE, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        if kind:
            middle = (top + (height - 1) / 2, left + (width - 1) / 2)
            inside &= (rows - middle[0]) ** 2 + (rows.T - middle[1]) ** 2 <= height**2 / 4
        images.append(0.3 * torch.rand(3, EDGE, EDGE, generator=generator) + 0.6 * inside)
        box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.tensor([kind])})
    return images, targets


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Adds up the losses that a detector of torchvision gives while it trains."""
    losses: dict[str, Tensor] = model(*batch)
    return torch.stack([*losses.values()]).sum()


def found(model: nn.Module, batches: list[Batch]) -> float:
    """Returns the fraction of objects whose best detection has their class and half their area."""
    right = total = 0
    for images, targets in batches:
        for detection, target in zip(model(images), targets, strict=True):
            total += 1
            if not len(detection["boxes"]):
                continue
            best = detection["scores"].argmax()
            overlap = float(box_iou(detection["boxes"][best : best + 1], target["boxes"]))
            right += overlap >= 0.5 and bool(detection["labels"][best] == target["labels"][0])
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batches", type=int, default=20, help="of eight images, to train on")
    parser.add_argument("--percentile", type=float, default=0.7)
    parser.add_argument("--out", type=Path, default=Path("outputs/detection"))
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    batches = [drawn(8, generator) for _ in range(options.batches)]
    validation = [drawn(8, generator) for _ in range(8)]
    model = detector()

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=5e-4)

    steps = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(options.train_epochs):
        for batch in batches:
            steps.zero_grad()
            loss(model, batch).backward()
            steps.step()

    options.out.mkdir(parents=True, exist_ok=True)
    report = hk.compress(
        model,
        hk.methods.WeakSubnetwork(options.percentile, epochs=options.epochs),
        data=batches,
        train_step=loss,
        evaluate=lambda network: found(network, validation),
        optimizer=optimizer,
        example=torch.stack(validation[0][0]),
    )
    print(report)
    hk.save(report.model, options.out / "detector.safetensors")  # load(path, into=detector())
    before, after = report.accuracy or (0.0, 0.0)
    fewer = report.macs[0] / report.macs[1]
    print(f"Found {before:.3f} -> {after:.3f} of the objects with {fewer:.2f} times fewer MACs")


if __name__ == "__main__":
    main()
