# SPDX-License-Identifier: Apache-2.0
"""Networks as people write them come through compact and optimize, smaller where they can be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F_
from layers import C, build, image
from torch import Tensor, nn

import hetconv_kernels as hk


class SharedWithNorm(nn.Module):
    """One convolution on two paths, with a normalisation on one of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.norm(self.conv(x)).relu() + self.conv(x))


class NormBias(nn.Module):
    """Filters without weights whose value is the bias of the normalisation behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.conv.weight[2:6] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu())


class Shuffle(nn.Module):
    """A unit of ShuffleNet: chunk, a branch, a concatenation, a shuffle; and a split of three."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.heads = nn.ModuleList([nn.Conv2d(n, 2, 1) for n in (1, 3, 4)])
        with torch.no_grad():
            self.stem.weight[[1, 5, 6]] = 0

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stem(x).relu().chunk(2, 1)
        x = torch.cat([first, self.branch(second)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        parts = F_.channel_shuffle(x, 4).split([1, 3, 4], 1)
        return sum(head(part) for head, part in zip(self.heads, parts, strict=True))


class Pyramid(nn.Module):
    """A feature pyramid: strided levels, and sums at the size of the level below."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 4), (4, 6), (6, 8))])
        self.sides = nn.ModuleList([nn.Conv2d(o, 5, 1) for o in (4, 6, 8)])
        with torch.no_grad():
            for side in self.sides:
                side.weight[1] = 0
                side.bias[1] = 0

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for level in self.levels:
            x = level(x).relu()
            features.append(x)
        y = self.sides[2](features[2])
        results = [y]
        for side, feature in zip(self.sides[1::-1], features[1::-1], strict=True):
            y = side(feature) + F_.interpolate(y, size=feature.shape[2:], mode="nearest")
            results.append(y)
        return results


NETWORKS = {
    "shared-with-norm": SharedWithNorm,
    "norm-bias": NormBias,
    "shuffle": Shuffle,
    "pyramid": Pyramid,
}


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (9, 30)], ids=str)
@pytest.mark.parametrize("converted", [False, True], ids=["dense", "het"])
@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_networks_come_through(kind: str, converted: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[kind](), torch.randn(2, 3, *size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    model.eval()
    if converted:
        model = hk.convert(model, hk.rules.het(p=2), inplace=False).model.eval()
    for change in (hk.compact, hk.optimize):
        fast = change(model, x).model
        y = torch.randn(3, 3, *size) if kind == "norm-bias" else torch.randn_like(x)
        torch.testing.assert_close(fast(y), model(y), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_bias_of_a_normalisation_is_folded_when_its_filters_go() -> None:
    torch.manual_seed(0)
    model = NormBias().eval()
    model.norm.bias.uniform_(1, 2)  # through the activation it is a constant other than zero
    report = hk.compact(model, torch.randn(2, 3, 8, 8))
    assert report.model.conv.out_channels == report.model.norm.num_features == 4


@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
@pytest.mark.parametrize("stride", [(2, 3), (3, 1), (5, 4)], ids=str)
@pytest.mark.parametrize("kind", ["support", "het"])
def test_odd_strides_and_expanded_gradients(kind: str, stride, backend: str) -> None:
    """The gradient of a sum or a mean is one number, expanded: strides of zero."""
    layer = build(kind, stride=stride, padding=1, backend=backend)
    twin = layer.to_conv2d()
    mask = torch.from_numpy(layer.support.mask.copy())
    for reduce in (
        lambda y: y.sum(),
        lambda y: y.mean((2, 3)).square().sum(),
        lambda y: y.sum(1, keepdim=True).sin().sum(),
        lambda y: y[:, :, ::2].sum(0).square().sum(),
    ):
        found, expected = [], []
        for module, grads in ((layer, found), (twin, expected)):
            x = image(2, C, 13, 11).requires_grad_()
            grads += torch.autograd.grad(reduce(module(x)), (x, module.weight, module.bias))
        expected[1] = expected[1] * mask
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
