# SPDX-License-Identifier: Apache-2.0
"""Compresses a network on one task and transfers it to another.

    python examples/transfer.py [--train-epochs N] [--epochs N] [--transfer-epochs N]

The first task is to tell the digits 0 to 4 of those that scikit-learn ships, the second 5 to 9.
The network learns the first and loses filters by WSP; then the dense network and the compressed one
get a new last layer, and both learn the second task from a few images.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.datasets import Dataset, Split

LINEAR = nn.Linear | hk.nn.SupportLinear


def task(data: Dataset, digits: range) -> Dataset:
    """Takes some of the digits, numbered from zero."""

    def part(split: Split) -> Split:
        chosen = split.chosen((split.labels >= digits.start) & (split.labels < digits.stop))
        return Split(chosen.images, chosen.labels - digits.start)

    return Dataset(part(data.train), part(data.validation), part(data.test))


def train(model: nn.Module, split: Split, epochs: int, rate: float) -> None:
    batches = split.shuffled(64)
    steps = torch.optim.SGD(model.parameters(), rate, 0.9, weight_decay=1e-4)
    model.train()
    for epoch in range(epochs):
        for x, label in batches(epoch):
            steps.zero_grad()
            nn.functional.cross_entropy(model(x), label).backward()
            steps.step()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    return float((model.eval()(split.images).argmax(1) == split.labels).float().mean())


def with_new_head(model: nn.Module, classes: int) -> nn.Module:
    """Puts a new last layer into a network, for as many features as that has now."""
    name, last = [(n, m) for n, m in model.named_modules() if isinstance(m, LINEAR)][-1]
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, nn.Linear(last.in_features, classes))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-epochs", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--transfer-epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=200, help="of the second task, to learn from")
    options = parser.parse_args()

    torch.manual_seed(0)
    data = hk.datasets.digits()
    first, second = task(data, range(5)), task(data, range(5, 10))
    dense = with_new_head(hk.models.digits_net(), 5)
    train(dense, first.train, options.train_epochs, 0.05)

    report = hk.compress(
        dense,
        hk.methods.WeakSubnetwork(0.6, epochs=options.epochs, multiple=8),
        data=first.train.shuffled(64),
        eval_data=first.validation.batches(256),
        example=first.test.images[:8],
    )
    print(report)

    few = second.train.chosen(slice(options.images))
    for name, network in (("dense", dense), ("compressed", report.model)):
        network = with_new_head(network, 5)
        train(network, few, options.transfer_epochs, 0.02)
        right = accuracy(network, second.test)
        millions = hk.stats.macs(network, second.test.images[:1]) / 1e6
        print(f"{name}: {right:.3f} of the second task, {millions:.3f} million MACs")


if __name__ == "__main__":
    main()
