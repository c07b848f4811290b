# SPDX-License-Identifier: Apache-2.0
"""norms: batch normalisation goes into the layer beside it where that is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import assert_same, live_norms
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.graph.fold import fold
from hetconv_kernels.graph.norms import affine, merged
from hetconv_kernels.graph.trace import trace
from hetconv_kernels.nn import HetConv2d, SupportLinear

SUPPORT = hk.Support.from_mask(torch.eye(4).bool().repeat(1, 2)[:, :6, None, None].numpy())


def support_linear() -> nn.Module:
    return SupportLinear(6, 4, support=SUPPORT, bias=False)


def folded(*layers: nn.Module, shape: tuple[int, ...]) -> tuple[list[str], dict[str, str], int]:
    """Folds a sequence and compares outputs; returns what was fused and left, and how many norms
    stay.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*layers).eval()
    live_norms(model)
    x = torch.randn(shape)
    traced = trace(model, x)
    report = fold(traced)
    assert_same(model, traced, x)
    stay = sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in traced.modules())
    return [f.parts for f in report.fused], dict(report.left), stay


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        (lambda: (nn.Linear(6, 4), nn.BatchNorm1d(4)), "linear + bn"),
        (lambda: (nn.Linear(6, 4, False), nn.Dropout(), nn.BatchNorm1d(4)), "linear + bn"),
        (lambda: (support_linear(), nn.BatchNorm1d(4, affine=False)), "linear + bn"),
        (lambda: (support_linear().freeze(), nn.BatchNorm1d(4)), "linear + bn"),
        (lambda: (nn.BatchNorm1d(6), nn.Linear(6, 4, False)), "bn + linear"),
        (lambda: (nn.ReLU(), nn.BatchNorm1d(6), support_linear()), "bn + linear"),
    ],
)
def test_linear_layers(layers: Callable[[], tuple[nn.Module, ...]], parts: str) -> None:
    assert folded(*layers(), shape=(3, 6)) == ([parts], {}, 0)


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        (lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), ["bn + conv"]),
        (
            lambda: (nn.BatchNorm2d(4), HetConv2d(4, 6, 3, p=2, bias=False), nn.ReLU()),
            ["bn + conv + relu"],
        ),
        (
            lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)),
            ["bn + conv + bn"],
        ),
        # It goes into what is before it, if it can.
        (
            lambda: (nn.Conv2d(4, 4, 1), nn.Identity(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
            ["conv + bn", "conv"],
        ),
        (lambda: (nn.Conv2d(4, 4, 1), nn.Dropout2d(), nn.BatchNorm2d(4)), ["conv + bn"]),
    ],
)
def test_convolutions(layers: Callable[[], tuple[nn.Module, ...]], parts: list[str]) -> None:
    assert folded(*layers(), shape=(2, 4, 5, 6)) == (parts, {}, 0)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), "pads with zeros"),
        (lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same")), "pads with zeros"),
        (lambda: (nn.BatchNorm2d(4), HetConv2d(4, 4, 3, padding=1, p=2)), "pads with zeros"),
        (lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=2)), "is grouped"),
        (lambda: (nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)), "no layer reads it alone"),
        (lambda: (nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), "a convolution alone"),
    ],
)
def test_what_stays_says_why(layers: Callable[[], tuple[nn.Module, ...]], reason: str) -> None:
    _, left, stay = folded(*layers(), shape=(2, 4, 5, 6))
    assert stay == 1
    (said,) = left.values()
    assert said.startswith("it does not follow a convolution alone")
    assert reason in said


def test_a_sequence_of_features_has_its_channels_elsewhere() -> None:
    """BatchNorm1d normalises the middle dimension of [N, C, L], Linear maps the last."""
    assert folded(nn.Linear(5, 5), nn.BatchNorm1d(4), shape=(2, 4, 5))[2] == 1


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return self.bn(y) + y


def test_a_layer_with_two_readers_keeps_its_weights() -> None:
    assert folded(Twice(), shape=(3, 4))[2] == 1


def test_by_hand() -> None:
    """BN: 2·(x − 1)/√4 + 3 = x + 2. Before y = 5x + 7z it is 5x + 7z + 24; after it adds 2."""
    norm = nn.BatchNorm1d(2, eps=0.0).eval()
    norm.weight.data.fill_(2.0)
    norm.bias.data.fill_(3.0)
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)
    assert [v.tolist() for v in affine(norm)] == [[1.0, 1.0], [2.0, 2.0]]
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data.copy_(torch.tensor([[5.0, 7.0], [1.0, 0.0]]))
    ahead, behind = merged(linear, norm, True), merged(linear, norm, False)
    assert ahead.bias.tolist() == [24.0, 2.0]
    assert behind.bias.tolist() == [2.0, 2.0]
    assert torch.equal(ahead.weight, linear.weight)
    assert linear.bias is None  # the given one is as it was


def test_optimize_says_what_it_did() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8),
        nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2),
    ).eval()  # fmt: skip
    live_norms(model)
    text = str(hk.optimize(model, torch.randn(2, 3, 5, 5)))
    assert "1 fused: conv + bn + relu" in text
    assert "1 fused: linear + bn" in text
    assert "left alone" not in text
