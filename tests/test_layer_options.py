# SPDX-License-Identifier: Apache-2.0
"""The options that describe a layer build that layer, and refuse what cannot be one."""

from __future__ import annotations

import argparse

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import layer_options
from hetconv_kernels.errors import HetconvError


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    layer_options.add_layer_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("het", hk.Support.het(8, 16, 3, p=4)),
        ("dense", hk.Support.dense(8, 16, 3)),
        ("grouped", hk.Support.grouped(8, 16, 3, 4)),
    ],
)
def test_kinds(kind: str, expected: hk.Support) -> None:
    options = parsed("--kind", kind, "--channels", "8", "--filters", "16", "--stride", "2")
    layer = layer_options.build_layer(options)
    assert layer.support == expected
    assert (layer.stride, layer.padding) == ((2, 2), (1, 1))


def test_a_mask_has_its_density() -> None:
    options = parsed("--kind", "mask", "--channels", "64", "--density", "0.2")
    assert layer_options.build_layer(options).support.density == pytest.approx(0.2, abs=0.01)


def test_inputs_have_the_layout_and_dtype() -> None:
    options = parsed("--memory-format", "channels_last", "--dtype", "bfloat16", "--batch", "2")
    x = layer_options.build_input(options, 8, (5, 6))
    assert (tuple(x.shape), x.dtype) == ((2, 8, 5, 6), torch.bfloat16)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert layer_options.build_layer(options).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments",
    [["--kind", "mask", "--density", "0"], ["--channels", "0"], ["--batch", "-1"]],
    ids=" ".join,
)
def test_impossible_layers_are_refused_where_options_are_read(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(*arguments)
    assert arguments[-2] in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(HetconvError, match="device 'moon' cannot be used"):
        layer_options.build_layer(parsed("--device", "moon"))


def test_short_names_are_those_of_dtypes() -> None:
    assert parsed("--dtype", "bf16").dtype == "bfloat16"
    assert parsed("--dtype", "fp16").dtype == "float16"


@pytest.mark.parametrize("kind", ["het", "dense", "grouped", "mask"])
def test_a_layer_in_8_bits_computes_what_the_one_in_float_does(kind: str) -> None:
    arguments = ("--kind", kind, "--channels", "16", "--backend", "reference")
    torch.manual_seed(0)
    whole = layer_options.build_layer(parsed(*arguments)).eval()
    torch.manual_seed(0)
    options = parsed(*arguments, "--dtype", "int8")
    layer = layer_options.build_layer(options)
    assert isinstance(layer, hk.nn.QuantizedConv2d)
    assert (layer.support, layer.backend) == (whole.support, "reference")
    x = layer_options.build_input(options, 16, (9, 9))
    assert x.dtype == torch.uint8
    assert x.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = whole(hk.nn.Dequantize(layer.x)(x))
        found = hk.nn.Dequantize(layer.y)(layer(x))
    inside = (expected > layer.y.low) & (expected < layer.y.high)
    assert float(inside.float().mean()) > 0.99
    assert (found - expected)[inside].norm() < 0.05 * expected[inside].norm()


def test_an_image_in_8_bits_may_lie_otherwise() -> None:
    options = parsed("--dtype", "int8", "--memory-format", "contiguous")
    assert layer_options.build_input(options, 8, (5, 6)).is_contiguous()
