# SPDX-License-Identifier: Apache-2.0
"""Compresses a network for the digits that scikit-learn ships: self-grouping, as in the paper and
as hardware likes it, side by side.

    python examples/digits.py [--epochs N] [--train-epochs N] [--folder FOLDER]

Run it again after a kill, and it continues where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.compression import compare
from hetconv_kernels.models import digits_net


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


def train(model: nn.Module, data, epochs: int) -> None:
    batches, steps = data.train.shuffled(64), torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for epoch in range(epochs):
        for x, label in batches(epoch):
            steps.zero_grad()
            nn.functional.cross_entropy(model(x), label).backward()
            steps.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--train-epochs", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path("outputs/digits"))
    options = parser.parse_args()

    torch.manual_seed(0)
    data, model = hk.datasets.digits(), digits_net()
    train(model, data, options.train_epochs)

    methods = {
        "self-grouping, the paper": hk.methods.SelfGrouping(target=0.7, epochs=options.epochs),
        "runs of 8 channels, groups of 16 filters": hk.methods.SelfGrouping(
            target=0.7, epochs=options.epochs, granularity=8, tile=16, clusters=4
        ),
    }
    reports = []
    for number, method in enumerate(methods.values()):
        report = hk.compress(
            model,
            method,
            data=data.train.shuffled(64),
            eval_data=data.validation.batches(256),
            example=data.test.images[:64],
            optimizer=optimizer,
            state=options.folder / f"state-{number}.pt",
            measure_seconds=2.0,
        )
        print(report, "\n")
        reports.append(report)
    print(compare(reports, list(methods)))


if __name__ == "__main__":
    main()
