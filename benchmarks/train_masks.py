# SPDX-License-Identifier: Apache-2.0
"""Trains a small network and writes the masks that self-grouping makes of it to trained_masks.json.

The masks of `benchmarks.supports` come from Gaussian weights, which have no structure. These come
from a network that was trained here, on the handwritten digits that scikit-learn ships: a stack of
3×3 convolutions with the widths of the speed table. Self-grouping (arXiv 2009.13803) drops ten per
cent more at each step, and the network trains on for a little after each, as in the paper's "local"
scheme; the paper's 20 epochs a step are `LOCAL_EPOCHS` here. The first convolution and the ones
that widen stay dense.

``python -m benchmarks.train_masks`` takes some minutes. Another machine trains to other last bits
and so to other masks, which is why the file is committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from benchmarks.supports import FILTER_CLUSTERS, TRAINED_PATH, entry_of, trained_key
from hetconv_kernels.self_grouping import self_group

WIDTHS = (64, 128, 256, 512)
_HALVED_AFTER = (64, 128)  # the image is halved after these: 8², 4², then 2² pixels
KEPT = (70, 90)  # per cent dropped of the masks that are written
STEP_PERCENT = 10
FIRST_EPOCHS, LOCAL_EPOCHS = 12, 2
BATCH = 64
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class HeldOutDigits:
    """Handwritten digits: every fifth is held out."""

    images: Tensor  # [N, 1, 8, 8]
    labels: Tensor  # [N]
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls) -> HeldOutDigits:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.tensor(data.target)
        held_out = torch.arange(len(labels)) % 5 == 0
        return cls(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


class MaskNetwork(nn.Module):
    """For each width: a convolution that widens and one that self-grouping prunes, with BN."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.grouped: dict[int, hk.nn.SupportConv2d] = {}
        before = 1
        for width in widths:
            dense = hk.Support.dense(width, width, 3)
            self.grouped[width] = hk.nn.SelfGroupConv2d(
                width, width, 3, padding=1, bias=False, support=dense, backend="vendor"
            )
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU(), self.grouped[width]]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * (width in _HALVED_AFTER)
            before = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)  # [N, 10]
        return logits


def train_network(network: MaskNetwork, digits: HeldOutDigits, epochs: int, seed: int) -> None:
    """Trains with Adam on cross-entropy; images are shifted by up to one pixel."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.labels), generator=generator).split(BATCH):
            down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
            x = digits.images[chosen].roll((down, right), (2, 3))
            x = x.contiguous(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(network(x), digits.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def held_out_accuracy(network: MaskNetwork, digits: HeldOutDigits) -> float:
    """Returns the share of held-out digits that are named rightly."""
    found = network.eval()(digits.test_images).argmax(1)
    return float((found == digits.test_labels).float().mean())


def prune(network: MaskNetwork, digits: HeldOutDigits, percent: int, seed: int) -> None:
    """Takes one step of self-grouping on every grouped layer and trains on."""
    for layer in network.grouped.values():
        layer.set_support(self_group(layer.weight, percent, FILTER_CLUSTERS, layer.support, seed))
    train_network(network, digits, LOCAL_EPOCHS, seed + percent)


def run_stages(
    network: MaskNetwork, digits: HeldOutDigits, first_epochs: int, seed: int
) -> Iterator[int]:
    """Trains, then prunes step by step; yields the per cent dropped after each stage."""
    train_network(network, digits, first_epochs, seed)
    yield 0
    for percent in range(STEP_PERCENT, max(KEPT) + 1, STEP_PERCENT):
        prune(network, digits, percent, seed)
        yield percent


def main() -> None:
    """Trains, prints the accuracy at every step, and writes the file."""
    seed = 0
    torch.manual_seed(seed)
    digits, network = HeldOutDigits.load(), MaskNetwork().to(memory_format=torch.channels_last)
    reached, lines = {}, []
    for percent in run_stages(network, digits, FIRST_EPOCHS, seed):
        reached[str(percent)] = round(held_out_accuracy(network, digits), 4)
        groups = {width: len(layer.support.groups) for width, layer in network.grouped.items()}
        print(f"{percent:2d} % dropped: accuracy {reached[str(percent)]:.4f}, groups {groups}")
        for width in WIDTHS if percent in KEPT else ():
            entry = entry_of(network.grouped[width].support)
            lines.append(f"{json.dumps(trained_key(percent, width, width))}: {json.dumps(entry)}")
    lines.insert(0, f'"held-out accuracy by per cent dropped": {json.dumps(reached)}')
    TRAINED_PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
