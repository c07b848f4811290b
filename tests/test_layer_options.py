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
    layer_options.add_arguments(parser)
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
