# SPDX-License-Identifier: Apache-2.0
"""``hetconv profile``: the time of a network or a layer, layer by layer, and why."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import io, layer_options, models
from ...backends import backend_code
from ...errors import ArgumentError, HetconvError, InputTypeError, mismatch
from ...factory import call_factory, is_factory
from ...graph.convert import convert
from ...graph.optimize import optimize
from ...graph.rules import het
from ...nn.base import SupportLayer
from ...option_types import real, whole
from ...quantization.quantize import quantize
from ..stats import fitting
from .flame import write_timeline
from .measure import backends_of, layers_of, profile
from .timeline import ncu_commands, run_passes, write_proton, write_trace

_SUFFIX = ".safetensors"
_OF_A_LAYER = ("kind", "channels", "filters", "kernel", "p", "order", "density", "stride")


def add_target(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name a network or describe a layer, as `target` reads them."""
    add = parser.add_argument
    add("target", metavar="MODEL|layer",
        help=f"a {_SUFFIX} file that hetconv_kernels.io wrote; a network of this package "
        f"({', '.join(models.names())}), of timm (timm:NAME) or of torchvision "
        "(torchvision:NAME), with random weights; module:function of yours, which returns a "
        "network, or a network and an input; or 'layer' for one layer")  # fmt: skip
    layer_options.add_layer_arguments(parser, "the layer, where MODEL is 'layer'")
    parser.set_defaults(size=None)
    add("--het", type=whole(), metavar="P",
        help="make the network's convolutions HetConv of part P")  # fmt: skip


def add_runnable(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `add_target`, and whether it is optimised, as `runnable` reads them."""
    add_target(parser)
    parser.add_argument("--optimize", action="store_true",
        help="freeze, fold and fuse the network first")  # fmt: skip
    parser.add_argument("--compile", action="store_true",
        help="torch.compile what is run")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser."""
    add_runnable(parser)
    add = parser.add_argument
    add("--dense", action="store_true", help="time the dense layer in each place too")
    add("--rounds", type=whole(5), default=20, help="passes that are timed, at least 5 (20)")
    add("--seconds", type=real(0), default=10.0, help="about how long they may take (10)")
    add("--timeline", type=Path, metavar="FILE", help="write a timeline as an HTML page")
    add("--trace", type=Path, metavar="FILE", help="write a Chrome trace (ui.perfetto.dev)")
    add("--proton", type=Path, metavar="FILE", help="write a profile of Triton's proton (GPU)")
    add("--ncu", action="store_true", help="print command lines for Nsight Compute, nothing else")
    add("--passes", type=whole(0), metavar="N",
        help="only run N passes, for a profiler from outside")  # fmt: skip


def run(options: argparse.Namespace, show: Callable[[str], None]) -> int:
    """Runs the command.

    Args:
        options: as `add_arguments` describes them.
        show: prints a text.

    Returns:
        The exit code, 0.

    Raises:
        HetconvError: the target is unknown or cannot be built, or a file cannot be written.
    """
    if options.ncu:
        lines = _ncu(options)
        print(json.dumps(lines, indent=2) if options.json else "\n".join(lines))
        return 0
    model, example = runnable(options)
    with torch.no_grad():
        if options.passes is not None:
            run_passes(model, example, options.passes)
            if options.json:
                print(json.dumps({"passes": options.passes}))
            return 0
        found = profile(
            model, example, dense=options.dense, rounds=options.rounds, max_seconds=options.seconds
        )
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show(str(found))
    if options.timeline is not None:
        path = write_timeline(model, example, options.timeline)
        show(f"Wrote {path}: open it in a browser.")
    if options.trace is not None:
        path = write_trace(model, example, options.trace)
        show(f"Wrote {path}: open it at chrome://tracing or ui.perfetto.dev.")
    if options.proton is not None:
        path = write_proton(model, example, options.proton)
        show(f"Wrote {path}: proton-viewer -m time/us {path}")
    return 0


def _ncu(options: argparse.Namespace) -> list[str]:
    """Makes the command lines; where the device is no GPU they are for a machine that has one."""
    if torch.device(options.device).type == "cuda":
        return ncu_commands(target_arguments(options), list(backends_of(*target(options)).values()))
    there = argparse.Namespace(**{**vars(options), "device": "cuda"})
    return ncu_commands(
        target_arguments(there), [] if options.backend is None else [options.backend]
    )


def target(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Builds what the options name, for inference, and an input for it.

    Raises:
        HetconvError: the name is unknown, or an option does not fit.
        FileError: the file is none that `io.save` wrote.
    """
    name = options.target
    if name == "layer":
        if options.het is not None:
            raise ArgumentError(
                mismatch("--het", options.het, "a network", "For one layer use --kind het --p P.")
            )
        size = options.size or (56, 56)
        layer = layer_options.build_layer(options).eval()
        if isinstance(layer, SupportLayer):
            layer.freeze()
        return layer, layer_options.build_input(options, options.channels, size)
    device = layer_options.check_device(options.device)
    example: Tensor | None = None
    backend_code(options.backend)  # refuses an unknown one, also where no layer is ours
    if name in models.names():
        channels, *image = models.input_size(name)
        torch.manual_seed(0)
        model = models.create(name)
    elif name.endswith(_SUFFIX):
        try:
            model = io.load(name)
        except FileNotFoundError as error:
            raise HetconvError(f"{name} is not there.") from error
        channels, image = _channels(model), [224, 224]
    elif is_factory(name):
        model, example = _made(name)
        if example is None:
            channels, image = _channels(model), [224, 224]
    else:
        near = difflib.get_close_matches(name, ["layer", *models.names()], n=1)
        raise ArgumentError(
            mismatch(
                "MODEL",
                repr(name),
                f"layer, module:function, a {_SUFFIX} file, or one of {', '.join(models.names())}",
                f"Did you mean {near[0]}?" if near else "",
            )
        )
    if options.het is not None:
        model = convert(model, het(options.het), inplace=True).model
    form, dtype = layer_options.image_format(options), layer_options.float_dtype(options)
    model = model.eval().to(device, dtype)
    model = model.to(memory_format=form)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, SupportLayer):
            module.backend = options.backend
            module.freeze()
    if example is not None:
        example = example.to(device, dtype).to(memory_format=form)
    else:
        floats = argparse.Namespace(**{**vars(options), "dtype": str(dtype).removeprefix("torch.")})
        height, width = options.size or image
        example = layer_options.build_input(floats, channels, (height, width))
        example = example.to(memory_format=form)
    if not layer_options.in_8_bits(options):
        return model, example
    # What is drawn at random has no accuracy to lose; a network with an input of its own has it.
    return quantize(model, [example], measure=False).model, example


def runnable(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Builds what `target` builds, and optimises it where that is asked for.

    Raises:
        HetconvError: as `target`, or the network cannot be optimised.
    """
    model, example = target(options)
    if options.optimize and not layer_options.in_8_bits(options):  # quantize does it too
        with torch.no_grad():
            with fitting(example):
                model(example)
            model = optimize(model, example).model
    if options.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    return model, example


def target_arguments(options: argparse.Namespace) -> list[str]:
    """Lists the arguments that describe the same target again."""
    found = [options.target]
    for name in (
        "kind", "channels", "filters", "kernel", "p", "order", "density", "size", "batch",
        "stride", "dtype", "backend", "device", "memory_format", "het",
    ):  # fmt: skip
        value = getattr(options, name)
        if value is None or (options.target != "layer" and name in _OF_A_LAYER):
            continue
        text = "x".join(map(str, value)) if name == "size" else str(value)
        found += [f"--{name.replace('_', '-')}", text]
    return [*found, *["--optimize"] * options.optimize, *["--compile"] * options.compile]


def _made(name: str) -> tuple[nn.Module, Tensor | None]:
    """Calls a user's factory, which returns a network, or a network and an input for it."""
    found = call_factory(name, "MODEL")
    model, example = found if isinstance(found, tuple | list) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module) or not isinstance(example, Tensor | None):
        raise InputTypeError(
            mismatch(
                f"what {name} returned",
                type(found).__name__,
                "an nn.Module, or a pair of one and an input tensor",
            )
        )
    if example is not None and example.dim() != 4:
        raise ArgumentError(
            mismatch(f"input of {name}", list(example.shape), "images [N, C, H, W]")
        )
    return model, example


def _channels(model: nn.Module) -> int:
    """Returns the channels that the first convolution reads."""
    for layer in layers_of(model).values():
        support = getattr(layer, "support", None)
        channels = getattr(layer, "in_channels", None) or getattr(support, "channels", None)
        if channels:
            return int(channels)
    raise ArgumentError(mismatch("the network", "no convolution", "one that reads images"))
