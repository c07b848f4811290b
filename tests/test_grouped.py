# SPDX-License-Identifier: Apache-2.0
"""GroupedConv2d: the parameters, numbers and refusals of ``nn.Conv2d(groups=g)``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import DTYPES, assert_equals_conv2d, image
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import InputTypeError, SupportError
from hetconv_kernels.nn import GroupedConv2d

# (C, F, groups): dense, depthwise with and without a multiplier, one filter or channel a group.
SHAPES = [(6, 4, 1), (12, 8, 4), (8, 8, 8), (4, 12, 4), (12, 4, 4), (1, 1, 1), (1, 5, 1)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("frozen", [False, True], ids=["dense", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [1, 3, (2, 3)], ids=str)
@pytest.mark.parametrize(("c", "f", "groups"), SHAPES, ids=str)
def test_equals_conv2d(
    c: int, f: int, groups: int, kernel: Any, layout: torch.memory_format, frozen: bool
) -> None:
    layer = GroupedConv2d(c, f, kernel, padding=1, groups=groups)
    layer = layer.to(memory_format=layout)
    x = image(2, c, 8, 7).contiguous(memory_format=layout)
    if frozen:
        expected = layer(x)
        torch.testing.assert_close(layer.freeze()(x), expected)
        layer.thaw()
    assert_equals_conv2d(layer, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
def test_depthwise_on_every_backend_and_dtype(backend: str, dtype: torch.dtype) -> None:
    layer = GroupedConv2d(8, 8, 3, 2, 1, groups=8, dtype=dtype, backend=backend)
    assert_equals_conv2d(layer, image(2, 8, 9, 7, dtype=dtype))


@pytest.mark.parametrize(("c", "f", "groups"), SHAPES, ids=str)
def test_from_and_to_conv2d(c: int, f: int, groups: int) -> None:
    conv = nn.Conv2d(c, f, 3, padding=1, groups=groups, bias=False)
    layer = GroupedConv2d.from_conv2d(conv, backend="vendor")
    assert layer.support == hk.Support.grouped(c, f, 3, groups)
    assert layer.weight.shape == conv.weight.shape
    assert layer.live_parameters() == conv.weight.numel()
    assert layer.backend == "vendor"
    assert layer.weight.data_ptr() != conv.weight.data_ptr()
    for back in (layer.to_conv2d(), layer.freeze().to_conv2d()):
        assert repr(back) == repr(conv)
        assert torch.equal(back.weight, conv.weight)
        assert back.weight.data_ptr() != layer.weight.data_ptr()


def test_checkpoints_go_both_ways() -> None:
    conv, layer = nn.Conv2d(12, 8, 3, groups=4), GroupedConv2d(12, 8, 3, groups=4)
    layer.load_state_dict(conv.state_dict())
    assert torch.equal(layer.weight, conv.weight)
    other = nn.Conv2d(12, 8, 3, groups=4)
    other.load_state_dict(layer.to_conv2d().state_dict())
    assert torch.equal(other.weight, conv.weight)


@pytest.mark.parametrize("groups", [0, -1, 5, 8, 2.0], ids=str)
def test_groups_that_do_not_divide(groups: Any) -> None:
    with pytest.raises(SupportError, match="groups"):
        GroupedConv2d(12, 8, 3, groups=groups)


def test_refusals() -> None:
    with pytest.raises(InputTypeError, match="received Linear, expected"):
        GroupedConv2d.from_conv2d(nn.Linear(4, 4))  # type: ignore[arg-type]
    layer = GroupedConv2d(12, 8, 3, groups=4)
    layer.set_support(layer.support)  # the same one is no change
    fewer = layer.support & hk.Support.het(12, 8, 3, p=4, order="interleaved")
    with pytest.raises(SupportError, match=r"Use SupportConv2d\.from_conv2d\(layer\.to_conv2d"):
        layer.support = fewer


def test_project_changes_nothing() -> None:
    layer = GroupedConv2d(12, 8, 3, groups=4)
    before = layer.weight.detach().clone()
    version = layer.weight._version
    assert layer.project_() is layer
    assert torch.equal(layer.weight, before)
    assert layer.weight._version == version
