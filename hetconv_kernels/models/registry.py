# SPDX-License-Identifier: Apache-2.0
"""The networks by name: which there are, how one is made, and what image it is meant for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..errors import ArgumentError, mismatch
from .densenet import densenet121, densenet121_cifar, densenet201
from .digits import digits_net
from .dncnn import dncnn
from .lenet import lenet5
from .mobilenet import mobilenet
from .resnet import resnet18, resnet20, resnet34, resnet50, resnet56, resnet110
from .vgg import vgg16, vgg16_cifar

_MNIST, _CIFAR, _IMAGENET = (1, 28, 28), (3, 32, 32), (3, 224, 224)


class _Entry(NamedTuple):
    build: Callable[..., nn.Module]
    size: tuple[int, int, int]


_NETWORKS = {
    "lenet5": _Entry(lenet5, _MNIST),
    "digits_net": _Entry(digits_net, (1, 8, 8)),
    "dncnn": _Entry(dncnn, (1, 180, 180)),
    "vgg16_cifar": _Entry(vgg16_cifar, _CIFAR),
    "resnet20": _Entry(resnet20, _CIFAR),
    "resnet56": _Entry(resnet56, _CIFAR),
    "resnet110": _Entry(resnet110, _CIFAR),
    "vgg16": _Entry(vgg16, _IMAGENET),
    "resnet18": _Entry(resnet18, _IMAGENET),
    "resnet34": _Entry(resnet34, _IMAGENET),
    "resnet50": _Entry(resnet50, _IMAGENET),
    "densenet121": _Entry(densenet121, _IMAGENET),
    "densenet121_cifar": _Entry(densenet121_cifar, _CIFAR),
    "densenet201": _Entry(densenet201, _IMAGENET),
    "mobilenet": _Entry(mobilenet, _IMAGENET),
}


def names() -> list[str]:
    """Lists the networks that `create` makes."""
    return list(_NETWORKS)


def create(name: str, **settings: Any) -> nn.Module:
    """Makes a network by its name, with fresh weights.

    Args:
        name: one of `names`.
        settings: of the function of that name, such as ``num_classes``.

    Raises:
        ArgumentError: there is no network of that name.
    """
    return _entry(name).build(**settings)


def input_size(name: str) -> tuple[int, int, int]:
    """Returns the channels, height and width, in pixels, of the images of a network's paper.

    Raises:
        ArgumentError: there is no network of that name.
    """
    return _entry(name).size


def _entry(name: str) -> _Entry:
    if name not in _NETWORKS:
        raise ArgumentError(mismatch("network", repr(name), f"one of {', '.join(_NETWORKS)}"))
    return _NETWORKS[name]
