# SPDX-License-Identifier: Apache-2.0
"""Trains a small U-Net, makes its convolutions HetConv, trains on, and optimises it.

    python examples/segmentation.py [--train-epochs N] [--epochs N] [--p P] [--out FOLDER]

The images are drawn: overlapping discs on noise; each pixel is of a disc or not. The network is
judged by the intersection over union of the pixels. Run it again after a kill, and it continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hetconv_kernels as hk

EDGE = 64
Batch = tuple[Tensor, Tensor]


def block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Two levels down and up again, each joined to what it was on the way down."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = block(3, width), block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.up, self.last = block(6 * width, 2 * width), block(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        coarse = self.second(F.max_pool2d(fine, 2))
        y = self.bottom(F.max_pool2d(coarse, 2))
        y = self.up(torch.cat([F.interpolate(y, scale_factor=2.0), coarse], 1))
        y = self.last(torch.cat([F.interpolate(y, scale_factor=2.0), fine], 1))
        return self.head(y)  # [N, 1, H, W], above zero where it is a disc


def drawn(count: int, generator: torch.Generator) -> Batch:
    """Draws images and which pixels are of a disc.  # [N, 3, H, W], float [N, 1, H, W]"""
    place = torch.arange(EDGE, dtype=torch.float32)
    masks = torch.zeros(count, 1, EDGE, EDGE, dtype=torch.bool)
    for mask in masks[:, 0]:
        for _ in range(3):
            x, y, radius = (
                float(low + (high - low) * torch.rand((), generator=generator))
                for low, high in ((0, EDGE), (0, EDGE), (4, 14))
            )
            mask |= (place[:, None] - y) ** 2 + (place - x) ** 2 < radius**2
    noise = torch.rand(count, 3, EDGE, EDGE, generator=generator)
    return 0.6 * noise + 0.25 * masks, masks.float()


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def overlap(model: nn.Module, batches: list[Batch]) -> float:
    """Returns the intersection over union of all discs."""
    both = either = 0
    for images, masks in batches:
        found = model(images) > 0
        both += int((found & masks.bool()).sum())
        either += int((found | masks.bool()).sum())
    return both / max(either, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batches", type=int, default=20, help="of eight images, to train on")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--p", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("outputs/segmentation"))
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    batches = [drawn(8, generator) for _ in range(options.batches)]
    validation = [drawn(8, generator) for _ in range(4)]
    model = UNet(options.width)
    steps = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(options.train_epochs):
        for batch in batches:
            steps.zero_grad()
            loss(model, batch).backward()
            steps.step()

    options.out.mkdir(parents=True, exist_ok=True)
    report = hk.compress(
        model,
        hk.methods.Het(p=options.p, epochs=options.epochs),
        data=batches,
        train_step=loss,
        evaluate=lambda network: overlap(network, validation),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        example=validation[0][0],
        state=options.out / "state.pt",
    )
    print(report)
    fast = hk.optimize(report.model.eval(), validation[0][0]).model
    hk.save(fast, options.out / "unet.safetensors")
    before, after = report.accuracy or (0.0, 0.0)
    with torch.no_grad():
        optimised = overlap(fast, validation)
    print(f"Intersection over union {before:.3f} -> {after:.3f}, optimised {optimised:.3f}")


if __name__ == "__main__":
    main()
