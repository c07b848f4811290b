# SPDX-License-Identifier: Apache-2.0
"""``hetconv quantize``: a trained network in 8 bits, and what came of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import io
from ..compression.command import (
    _NETWORKS,
    Batches,
    _batches,
    _first,
    dense,
    read_data,
    sgd,
    train,
)
from ..compression.training import Training
from ..datasets import cifar10, digits
from ..errors import ArgumentError, HetconvError, InputTypeError, mismatch
from ..factory import is_factory
from ..files import write_text, writing
from ..layer_options import check_device
from ..option_types import real, seed, whole
from .checks import RANGES
from .observers import NAMES
from .quantize import MIN_SQNR, convert, prepare, quantize

_ACTIVATIONS = {str(dtype).removeprefix("torch."): dtype for dtype in RANGES}
_RATE = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser."""
    add = parser.add_argument
    add("file", nargs="?", type=Path, metavar="FILE",
        help="a network that hetconv_kernels.io saved, such as a compressed one")  # fmt: skip
    add("--data", default="digits",
        help="digits (of scikit-learn, the default), a folder of CIFAR-10, or module:function, "
        "which returns batches (images, labels) to train and calibrate on, to judge by and for the "
        "report: three iterables, such as DataLoaders")  # fmt: skip
    add("--validation", type=whole(), default=5000,
        help="training images of a CIFAR-10 folder to judge by (5000)")  # fmt: skip
    add("--model", metavar="MODEL",
        help=f"{', '.join(_NETWORKS)} (digits_net for the digits, else vgg16_cifar), or "
        "module:function, which returns a network")  # fmt: skip
    add("--weights", type=Path, help="a state dict of the trained network; otherwise it is trained")
    add("--train-epochs", type=whole(0), default=20, help="of that training (20)")
    add("--images", type=whole(), default=512, help="training images to calibrate on (512)")
    add("--observer", choices=NAMES, default="minmax", help="how ranges are chosen (minmax)")
    add("--percentile", type=real(0, 100), default=99.99, help="what that observer covers (99.99)")
    add("--activations", choices=_ACTIVATIONS, default="uint8", help="dtype between layers (uint8)")
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


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        The exit code, 0.

    Raises:
        HetconvError: data, weights or the file cannot be read, or results not be written.
        ArgumentError: a value is out of range.
    """
    check_device(options.device)
    if options.file is not None and (options.model or options.weights):
        raise ArgumentError(
            mismatch("FILE with --model or --weights", str(options.file), "one network, not two")
        )
    data, images = _data(options)
    training = sgd(data, 0.01)
    model = _network(options, training).eval()
    choices: dict[str, Any] = {
        "observer": options.observer,
        "percentile": options.percentile,
        "activations": _ACTIVATIONS[options.activations],
        "min_sqnr": options.min_sqnr,
        "skip": options.skip,
    }
    batches = images.to(options.device).split(options.batch)

    def evaluate(net: nn.Module) -> float:
        found = training.judge(net)
        assert found is not None
        return found

    report = quantize(
        model, batches, evaluate=evaluate, max_drop=options.max_drop,
        measure=not options.no_measure, **choices,
    )  # fmt: skip
    print(report)
    made, names = report.model, {"float32": model, "calibrated": report.model}
    if options.qat_epochs:
        made = _trained(model, batches, options, data, choices)
        names["trained"] = made
    found = {name: Training(eval_data=data.test).judge(net) for name, net in names.items()}
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
    return 0


def _data(options: argparse.Namespace) -> tuple[Batches, Tensor]:
    """Reads the data, and the images to calibrate on: the first ones to train on.  # [N, C, H, W]

    Raises:
        HetconvError: it cannot be read.
        ArgumentError, InputTypeError: a user's factory returned something else than three kinds of
            batches of images and labels.
    """
    if is_factory(options.data):
        data = read_data(options.data, options.batch, options.validation)
        found, count = [], 0
        for batch in Training(data.train).batches(0):
            found.append(_first([batch], "training")[0])
            count += len(found[-1])
            if count >= options.images:
                break
        if not count or any(images.shape[1:] != found[0].shape[1:] for images in found):
            raise InputTypeError(
                mismatch("training data", [tuple(i.shape) for i in found][:4],
                         "images of one size to calibrate on")
            )  # fmt: skip
        return data, torch.cat(found)[: options.images]
    small = options.data == "digits"
    images = digits() if small else cifar10(options.data, options.validation)
    data = _batches(images, max(options.batch, 2), augment=not small)
    return data, images.train.images[: options.images]


def _network(options: argparse.Namespace, training: Training) -> nn.Module:
    if options.file is not None:
        try:
            return io.load(options.file, device=options.device)
        except FileNotFoundError as error:
            raise HetconvError(f"{options.file} is not there.") from error
    name = options.model or ("digits_net" if options.data == "digits" else "vgg16_cifar")
    return dense(
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
    return convert(train(network, sgd(data, _RATE / 10), options.qat_epochs, options.seed, None))
