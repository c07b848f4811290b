# SPDX-License-Identifier: Apache-2.0
"""Compresses a network for CIFAR-10, read from a folder in the original binary format.

    python examples/cifar.py cifar-10-batches-bin [--model resnet20] [--p 4] [--epochs N]

Trains the network if no weights are given, makes its convolutions HetConv, trains on, and reports
accuracy, multiply-accumulates and measured time. Run it again after a kill, and it continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.datasets import cifar10, shifted_and_flipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with data_batch_1.bin … and test_batch.bin")
    parser.add_argument("--model", default="resnet20", choices=["resnet20", "vgg16_cifar"])
    parser.add_argument("--weights", type=Path, help="a state dict of the dense network")
    parser.add_argument("--train-epochs", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--validation", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--p", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("outputs/cifar"))
    options = parser.parse_args()

    torch.manual_seed(0)
    data = cifar10(options.folder, options.validation)
    model: nn.Module = getattr(hk.models, options.model)()
    batches = data.train.shuffled(options.batch, shifted_and_flipped)
    weights = options.weights or options.out / "dense.pt"
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, epochs=options.train_epochs, steps_per_epoch=len(batches(0))
        )
        for epoch in range(options.train_epochs):
            for x, label in batches(epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), label).backward()
                optimizer.step()
                schedule.step()
        options.out.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights)

    report = hk.compress(
        model,
        hk.methods.Het(p=options.p, epochs=options.epochs),
        data=batches,
        eval_data=data.validation.batches(256),
        example=data.test.images[:8],
        state=options.out / "state.pt",
    )
    print(report)

    with torch.no_grad():
        network = report.model.eval()
        right = sum(
            int((network(x).argmax(1) == label).sum()) for x, label in data.test.batches(256)
        )
    print(f"Accuracy on the {len(data.test)} test images: {right / len(data.test):.4f}")


if __name__ == "__main__":
    main()
