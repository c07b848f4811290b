# SPDX-License-Identifier: Apache-2.0
"""``hetconv compress``: trains a network, compresses it by a method, and writes what came of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..datasets import Dataset, cifar10, digits, shifted_and_flipped
from ..errors import ArgumentError, HetconvError, SpeedupError, mismatch
from . import (
    ADMM,
    FilterCorrelation,
    FrequencyPruning,
    Het,
    Method,
    PlayAndPrune,
    SelfGrouping,
    Stability,
    WeakSubnetwork,
    compress,
)
from .identity import digest, identity_of, weights_of
from .progress import Progress
from .state import StateFile
from .training import Training, seeded

METHODS: dict[str, type[Method]] = {
    "het": Het,
    "self-grouping": SelfGrouping,
    "wsp": WeakSubnetwork,
    "correlation": FilterCorrelation,
    "play-and-prune": PlayAndPrune,
    "stability": Stability,
    "frequency": FrequencyPruning,
    "admm": ADMM,
}
_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "digits_net": models.digits_net,
    "vgg16_cifar": models.vgg16_cifar,
    "resnet20": models.resnet20,
    "resnet56": models.resnet56,
    "resnet110": models.resnet110,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser."""
    add = parser.add_argument
    add("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    add(
        "--data",
        default="digits",
        help="digits (of scikit-learn, the default), or a folder with CIFAR-10's binary files",
    )
    add(
        "--validation",
        type=int,
        default=5000,
        help="training images of a CIFAR-10 folder to decide by (5000)",
    )
    add("--model", choices=_NETWORKS, metavar="MODEL",
        help=f"{', '.join(_NETWORKS)} (digits_net for the digits, else vgg16_cifar)")  # fmt: skip
    add("--weights", type=Path, help="a state dict of the trained network; otherwise it is trained")
    add("--train-epochs", type=int, default=20, help="of that training (20)")
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of the method, as JSON or text, such as epochs=5 (repeatable)")  # fmt: skip
    add("--settings", action="store_true", help="list the method's settings and stop")
    add("--skip", action="append", default=[], help="leave this layer alone (repeatable)")
    add("--batch", type=int, default=64, help="images in a batch (64)")
    add("--learning-rate", type=float, default=0.01, help="of SGD, at the start (0.01)")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="such as cpu or cuda:0")
    add("--require-speedup", type=float, metavar="X",
        help="exit code 1 unless the network became X times as fast")  # fmt: skip
    add("--no-measure", action="store_true", help="do not time anything")
    add("--out", type=Path, default=Path("outputs/compress"),
        help="results, and the state to continue from, go here (outputs/compress)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        The exit code, 0.

    Raises:
        HetconvError: data, weights or state cannot be read, or results not be written.
        ArgumentError: a setting is unknown or out of range.
        SpeedupError: the network did not become as fast as required.
    """
    kind = METHODS[options.method]
    if options.settings:
        print((kind.__doc__ or "").strip())
        for field in dataclasses.fields(kind):
            print(f"  {field.name}={json.dumps(field.default)}")
        return 0
    method = build(kind, options.set)
    if options.batch < 2 or options.train_epochs < 0:
        raise ArgumentError(
            mismatch("--batch, --train-epochs", (options.batch, options.train_epochs),
                     "at least 2 and 0")
        )  # fmt: skip
    small = options.data == "digits"
    data = digits() if small else cifar10(options.data, options.validation)
    name = options.model or ("digits_net" if small else "vgg16_cifar")
    training = trainer(data, options.batch, options.learning_rate, not small)
    model = dense(
        name, options.weights, training, options.train_epochs, options.seed, options.out,
        options.device,
    )  # fmt: skip
    example = data.test.images[: min(options.batch, len(data.test))]
    failed: SpeedupError | None = None
    try:
        report = compress(
            model, method, data=training.data, eval_data=training.eval_data,
            optimizer=training.optimizer, example=example, skip=options.skip, seed=options.seed,
            state=options.out / f"{options.method}.state.pt", measure=not options.no_measure,
            require_speedup=options.require_speedup,
        )  # fmt: skip
    except SpeedupError as error:
        failed, report = error, error.report
    before, after = (accuracy(net, data, options.batch) for net in (model, report.model))
    record = report.to_dict() | {"test_accuracy": [before, after], "network": name}
    _write(options.out, f"{options.method}.json", json.dumps(record, indent=2) + "\n")
    torch.save(report.model.state_dict(), options.out / f"{options.method}.pt")
    print(report)
    print(f"Accuracy on {len(data.test)} images that nothing above has seen: "
          f"{before:.4f} -> {after:.4f}.")  # fmt: skip
    print(f"Wrote {options.out / options.method}.json, .pt and .state.pt.")
    if failed is not None:
        raise failed
    return 0


def build(kind: type[Method], settings: list[str]) -> Method:
    """Makes a method of ``name=value`` texts.

    Raises:
        ArgumentError: a setting is unknown, has the wrong type, or is out of range.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise ArgumentError(
                mismatch("--set", repr(text), f"NAME=VALUE with one of {', '.join(sorted(known))}")
            )
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    try:
        return kind(**values)
    except TypeError as error:
        raise ArgumentError(f"--set: {error}; expected values of the right type.") from error


def trainer(data: Dataset, batch: int, learning_rate: float, augment: bool) -> Training:
    """Returns how a network is trained on a data set: SGD with momentum, judged by validation."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, learning_rate, momentum=0.9, weight_decay=1e-4)

    return Training(
        data.train.shuffled(batch, shifted_and_flipped if augment else None),
        eval_data=data.validation.batches(max(batch, 256)),
        optimizer=optimizer,
    )


def dense(
    name: str,
    weights: Path | None,
    training: Training,
    epochs: int,
    seed: int,
    out: Path,
    device: str,
) -> nn.Module:
    """Builds a network with weights from a file, or trains it and keeps the weights in ``out``.

    Training is resumable in itself: it is `hk.compress` with a method that drops nothing.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA was compiled in
        reason = str(error).splitlines()[0]
        raise HetconvError(f"device {device!r} cannot be used: {reason}") from error
    with seeded(seed, place):
        model = _NETWORKS[name]().to(place)
    if weights is not None:
        try:
            model.load_state_dict(torch.load(weights, map_location=place, weights_only=True))
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise HetconvError(f"--weights {weights} cannot be used: {reason}") from error
        return model
    return train(model, training, epochs, seed, out / f"{name}.state.pt")


def train(
    model: nn.Module, training: Training, epochs: int, seed: int, state: Path | None
) -> nn.Module:
    """Trains a dense network, resumably, at ten times the rate that fine-tuning uses.

    Args:
        model: trained in place.
        training: its data and optimiser.
        epochs: how many.
        seed: of all that is drawn.
        state: the file to continue from.
    """
    from .run import Run

    make = training.optimizer
    assert make is not None

    def faster(parameters: Any) -> torch.optim.Optimizer:
        optimizer = make(parameters)
        for group in optimizer.param_groups:
            group["lr"] *= 10
        return optimizer

    example = next(iter(training.batches(0)))[0][:2]
    device = next(model.parameters()).device
    training = dataclasses.replace(training, optimizer=faster)
    identity = {
        "dense": type(model).__name__,
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
        "weights at the start": digest(weights_of(model)),
        "epochs": epochs,
        "seed": seed,
        "training": None if state is None else identity_of(training, model, None),
    }
    shown = Progress()
    try:
        run = Run(
            model, {}, {}, {}, example.to(device), training, seed, StateFile(state, identity), shown
        )
        run.train("dense", epochs)
    finally:
        shown.close()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, batch: int = 256) -> float:
    """Returns the top-1 accuracy on the test images."""
    found = Training(eval_data=data.test.batches(batch)).judge(model)
    assert found is not None
    return found


def _write(folder: Path, name: str, text: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    except OSError as error:
        raise HetconvError(f"--out {folder} cannot be written to: {error}.") from error
