# SPDX-License-Identifier: Apache-2.0
"""``hetconv quantize``: a trained network in 8 bits, and what came of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import io, json_output
from ..compression.command import (
    _NETWORKS,
    Batches,
    batches_of,
    dense_network,
    first_batch,
    is_colour,
    network_for,
    read_data,
    sgd,
    train_dense,
)
from ..compression.training import Training
from ..datasets import digits, read_folder
from ..errors import ArgumentError, HetconvError, InputTypeError, mismatch
from ..factory import is_factory
from ..files import write_text, writing
from ..layer_options import check_device
from ..option_types import real, seed, whole
from .checks import INTEGER_RANGES
from .observers import OBSERVERS
from .quantize import MIN_SQNR, convert, prepare, quantize

_ACTIVATIONS = {str(dtype).removeprefix("torch."): dtype for dtype in INTEGER_RANGES}
_RATE = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser."""
    add = parser.add_argument
    add("file", nargs="?", type=Path, metavar="FILE",
        help="a network that hetconv_kernels.io saved, such as a compressed one")  # fmt: skip
    add("--data", default="digits",
        help="digits (of scikit-learn, the default), a folder of MNIST or CIFAR-10, or "
        "module:function, which returns batches (images, labels) to train and calibrate on, to "
        "decide by and for the report: three iterables, such as DataLoaders")  # fmt: skip
    add("--validation", type=whole(), default=5000,
        help="training images of such a folder to judge by (5000)")  # fmt: skip
    add("--model", metavar="MODEL",
        help=f"{', '.join(_NETWORKS)} (digits_net for the digits, lenet5 for MNIST, else "
        "vgg16_cifar), or module:function, which returns a network")  # fmt: skip
    add("--weights", type=Path, help="a state dict of the trained network; otherwise it is trained")
    add("--train-epochs", type=whole(0), default=20, help="of that training (20)")
    add("--images", type=whole(), default=512, help="training images to calibrate on (512)")
    add("--observer", choices=OBSERVERS, default="minmax", help="how ranges are chosen (minmax)")
    add("--percentile", type=real(0, 100), default=99.99, help="what that observer covers (99.99)")
    add(
        "--activations",
        choices=tuple(_ACTIVATIONS),
        default="uint8",
        help="dtype between layers (uint8)",
    )
    add("--min-sqnr", type=real(-1e9, 1e9), default=MIN_SQNR,
        help=f"layers under this many dB stay in float ({MIN_SQNR:g})")  # fmt: skip
    add("--max-drop", type=real(0, low_too=True), metavar="X",
        help="put layers back to float until no more of the accuracy is lost")  # fmt: skip
    add("--skip", action="append", default=[], help="leave this layer in float (repeatable)")
    add("--qat-epochs", type=whole(0), default=0,
        help="train under fake quantisation for so many epochs before (0)")  # fmt: skip
    add("--batch", type=whole(), default=64, help="images in a batch (64)")
    add("--seed", type=seed, default=0, help="of all that is drawn (0)")
    add("--device", default="cpu", help="such as cpu or cuda:0")
    add("--no-measure", action="store_true", help="do not time anything")
    add("--out", type=Path, default=Path("outputs/quantize"),
        help="results go here (outputs/quantize)")  # fmt: skip
    json_output.add_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        The exit code, 0.

    Raises:
        HetconvError: data, weights or the file cannot be read, or results not be written.
        ArgumentError: a value is out of range.
    """
    return json_output.emit(options, lambda: _run(options))


def _run(options: argparse.Namespace) -> dict[str, Any]:
    check_device(options.device)
    if options.file is not None and (options.model or options.weights):
        raise ArgumentError(
            mismatch("FILE with --model or --weights", str(options.file), "one network, not two")
        )
    data, batches = _read(options)
    training = sgd(data, 0.01)
    model = _network(options, training, batches[0]).eval()
    choices: dict[str, Any] = {
        "observer": options.observer,
        "percentile": options.percentile,
        "activations": _ACTIVATIONS[options.activations],
        "min_sqnr": options.min_sqnr,
        "skip": options.skip,
    }
    batches = [images.to(options.device) for images in batches]

    report = quantize(
        model, batches, evaluate=lambda net: _judged(training, net), max_drop=options.max_drop,
        measure=not options.no_measure, **choices,
    )  # fmt: skip
    print(report)
    made, names = report.model, {"float32": model, "calibrated": report.model}
    if options.qat_epochs:
        made = _trained(model, batches, options, data, choices)
        names["trained"] = made
    found = {name: _judged(Training(eval_data=data.test), net) for name, net in names.items()}
    print(f"Accuracy on {data.seen_by_nothing} that nothing above has seen: "
          + ", ".join(f"{name} {value:.4f}" for name, value in found.items()) + ".")  # fmt: skip
    record = report.to_dict() | {"test_accuracy": found, "network": type(model).__name__}
    write_text(options.out / "quantize.json", json.dumps(record, indent=2) + "\n")
    try:
        io.save(made, options.out / "network.safetensors")
    except HetconvError as error:  # safetensors is an extra
        with writing(options.out / "network.pt", also=(RuntimeError,)) as beside:
            torch.save(made.state_dict(), beside)
        print(f"{error} Wrote a state dict instead.")
    print(f"Wrote {options.out}/quantize.json and the network beside it.")
    return record


def _judged(training: Training, model: nn.Module) -> float:
    found = training.judge(model)
    assert found is not None
    return found


def _read(options: argparse.Namespace) -> tuple[Batches, list[Tensor]]:
    """Reads the data, and the images to calibrate on, in batches."""
    size = max(options.batch, 2)
    if is_factory(options.data):
        data = read_data(options.data, size, options.validation)
        taken = list(_taken(data, options.images))
        if not taken or any(images.shape[1:] != taken[0].shape[1:] for images in taken):
            raise InputTypeError(
                mismatch("training data", [tuple(i.shape) for i in taken][:4],
                         "images of one size to calibrate on")
            )  # fmt: skip
        return data, taken
    own = digits() if options.data == "digits" else read_folder(options.data, options.validation)
    images = own.train.images[: options.images]
    return batches_of(own, size, augment=is_colour(own)), list(images.split(options.batch))


def _taken(data: Batches, most: int) -> Iterator[Tensor]:
    """Takes so many images of an epoch."""
    for batch in Training(data.train).batches(0):
        if most <= 0:
            return
        images = first_batch([batch], "training")[0][:most]
        most -= len(images)
        yield images


def _network(options: argparse.Namespace, training: Training, images: Tensor) -> nn.Module:
    if options.file is not None:
        try:
            return io.load(options.file, device=options.device)
        except FileNotFoundError as error:
            raise HetconvError(f"{options.file} is not there.") from error
    name = options.model or network_for(images)
    return dense_network(
        name, options.weights, training, options.train_epochs, options.seed, options.out,
        options.device,
    )  # fmt: skip


def _trained(
    model: nn.Module,
    batches: Sequence[Tensor],
    options: argparse.Namespace,
    data: Batches,
    choices: dict[str, Any],
) -> nn.Module:
    """Trains under fake quantisation, at a tenth of the rate of fine-tuning, and converts."""
    network = prepare(model, batches, **choices)
    training = sgd(data, _RATE / 10)
    return convert(train_dense(network, training, options.qat_epochs, options.seed, None))
