# SPDX-License-Identifier: Apache-2.0
"""``hetconv compress``: trains a network, compresses it by a method, and writes what came of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import io, json_output, models
from ..datasets import Dataset, digits, read_folder, shifted_and_flipped
from ..errors import ArgumentError, HetconvError, InputTypeError, SpeedupError, mismatch
from ..factory import call_factory, is_factory
from ..files import write_text, writing
from ..layer_options import check_device
from ..option_types import real, seed, whole
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
from .settings import listed, settings
from .state import UNREADABLE, StateFile
from .training import Data, Training, seeded

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
# Those whose images the command reads: digits, MNIST and CIFAR-10.
_NETWORKS = ("digits_net", "lenet5", "vgg16_cifar", "resnet20", "resnet56", "resnet110")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser."""
    add = parser.add_argument
    add("method", choices=tuple(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--data", default="digits",
        help="digits (of scikit-learn, the default), a folder with MNIST's IDX files or "
        "CIFAR-10's binary files, or "
        "module:function, which returns batches (images, labels) to train on, to decide by and "
        "for the report: three iterables, such as DataLoaders")  # fmt: skip
    add("--validation", type=whole(), default=5000,
        help="training images of such a folder to decide by (5000)")  # fmt: skip
    add("--model", metavar="MODEL",
        help=f"{', '.join(_NETWORKS)} (digits_net for the digits, lenet5 for MNIST, else "
        "vgg16_cifar), or "
        "module:function, which returns a network")  # fmt: skip
    add("--weights", type=Path, help="a state dict of the trained network; otherwise it is trained")
    add("--train-epochs", type=whole(0), default=20, help="of that training (20)")
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of the method, as JSON or text, such as epochs=5 (repeatable)")  # fmt: skip
    add("--settings", action="store_true", help="list the method's settings and stop")
    add("--skip", action="append", default=[], help="leave this layer alone (repeatable)")
    add(
        "--batch",
        type=whole(),
        default=64,
        help="images in a batch (64); your own data has its own",
    )
    add("--learning-rate", type=real(0), default=0.01, help="of SGD, at the start (0.01)")
    add("--seed", type=seed, default=0, help="of all that is drawn (0)")
    add("--device", default="cpu", help="such as cpu or cuda:0")
    add("--require-speedup", type=real(0), metavar="X",
        help="exit code 1 unless the network became X times as fast")  # fmt: skip
    add("--no-measure", action="store_true", help="do not time anything")
    add("--out", type=Path, default=Path("outputs/compress"),
        help="results, and the state to continue from, go here (outputs/compress)")  # fmt: skip
    json_output.add_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        The exit code, 0.

    Raises:
        HetconvError: data, weights or state cannot be read, or results not be written.
        ArgumentError: a setting is unknown or out of range.
        SpeedupError: the network did not become as fast as required.
    """
    if options.settings:
        kind = METHODS[options.method]
        print(json.dumps(settings(kind), indent=2) if options.json else listed(kind))
        return 0
    failed: list[SpeedupError] = []
    json_output.emit(options, lambda: _run(options, failed))
    if failed:
        raise failed[0]
    return 0


def _run(options: argparse.Namespace, failed: list[SpeedupError]) -> dict[str, Any]:
    """Compresses and writes the results.

    Args:
        options: those of the command.
        failed: gets the error of a network that did not become as fast as required.

    Returns:
        What the results file holds.
    """
    kind = METHODS[options.method]
    method = build_method(kind, options.set)
    if options.batch < 2:
        raise ArgumentError(mismatch("--batch", options.batch, "at least 2"))
    check_device(options.device)
    data = read_data(options.data, options.batch, options.validation)
    name = options.model or network_for(first_batch(data.test, "test")[0])
    training = sgd(data, options.learning_rate)
    model = dense_network(
        name, options.weights, training, options.train_epochs, options.seed, options.out,
        options.device,
    )  # fmt: skip
    images = first_batch(data.test, "test")[0]
    example = images[: min(options.batch, len(images))]
    try:
        report = compress(
            model, method, data=training.data, eval_data=training.eval_data,
            optimizer=training.optimizer, example=example, skip=options.skip, seed=options.seed,
            state=options.out / f"{options.method}.state.pt", measure=not options.no_measure,
            require_speedup=options.require_speedup,
        )  # fmt: skip
    except SpeedupError as error:
        failed.append(error)
        report = error.report
    judge = Training(eval_data=data.test)
    with torch.no_grad():
        before, after = (judge.judge(net) for net in (model, report.model))
    record = report.to_dict() | {"test_accuracy": [before, after], "network": name}
    write_text(options.out / f"{options.method}.json", json.dumps(record, indent=2) + "\n")
    with writing(options.out / f"{options.method}.pt", also=(RuntimeError,)) as beside:
        torch.save(report.model.state_dict(), beside)
    print(report)
    print(f"Accuracy on {data.seen_by_nothing} that nothing above has seen: "
          f"{before:.4f} -> {after:.4f}.")  # fmt: skip
    whole = options.out / f"{options.method}.safetensors"
    try:
        io.save(report.model, whole)
    except HetconvError as error:  # safetensors is an extra
        print(f"{error} Wrote a state dict only.")
    else:
        print(f"Wrote {whole}: hetconv run {whole}, hetconv quantize {whole}")
    print(f"Wrote {options.out / options.method}.json, .pt and .state.pt.")
    return record


class Batches(NamedTuple):
    """What a network is trained on, what decides, and what only the report sees, in batches.

    Attributes:
        train: batches, anew at each epoch, or a callable of the epoch's number.
        validation: batches for decisions.
        test: batches for the report.
        seen_by_nothing: says how much the last are.
    """

    train: Data
    validation: Iterable[Any]
    test: Iterable[Any]
    seen_by_nothing: str


def read_data(text: str, batch: int, validation: int) -> Batches:
    """Reads the data that ``--data`` names.

    Raises:
        HetconvError: it cannot be read.
        ArgumentError: a user's factory returned something else than three kinds of batches.
    """
    if is_factory(text):
        found = call_factory(text, "--data")
        if isinstance(found, Dataset):
            return batches_of(found, batch, augment=False)
        if not isinstance(found, tuple | list) or len(found) != 3:
            raise InputTypeError(
                mismatch(f"what {text} returned", type(found).__name__,
                         "three: batches to train on, to decide by, and for the report")
            )  # fmt: skip
        train, decide, report = found
        for name, part in (("validation", decide), ("test", report)):
            if not isinstance(part, Iterable) or isinstance(part, Iterator):
                raise InputTypeError(
                    mismatch(f"{name} data of {text}", type(part).__name__,
                             "an iterable of batches that starts anew each time")
                )  # fmt: skip
        return Batches(train, decide, report, "the test data")
    if text == "digits":
        return batches_of(digits(), batch, augment=False)
    found = read_folder(text, validation)
    return batches_of(found, batch, augment=is_colour(found))


def is_colour(data: Dataset) -> bool:
    """Tells photographs from digits, which must not be mirrored."""
    return data.train.images.shape[1] == 3


def network_for(images: Tensor) -> str:
    """Names the network for images of this size that a command takes by default."""
    fitting = (name for name in _NETWORKS if models.input_size(name) == images.shape[1:])
    return next((n for n in fitting if n.startswith(("digits", "lenet"))), "vgg16_cifar")


def batches_of(data: Dataset, batch: int, augment: bool) -> Batches:
    """Deals the images of a data set out in batches; those of training are shuffled."""
    return Batches(
        data.train.shuffled(batch, shifted_and_flipped if augment else None),
        data.validation.batches(max(batch, 256)),
        data.test.batches(batch),
        f"{len(data.test)} images",
    )


def first_batch(batches: Iterable[Any], name: str) -> tuple[Tensor, Tensor]:
    """Returns the first batch, images and labels.

    Raises:
        InputTypeError: it is something else.
    """
    batch = next(iter(batches), None)
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    if not pair or not all(isinstance(t, Tensor) for t in batch):  # type: ignore[union-attr]
        raise InputTypeError(
            mismatch(f"first batch of the {name} data", type(batch).__name__,
                     "a pair of tensors (images, labels)")
        )  # fmt: skip
    return batch[0], batch[1]  # type: ignore[index]


def build_method(kind: type[Method], settings: list[str]) -> Method:
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
    return sgd(batches_of(data, batch, augment), learning_rate)


def sgd(data: Batches, learning_rate: float) -> Training:
    """Returns how a network is trained on batches: SGD with momentum, judged by validation."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, learning_rate, momentum=0.9, weight_decay=1e-4)

    return Training(data.train, eval_data=data.validation, optimizer=optimizer)


def dense_network(
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
    place = check_device(device)
    with seeded(seed, place):
        model = _network(name).to(place)
    if weights is not None:
        _load(model, weights, place)
        return model
    file = re.sub(r"[^\w.-]+", ".", name)
    return train_dense(model, training, epochs, seed, out / f"{file}.state.pt")


def _network(name: str) -> nn.Module:
    """Builds a network of this package, or one of the user's."""
    if name in _NETWORKS:
        return models.create(name)
    if not is_factory(name):
        raise ArgumentError(
            mismatch("--model", repr(name), f"module:function, or one of {', '.join(_NETWORKS)}")
        )
    model = call_factory(name, "--model")
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            mismatch(f"what {name} returned", type(model).__name__, "an nn.Module")
        )
    if next(model.parameters(), None) is None:
        raise ArgumentError(mismatch(f"network of {name}", "no weights", "something to compress"))
    return model


def _load(model: nn.Module, path: Path, place: torch.device) -> None:
    """Loads the weights of a file that ``torch.save`` wrote; no code in it is run."""
    try:
        found = torch.load(path, map_location=place, weights_only=True)
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}, and a state dict was expected")
        model.load_state_dict(found)
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HetconvError(f"--weights {path} cannot be used: {reason}") from error


def train_dense(
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

    example = first_batch(training.batches(0), "training")[0][:2]
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
def top1_accuracy(model: nn.Module, data: Dataset, batch: int = 256) -> float:
    """Returns the top-1 accuracy on the test images."""
    found = Training(eval_data=data.test.batches(batch)).judge(model)
    assert found is not None
    return found
