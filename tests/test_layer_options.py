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
    ("arguments", "said"),
    [
        (["--kind", "mask", "--density", "0"], "--density"),
        (["--kind", "mask", "--channels", "0"], "positive numbers"),
        (["--device", "moon"], "device 'moon' cannot be used"),
    ],
)
def test_impossible_layers_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(HetconvError, match=said):
        layer_options.build_layer(parsed(*arguments))
    with pytest.raises(HetconvError, match="No input of shape"):
        layer_options.build_input(parsed("--batch", "-1"), 8, (5, 6))
