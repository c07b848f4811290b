# SPDX-License-Identifier: Apache-2.0
"""The networks of the papers, small and plain.

All are built from ``nn.Conv2d`` and ``nn.Linear`` only, so that `hetconv_kernels.convert` and the
compressors see ordinary layers. Where torchvision has the same network the names in the state
dict and the parameter count are torchvision's, so its checkpoints load.
"""

from .densenet import DenseNet, densenet121, densenet121_cifar, densenet201
from .digits import DigitsNet, digits_net
from .dncnn import DnCNN, dncnn
from .lenet import LeNet5, lenet5
from .mobilenet import MobileNet, mobilenet
from .registry import create, input_size, names
from .resnet import (
    CifarResNet,
    ResNet,
    resnet18,
    resnet20,
    resnet34,
    resnet50,
    resnet56,
    resnet110,
)
from .vgg import VGG, vgg16, vgg16_cifar

__all__ = [
    "VGG",
    "CifarResNet",
    "DenseNet",
    "DigitsNet",
    "DnCNN",
    "LeNet5",
    "MobileNet",
    "ResNet",
    "create",
    "densenet121",
    "densenet121_cifar",
    "densenet201",
    "digits_net",
    "dncnn",
    "input_size",
    "lenet5",
    "mobilenet",
    "names",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet110",
    "vgg16",
    "vgg16_cifar",
]
