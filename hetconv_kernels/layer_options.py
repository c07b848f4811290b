# SPDX-License-Identifier: Apache-2.0
"""The options by which a command line describes one layer and its input."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import nn
from .errors import HetconvError, mismatch
from .masks import check_entries
from .option_types import real, size, whole
from .quantization import Scale
from .support import Support

DTYPE_NAMES = ("float32", "float16", "bfloat16", "float64", "int8")
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# In 8 bits the numbers of a unit normal distribution lie within four deviations, all but 1 in
# 16 000.
_RANGE = 4.0
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def add_layer_arguments(parser: argparse.ArgumentParser, title: str = "the layer") -> None:
    """Adds the options to a parser.

    Args:
        parser: of a command.
        title: over those that describe the layer itself.
    """
    add = parser.add_argument_group(title).add_argument
    add("--kind", choices=("het", "dense", "grouped", "mask"), default="het",
        help="which weights exist (het)")  # fmt: skip
    add("--channels", type=whole(), default=64, help="input channels (64)")
    add("--filters", type=whole(), help="output channels (as many as input channels)")
    add("--kernel", type=whole(), default=3, help="kernel edge (3)")
    add("--p", type=whole(), default=4, help="part of a HetConv, or number of groups (4)")
    add("--order", choices=("blocked", "interleaved"), default="blocked",
        help="which channels of a HetConv keep all taps (blocked)")  # fmt: skip
    add("--density", type=real(0, 1), default=0.3, help="of a random mask, 0…1 (0.3)")
    add("--stride", type=whole(), default=1, help="in pixels (1)")
    add = parser.add_argument_group("its input, and what computes").add_argument
    add("--size", type=size, default=(56, 56), help="input height, or HEIGHTxWIDTH (56)")
    add("--batch", type=whole(), default=1, help="images (1)")
    add("--dtype", choices=DTYPE_NAMES, default="float32", type=lambda text: _SHORT.get(text, text),
        help="of weights and activations; bf16 for bfloat16; int8: weights of a scale for each "
        "filter, unsigned activations (float32)")  # fmt: skip
    add(
        "--memory-format",
        choices=tuple(FORMATS),
        help="of images (contiguous; int8: channels_last, into which others are copied)",
    )
    add("--backend", help="force this backend; `hetconv info` lists them")
    add("--device", default="cpu", help="such as cpu or cuda:0 (cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def float_dtype(options: argparse.Namespace) -> torch.dtype:
    """Returns the dtype in which a layer or network is built: in 8 bits it is quantised after."""
    found: torch.dtype = torch.float32 if in_8_bits(options) else getattr(torch, options.dtype)
    return found


def in_8_bits(options: argparse.Namespace) -> bool:
    """Tells whether the options ask for integers."""
    return bool(options.dtype == "int8")


def image_format(options: argparse.Namespace) -> torch.memory_format:
    """Returns the layout of images: what is asked for, or the one that the dtype is fastest in."""
    default = "channels_last" if in_8_bits(options) else "contiguous"
    return FORMATS[options.memory_format or default]


def build_layer(options: argparse.Namespace) -> nn.SupportConv2d | nn.QuantizedConv2d:
    """Builds the layer that the options describe.

    In 8 bits its Scales are those of normally distributed numbers, and of what it makes of them.

    Raises:
        HetconvError: the device cannot be used, or a value is out of range.
    """
    c, k, p = options.channels, options.kernel, options.p
    f = c if options.filters is None else options.filters
    more: dict[str, Any] = {
        "bias": True,
        "device": check_device(options.device),
        "dtype": float_dtype(options),
        "backend": options.backend,
    }
    place = (options.stride, k // 2)
    layer: nn.SupportConv2d
    if options.kind == "het":
        layer = nn.HetConv2d(c, f, k, *place, p=p, order=options.order, **more)
    elif options.kind == "grouped":
        layer = nn.GroupedConv2d(c, f, k, *place, groups=p, **more)
    elif options.kind == "dense":
        layer = nn.SupportConv2d(c, f, k, *place, support=Support.dense(c, f, k), **more)
    else:
        check_entries(c * f * k * k)
        mask = np.random.default_rng(0).random((f, c, k, k)) < options.density
        layer = nn.SupportConv2d(c, f, k, *place, support=Support.from_mask(mask), **more)
    layer = layer.to(memory_format=image_format(options))  # type: ignore[call-overload]
    return _quantized(layer) if in_8_bits(options) else layer


def _quantized(layer: nn.SupportConv2d) -> nn.QuantizedConv2d:
    edge = 4 * layer.support.kernel[0]
    device = layer.weight.device
    with torch.no_grad():
        x = torch.randn(1, layer.support.channels, edge, edge, device=device)
        y = layer.eval()(x)
    low, high = float(y.min()), float(y.max())
    made = nn.QuantizedConv2d.from_float(layer, _input_scale(), Scale.of_range(low, high))
    made.backend = layer.backend
    return made.eval()


def _input_scale() -> Scale:
    return Scale.of_range(-_RANGE, _RANGE)


def build_input(options: argparse.Namespace, channels: int, size: tuple[int, int]) -> Tensor:
    """Draws an input of the options' batch, dtype, device and memory format.  # [N, C, H, W]

    Raises:
        HetconvError: the device cannot be used, or there is no such shape.
    """
    device, dtype = check_device(options.device), float_dtype(options)
    shape = (options.batch, channels, *size)
    try:
        x = torch.randn(*shape, device=device, dtype=dtype)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise HetconvError(f"No input of shape {shape}: {reason}") from error
    if in_8_bits(options):
        x = nn.Quantize(_input_scale())(x)
    return x.to(memory_format=image_format(options))


def check_device(name: str) -> torch.device:
    """Returns a device that can be used.

    Raises:
        HetconvError: it cannot.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA was compiled in
        reason = str(error).splitlines()[0]
        raise HetconvError(f"device {name!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise HetconvError(
            mismatch("device", "'meta', where tensors hold no numbers", "one that computes")
        )
    return device
