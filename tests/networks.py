# SPDX-License-Identifier: Apache-2.0
"""What the tests of whole networks share: small networks, dead channels, and the comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F_
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import models
from hetconv_kernels.models.resnet import Bottleneck


class Branches(nn.Module):
    """Residual sums, a concatenation, slices, a gate, and features of more than a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.right = nn.Conv2d(8, 6, 1)
        self.deep = nn.Conv2d(14, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.squeeze = nn.Linear(8, 4)
        self.excite = nn.Linear(4, 8)
        self.head = nn.Linear(8 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F_.relu(self.stem(x))
        y = F_.relu(self.left(x) + x)
        y = torch.cat([y, self.right(x)], dim=1)
        y = self.deep(y).relu_()
        first, second = y.chunk(2, 1)
        y = torch.cat([second, first * 0.5], 1)
        y = self.depthwise(y) + y
        y = F_.max_pool2d(torch.tanh(self.grouped(y)), 2)
        gate = torch.sigmoid(self.excite(F_.relu(self.squeeze(y.mean((2, 3))))))
        y = y * gate.view(gate.size(0), 8, 1, 1)
        return self.head(F_.adaptive_avg_pool2d(y, 2).view(-1, 32))


# Each with the shape of an input, small enough for a test.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vgg16": (lambda: models.vgg16_cifar(), (3, 32, 32)),
    "resnet20": (models.resnet20, (3, 16, 16)),
    "resnet56": (models.resnet56, (3, 8, 8)),
    "resnet50": (lambda: models.ResNet(Bottleneck, (3, 4, 6, 3), 10), (3, 32, 32)),
    "densenet": (lambda: models.DenseNet((3, 3), growth=8, stem=16, num_classes=10), (3, 32, 32)),
    "mobilenet": (lambda: models.mobilenet(10, width=0.25), (3, 32, 32)),
    "lenet5": (models.lenet5, (1, 28, 28)),
    "dncnn": (lambda: models.dncnn(depth=5, channels=12, image_channels=3), (3, 9, 9)),
    "branches": (Branches, (3, 8, 8)),
}


def network(name: str, share: float = 0.4) -> tuple[nn.Module, Tensor]:
    """Builds a network in evaluation mode, a share of its filters dead, and an input."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    live_norms(model)
    kill(model, share)
    return model, torch.randn(2, *shape)


def live_norms(model: nn.Module) -> None:
    """Gives batch normalisations statistics and weights that all matter."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.5, 0.5)


def kill(model: nn.Module, share: float) -> None:
    """Zeroes a share of the filters of each dense convolution, biases too in every second one."""
    generator = torch.Generator().manual_seed(1)
    for number, module in enumerate(model.modules()):
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            dead = torch.rand(module.out_channels, generator=generator) < share
            module.weight.data[dead] = 0
            if module.bias is not None and number % 2:
                module.bias.data[dead] = 0


def interleaved(model: nn.Module) -> nn.Module:
    """Makes the convolutions of a network HetConv with interleaved groups."""
    rule = hk.rules.het(p=2, order="interleaved")
    return hk.convert(model, rule).model.eval()


@torch.no_grad()
def assert_same(before: nn.Module, after: nn.Module, x: Tensor) -> None:
    """Finds no difference but that of rounding, in float32, and from one image to another batch.

    The truth is the original in float64; twice the original's own error is allowed, and four
    roundings of the largest output.
    """
    for image in (x, torch.randn(3, *x.shape[1:], generator=torch.Generator().manual_seed(5))):
        truth = copy.deepcopy(before).double()(image.double())
        own = (before(image.clone()) - truth).abs().max()
        error = (after(image.clone()) - truth).abs().max()
        assert after(image.clone()).shape == truth.shape
        floor = 32 * torch.finfo(image.dtype).eps * truth.abs().max()
        assert error <= 2 * own + floor, f"error {error:.3g}, own {own:.3g}"


def kinds(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    """Lists a network's modules of exactly one class."""
    return [m for m in model.modules() if type(m) is kind]


class Forks(nn.Module):
    """Branches on its input's values, so that nothing traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def equal(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    """Compares what two networks compute."""
    with torch.no_grad():
        torch.testing.assert_close(first(x), second(x))
