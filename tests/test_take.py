# SPDX-License-Identifier: Apache-2.0
"""Layer.take: some filters and channels of a layer, as the plainest layer there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layers import BUILDERS, C, F, build, image
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.graph.take import LayerMatrix, take_norm
from hetconv_kernels.nn import GroupedConv2d, HetConv2d, SupportConv2d, SupportLinear

ROWS, COLUMNS = np.array([6, 0, 3]), np.array([1, 2, 5, 11, 4])
LAYERS = {
    "conv": lambda: nn.Conv2d(C, F, 3, padding=1),
    "conv-no-bias": lambda: nn.Conv2d(C, F, (3, 1), stride=2, padding="valid", bias=False),
    "conv-grouped": lambda: nn.Conv2d(C, F, 3, groups=4),
    **{kind: lambda kind=kind: build(kind, 3, padding=1) for kind in BUILDERS},
    "frozen": lambda: build("het", 3).freeze(),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_taken_filters_on_taken_channels(kind: str) -> None:
    """The channels that are left out get zeros; then the filters must agree."""
    layer = LAYERS[kind]().eval()
    taken = LayerMatrix(layer).take(ROWS, COLUMNS)
    x = image()
    silent = torch.zeros_like(x)
    silent[:, COLUMNS] = x[:, COLUMNS]
    torch.testing.assert_close(taken(x[:, COLUMNS]), layer(silent)[:, ROWS])
    assert not taken.training


@pytest.mark.parametrize("kind", ["linear", "support-linear"])
def test_linear_layers(kind: str) -> None:
    layer = nn.Linear(C, F)
    if kind == "support-linear":
        mask = np.random.default_rng(0).random((F, C, 1, 1)) < 0.5
        layer = SupportLinear.from_linear(layer, hk.Support.from_mask(mask))
    taken = LayerMatrix(layer).take(ROWS, COLUMNS)
    assert type(taken) is type(layer)
    x = torch.zeros(3, C)
    x[:, COLUMNS] = torch.randn(3, len(COLUMNS))
    torch.testing.assert_close(taken(x[:, COLUMNS]), layer(x)[:, ROWS])


def test_nothing_taken_away_is_the_layer_itself() -> None:
    conv = nn.Conv2d(4, 3, 1)
    assert LayerMatrix(conv).take(np.arange(3), np.arange(4)) is conv
    shifted = LayerMatrix(conv).take(np.arange(3), np.arange(4), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(shifted.bias, conv.bias + 1)


@pytest.mark.parametrize(
    ("layer", "rows", "columns", "kind"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), [0, 2], [1, 3], nn.Conv2d),
        (nn.Conv2d(4, 4, 3, groups=2), [0, 1, 2], [0, 1, 2, 3], SupportConv2d),
        (nn.Conv2d(4, 4, 3, groups=2), [0, 1], [0, 1], nn.Conv2d),
        (GroupedConv2d(4, 4, 3, groups=2), [0, 2], [1, 3], GroupedConv2d),
        (HetConv2d(4, 4, 3, p=2), [0, 2], [0, 2], HetConv2d),
        (HetConv2d(4, 4, 3, p=2, order="interleaved"), [0, 2, 1, 3], [0, 2, 1, 3], HetConv2d),
        (HetConv2d(4, 4, 3, p=2), [0, 2, 3], [0, 2], SupportConv2d),
        (HetConv2d(4, 4, 3, p=2), [0, 1], [0, 1], nn.Conv2d),
        (HetConv2d(4, 4, 3, p=2, backend="vendor"), [0, 1], [0, 1], SupportConv2d),
    ],
    ids=[
        *("even", "uneven", "one-group", "grouped", "het", "interleaved", "het-uneven"),
        *("dense", "forced"),
    ],
)
def test_the_plainest_class_is_chosen(layer, rows, columns, kind) -> None:
    taken = LayerMatrix(layer).take(np.array(rows), np.array(columns))
    assert type(taken) is kind
    assert getattr(taken, "backend", None) == getattr(layer, "backend", None)
    if kind is HetConv2d:
        assert taken.order == "blocked"


def test_layout_flags_and_dtype_stay() -> None:
    conv = nn.Conv2d(4, 4, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    taken = LayerMatrix(conv.eval()).take(np.array([0, 1, 2]), np.array([0, 1]))
    assert taken.weight.is_contiguous(memory_format=torch.channels_last)
    assert (taken.weight.dtype, taken.weight.requires_grad) == (torch.float64, False)


@pytest.mark.parametrize(
    ("layer", "padded"),
    [
        (nn.Conv2d(2, 2, 3), False),
        (nn.Conv2d(2, 2, 3, padding=1), True),
        (nn.Conv2d(2, 2, 3, padding=(0, 1)), True),
        (nn.Conv2d(2, 2, 3, padding="same"), True),
        (nn.Conv2d(2, 2, 1, padding="same"), False),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), False),
        (HetConv2d(4, 4, 3, padding=1), True),
        (HetConv2d(4, 4, 3, padding=1, padding_mode="circular"), False),
        (nn.Linear(2, 2), False),
    ],
)
def test_who_has_a_border(layer: nn.Module, padded: bool) -> None:
    assert LayerMatrix(layer).padded is padded


def test_reads_and_sums_ignore_dead_entries() -> None:
    layer = build("support")
    mask = layer.support.mask
    with torch.no_grad():
        layer.weight.fill_(1)
    view = LayerMatrix(layer)
    assert np.array_equal(view.reads, mask.any((2, 3)))
    expected = torch.tensor(mask.sum((2, 3))[:, [0, 7]]).double()
    assert torch.equal(view.sums(np.array([0, 7])), expected)


@pytest.mark.parametrize("kind", ["conv", "support", "het"])
def test_one_channel_stands_for_its_multiples(kind: str) -> None:
    layer = LAYERS[kind]()
    view = LayerMatrix(layer)
    assert view.merges
    view.merge(2, np.array([4, 5]), torch.tensor([0.5, -3.0], dtype=torch.float64))
    rest = np.setdiff1d(np.arange(C), [4, 5])
    merged = view.take(np.arange(F), rest)
    x = image()
    x[:, 4], x[:, 5] = x[:, 2] * 0.5, x[:, 2] * -3
    torch.testing.assert_close(merged(x[:, rest]), layer(x))
    assert not LayerMatrix(nn.Conv2d(4, 4, 3, groups=2)).merges


@pytest.mark.parametrize("affine", [True, False])
def test_norms(affine: bool) -> None:
    norm = nn.BatchNorm2d(6, affine=affine)
    norm(torch.randn(4, 6, 3, 3))
    norm.eval()
    x = torch.randn(2, 6, 3, 3)
    order = np.array([5, 0, 2])
    assert torch.equal(take_norm(norm, order)(x[:, order]), norm(x)[:, order])
    assert take_norm(norm, np.arange(6)) is norm
